"""Gemma 3, as transformers computes it: norms that are stored less 1, norms around both parts, windows, GELU.

A checkpoint that says `use_bidirectional_attention` (EmbeddingGemma) is llama.cpp's gemma-embedding, which has Dense
modules too; all others see backwards alone, and are its gemma3. llama.cpp's own converter makes gemma-embedding of
both.
"""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    dense_facts,
    dense_targets,
    head_dim,
    in_every_layer,
    require_tables_by_kind,
    shared_facts,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.transforms import add
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

BOTH_WAYS, CAUSAL = "gemma-embedding", "gemma3"
_USUAL_PATTERN = 6  # every 6th layer sees the whole text
_LAYERS_OF_27B = 62  # by which llama.cpp tells the one size that scales its queries otherwise
_BASES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


def _name(checkpoint: Checkpoint) -> str:
    if (stated := checkpoint.config.get("use_bidirectional_attention")) not in (True, False, None):
        words = f"use_bidirectional_attention is {stated!r}, which is not true or false"
        raise BrokenCheckpoint(f"{checkpoint.folder / 'config.json'}: {words}.")
    return BOTH_WAYS if stated else CAUSAL


def _targets(checkpoint: Checkpoint) -> list[Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_head, n_head_kv = checkpoint.count("num_attention_heads"), checkpoint.count("num_key_value_heads")
    width = head_dim(checkpoint, default=256)
    block = [
        Target("input_layernorm.weight", "attn_norm.weight", (n_embd,), add(1)),
        Target("self_attn.q_proj.weight", "attn_q.weight", (n_head * width, n_embd)),
        Target("self_attn.q_norm.weight", "attn_q_norm.weight", (width,), add(1)),
        Target("self_attn.k_proj.weight", "attn_k.weight", (n_head_kv * width, n_embd)),
        Target("self_attn.k_norm.weight", "attn_k_norm.weight", (width,), add(1)),
        Target("self_attn.v_proj.weight", "attn_v.weight", (n_head_kv * width, n_embd)),
        Target("self_attn.o_proj.weight", "attn_output.weight", (n_embd, n_head * width)),
        Target("post_attention_layernorm.weight", "post_attention_norm.weight", (n_embd,), add(1)),
        Target("pre_feedforward_layernorm.weight", "ffn_norm.weight", (n_embd,), add(1)),
        Target("mlp.gate_proj.weight", "ffn_gate.weight", (n_ff, n_embd)),
        Target("mlp.up_proj.weight", "ffn_up.weight", (n_ff, n_embd)),
        Target("mlp.down_proj.weight", "ffn_down.weight", (n_embd, n_ff)),
        Target("post_feedforward_layernorm.weight", "post_ffw_norm.weight", (n_embd,), add(1)),
    ]
    return [
        Target("embed_tokens.weight", "token_embd.weight", (n_vocab, n_embd)),
        *in_every_layer(checkpoint, "layers.", block),
        Target("norm.weight", "output_norm.weight", (n_embd,), add(1)),
        *dense_targets(checkpoint),
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    width = head_dim(checkpoint, default=256)
    _require_scale(checkpoint, width)
    return {
        **shared_facts(checkpoint),
        "attention.head_count_kv": checkpoint.count("num_key_value_heads"),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "attention.sliding_window": _window(checkpoint),
        "attention.sliding_window_pattern": _pattern(checkpoint),
        "rope.freq_base": _rope_base(checkpoint, "full_attention"),
        "rope.freq_base_swa": _rope_base(checkpoint, "sliding_attention"),
        **({"attention.causal": False} if _name(checkpoint) == BOTH_WAYS else {}),
        **dense_facts(checkpoint),
    }


def _require_scale(checkpoint: Checkpoint, width: int) -> None:
    """llama.cpp reads no scale of the queries: it is 1 / sqrt(head_dim), but for the 27B."""
    is_27b = checkpoint.count("num_hidden_layers") == _LAYERS_OF_27B and _name(checkpoint) == CAUSAL
    right = checkpoint.count("hidden_size") // checkpoint.count("num_attention_heads") if is_27b else width
    if (scalar := checkpoint.config.get("query_pre_attn_scalar", 256)) != right:
        words = f"query_pre_attn_scalar is {scalar!r}; llama.cpp computes such a model with {right}"
        raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {words}.")


def _window(checkpoint: Checkpoint) -> int:
    """Tokens that a layer with a window sees: back to that many, or half of them to each side.

    transformers halves the number of a model that sees both ways (512 to 257) when it reads it, and some releases saved
    what they had in memory. A window of 256 to each side is stated as an even number.
    """
    window = checkpoint.count("sliding_window")
    if _name(checkpoint) == BOTH_WAYS and window % 2:
        words = f"sliding_window is {window}, which transformers saved after halving it: {2 * (window - 1)} was meant"
        raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {words}. Correct the number.")
    return window


def _pattern(checkpoint: Checkpoint) -> int:
    """N where every Nth layer sees the whole text."""
    config, n_layers = checkpoint.config, checkpoint.count("num_hidden_layers")
    stated = config.get("sliding_window_pattern", _USUAL_PATTERN)
    layers = config.get("layer_types")
    for n in (stated, *range(1, n_layers + 1)):
        usual = ["full_attention" if n and (i + 1) % n == 0 else "sliding_attention" for i in range(n_layers)]
        if type(n) is int and n > 0 and layers in (None, usual):
            return n
    words = f"layer_types has {layers}; llama.cpp has every Nth layer of {n_layers} see the whole text"
    raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {words}.")


def _rope_base(checkpoint: Checkpoint, kind: str) -> float:
    """The base of RoPE in layers of a kind. Later configurations state it in `rope_parameters`, by kind."""
    config, path = checkpoint.config, checkpoint.folder / "config.json"
    key, default = _BASES[kind]
    scaling, table = config.get("rope_scaling") or {}, require_tables_by_kind(checkpoint, _BASES).get(kind) or {}
    for stated, plain in ((scaling, {}), (table, {"rope_theta": ...})):
        known = {"rope_type": "default", "type": "default", **plain}
        if not isinstance(stated, dict) or any(known.get(name) not in (value, ...) for name, value in stated.items()):
            raise UnsupportedCheckpoint(f"{path}: RoPE scaling is not supported: {stated!r}.")
    if table.get("rope_theta") is not None:
        return checkpoint.real("rope_theta", table)
    return checkpoint.real(key) if config.get(key) is not None else default


ARCHITECTURES = {
    "gemma3_text": Architecture(
        name=BOTH_WAYS,
        name_of=_name,
        takes_dense=(BOTH_WAYS,),
        prefix="model.",
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\..*inv_freq"),
        keys=ConfigKeys(
            carried=SIZES
            | {"num_key_value_heads", "head_dim", "rms_norm_eps", "query_pre_attn_scalar"}
            | {"rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"}
            | {"layer_types", "sliding_window", "sliding_window_pattern", "use_bidirectional_attention"}
            | {"_sliding_window_pattern", "final_logit_softcapping"},  # of no effect on a vector
            required={
                "hidden_activation": ("gelu_pytorch_tanh",),
                "attention_bias": (False,),
                "attn_logit_softcapping": (None,),
                "is_causal": (None, True),
            },
            classes=frozenset({"Gemma3TextModel", "Gemma3ForCausalLM"}),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class="GemmaTokenizer",
        examples="EmbeddingGemma 300M, harrier-oss-v1-270m",
        fits_f16=False,  # as the cards of the models say
    ),
}
