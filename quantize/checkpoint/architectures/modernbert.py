"""ModernBERT: RoPE, windows in most layers, gated products fused into one, norms before each part, no bias at all.

The first layer has no norm before its attention, as the norm of the embeddings stands there.
"""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    head_dim,
    in_every_layer,
    plain_rope_base,
    require_tables_by_kind,
    shared_facts,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.runtime.errors import UnsupportedCheckpoint

_FULL, _WINDOW = "full_attention", "sliding_attention"
# kind of layer -> the key of its RoPE base in configurations before transformers 5, and the default
_BASES = {_FULL: ("global_rope_theta", 160000.0), _WINDOW: ("local_rope_theta", 10000.0)}


def _targets(checkpoint: Checkpoint) -> list[Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    block = [
        Target("attn_norm.weight", "attn_norm.weight", (n_embd,)),
        Target("attn.Wqkv.weight", "attn_qkv.weight", (3 * n_embd, n_embd)),
        Target("attn.Wo.weight", "attn_output.weight", (n_embd, n_embd)),
        Target("mlp_norm.weight", "ffn_norm.weight", (n_embd,)),
        Target("mlp.Wi.weight", "ffn_up.weight", (2 * n_ff, n_embd)),
        Target("mlp.Wo.weight", "ffn_down.weight", (n_embd, n_ff)),
    ]
    return [
        Target("embeddings.tok_embeddings.weight", "token_embd.weight", (n_vocab, n_embd)),
        Target("embeddings.norm.weight", "token_embd_norm.weight", (n_embd,)),
        *(target for target in in_every_layer(checkpoint, "layers.", block) if target.name != "blk.0.attn_norm.weight"),
        Target("final_norm.weight", "output_norm.weight", (n_embd,)),
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    head_dim(checkpoint)  # checked only: llama.cpp divides the width among the heads
    if checkpoint.config.get("rope_scaling"):
        stated = f"RoPE scaling is not supported: {checkpoint.config['rope_scaling']!r}"
        raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {stated}.")
    return {
        **shared_facts(checkpoint),
        "attention.layer_norm_epsilon": checkpoint.real("norm_eps"),
        "attention.causal": False,
        "attention.sliding_window": checkpoint.count("local_attention"),
        "attention.sliding_window_pattern": _period(checkpoint),
        "rope.freq_base": _rope_base(checkpoint, _FULL),
        "rope.freq_base_swa": _rope_base(checkpoint, _WINDOW),
        "rope.scaling.type": "none",
        "hidden_activation": str(checkpoint.config.get("hidden_activation", "gelu")),
    }


def _period(checkpoint: Checkpoint) -> int:
    """Every how many layers one sees the whole text; the first does."""
    n_layers, stated = checkpoint.count("num_hidden_layers"), checkpoint.config.get("layer_types")
    if stated is None:
        keyed = "global_attn_every_n_layers" in checkpoint.config
        return checkpoint.count("global_attn_every_n_layers") if keyed else 3
    for period in range(1, n_layers + 1):
        if stated == [_WINDOW if i % period else _FULL for i in range(n_layers)]:
            return period
    what = f"layer_types has {stated!r:.200}; llama.cpp computes {_FULL} in every n-th layer, from the first"
    raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {what}.")


def _rope_base(checkpoint: Checkpoint, kind: str) -> float:
    key, default = _BASES[kind]
    stated = require_tables_by_kind(checkpoint, _BASES).get(kind) or {}
    if isinstance(stated, dict) and stated.get("rope_theta") is None:
        stated = {**stated, "rope_theta": checkpoint.config.get(key, default)}
    return plain_rope_base(checkpoint, stated)


ARCHITECTURES = {
    "modernbert": Architecture(
        name="modern-bert",
        prefix="model.",
        renames={},
        dropped=re.compile(r"head\..*|decoder\..*|classifier\..*"),
        keys=ConfigKeys(
            carried=SIZES
            | {"norm_eps", "hidden_activation", "local_attention", "layer_types", "global_attn_every_n_layers"}
            | {"rope_parameters", "rope_scaling", "global_rope_theta", "local_rope_theta"},
            required={
                "hidden_activation": ("gelu", "silu"),
                "attention_bias": (False,),
                "mlp_bias": (False,),
                "norm_bias": (False,),
                "is_causal": (None, False),
            },
            classes=frozenset({"ModernBertModel", "ModernBertForMaskedLM"}),
            without_effect=frozenset(
                {"classifier_activation", "classifier_bias", "classifier_pooling", "decoder_bias", "embedding_dropout"}
                | {"mlp_dropout", "initializer_cutoff_factor", "deterministic_flash_attn", "reference_compile"}
                | {"repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index"}
                | {"position_embedding_type", "layer_norm_eps"}  # which no class reads
            ),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class="TokenizersBackend",
        examples="gte-modernbert, modernbert-embed, granite-embedding r2",
        tokenizer_class_is_fixed=True,
        pre_names={"gpt-2": "modern-bert", "gpt-4o": "granite-embed-multi-97m"},
    ),
}
