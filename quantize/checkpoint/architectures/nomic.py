"""NomicBERT: token types but no learned positions, RoPE, SwiGLU, norms after each part, no biases but the norms'.

Its config.json has two forms: the one of transformers, and the older one of the repository's own code, which calls
sizes as GPT-2 does. The tensors have the same names in both.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from f2gguf.evals.full_precision import OLD_KEYS, todays_config
from f2gguf.quantize.checkpoint.architectures import bert
from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    head_dim,
    in_every_layer,
    plain_rope_base,
    shared_facts,
    with_bias,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

_OLD_KEYS = OLD_KEYS["nomic_bert"]
# What the older form must state, as its own code computes something else by default
_STATED = {
    "activation_function": ("swiglu",),
    "rotary_emb_fraction": (1.0,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
}


def _todays(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the keys of transformers, whichever form its config.json has."""
    config = checkpoint.config
    if "n_embd" not in config:
        return checkpoint
    stated = {"max_trained_positions": 2048, **config}  # the default of its own code, and of transformers
    if lacking := [key for key in (*_OLD_KEYS, *_STATED) if stated.get(key) is None]:
        raise BrokenCheckpoint(f"{checkpoint.folder / 'config.json'}: has no {lacking[0]!r}. {FETCH_AGAIN}")
    return replace(checkpoint, config=todays_config(stated))


def _targets(checkpoint: Checkpoint) -> list[Target]:
    checkpoint = _todays(checkpoint)
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_types = checkpoint.count("type_vocab_size")
    block = [
        Target("attn.Wqkv.weight", "attn_qkv.weight", (3 * n_embd, n_embd)),
        Target("attn.out_proj.weight", "attn_output.weight", (n_embd, n_embd)),
        *with_bias("norm1", "attn_output_norm", (n_embd,)),
        Target("mlp.fc11.weight", "ffn_up.weight", (n_ff, n_embd)),
        Target("mlp.fc12.weight", "ffn_gate.weight", (n_ff, n_embd)),
        Target("mlp.fc2.weight", "ffn_down.weight", (n_embd, n_ff)),
        *with_bias("norm2", "layer_output_norm", (n_embd,)),
    ]
    return [
        Target("embeddings.word_embeddings.weight", "token_embd.weight", (n_vocab, n_embd)),
        Target("embeddings.token_type_embeddings.weight", "token_types.weight", (n_types, n_embd)),
        *with_bias("emb_ln", "token_embd_norm", (n_embd,)),
        *in_every_layer(checkpoint, "encoder.layers.", block),
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    checkpoint = _todays(checkpoint)
    if (width := checkpoint.config.get("head_dim")) not in (None, head_dim(checkpoint)):
        stated = f"head_dim is {width!r}"
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder / 'config.json'}: {stated}; llama.cpp divides hidden_size among the heads."
        )
    return {
        **shared_facts(checkpoint),
        "attention.layer_norm_epsilon": checkpoint.real("layer_norm_eps"),
        "attention.causal": False,
        "rope.freq_base": plain_rope_base(checkpoint),
    }


ARCHITECTURES = {
    "nomic_bert": Architecture(
        name="nomic-bert",
        prefix="nomic_bert.",
        renames={},
        dropped=re.compile(r"pooler\..*|cls\..*|.*\.inv_freq"),
        keys=ConfigKeys(
            carried=SIZES
            | {"type_vocab_size", "layer_norm_eps", "head_dim", "rope_theta", "rope_parameters", "rope_scaling"}
            | _OLD_KEYS.keys()
            | {"n_positions", "rotary_scaling_factor"},  # of no effect up to max_trained_positions
            required={
                "hidden_act": ("silu",),
                "is_causal": (None, False),
                **_STATED,
                "causal": (False, None),
                "prenorm": (False, None),
                "parallel_block": (False, None),
                "rotary_emb_interleaved": (False, None),
                "rotary_emb_scale_base": (None,),
                "use_rms_norm": (False, None),
                "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None),
                "moe_every_n_layers": (0, None),
            },
            classes=frozenset({"NomicBertModel", "NomicBertForPreTraining", "NomicBertForMaskedLM"}),
            own_code={"configuration_hf_nomic_bert": (), "modeling_hf_nomic_bert": ()},
            without_effect=frozenset(
                {"parallel_block_tied_norm", "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln"}
                | {"pad_vocab_size_multiple", "reorder_and_upcast_attn", "use_xentropy"}
                | {"summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"}
                | {"summary_use_proj"}
            ),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class="BertTokenizer",
        examples="nomic-embed-text-v1, nomic-embed-text-v1.5",
        tokenizer_facts=bert.tokenizer_facts,
    ),
}
