"""Qwen2 and Qwen3: RMS norms before each part, RoPE, SwiGLU. Qwen3 has norms of queries and keys, Qwen2 has biases."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Shape,
    Target,
    head_dim,
    plain_rope_base,
    pre_norm_targets,
    shared_facts,
    with_bias,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

_QWEN3_HEAD_DIM = 128  # transformers' default; that of Qwen2 is what the heads leave of hidden_size


def _targets(checkpoint: Checkpoint, *, default_head_dim: int | None) -> list[Target]:
    n_embd = checkpoint.count("hidden_size")
    n_head, n_head_kv = checkpoint.count("num_attention_heads"), checkpoint.count("num_key_value_heads")
    width = head_dim(checkpoint, default=default_head_dim)
    query, value = (n_head * width, n_embd), (n_head_kv * width, n_embd)
    projections = [
        *with_bias("self_attn.q_proj", "attn_q", query),
        *with_bias("self_attn.k_proj", "attn_k", value),
        *with_bias("self_attn.v_proj", "attn_v", value),
    ]
    if default_head_dim:
        projections = [
            *_with_norm("self_attn.q", "attn_q", query, width),
            *_with_norm("self_attn.k", "attn_k", value, width),
            Target("self_attn.v_proj.weight", "attn_v.weight", value),
        ]
    return pre_norm_targets(checkpoint, projections, width)


def _with_norm(stored: str, name: str, shape: Shape, width: int) -> list[Target]:
    return [
        Target(f"{stored}_proj.weight", f"{name}.weight", shape),
        Target(f"{stored}_norm.weight", f"{name}_norm.weight", (width,)),
    ]


def _facts(checkpoint: Checkpoint, *, default_head_dim: int | None) -> dict[str, Any]:
    config, config_path = checkpoint.config, checkpoint.folder / "config.json"
    layers = config.get("layer_types") or []  # F2LLM-v2-80M lists more than it has
    if any(layer != "full_attention" for layer in layers):
        raise UnsupportedCheckpoint(f"{config_path}: layer_types has {layers}; only full_attention is supported.")
    if type(is_causal := config.get("is_causal", True)) is not bool:
        raise BrokenCheckpoint(f"{config_path}: is_causal is {is_causal!r}, which is not true or false.")
    width = head_dim(checkpoint, default=default_head_dim)
    if not default_head_dim and config.get("head_dim", width) != width:
        stated = f"head_dim is {config['head_dim']}"
        raise UnsupportedCheckpoint(f"{config_path}: {stated}; llama.cpp divides hidden_size among the heads.")
    return {
        **shared_facts(checkpoint),
        "attention.head_count_kv": checkpoint.count("num_key_value_heads"),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "rope.freq_base": plain_rope_base(checkpoint),
        **({} if is_causal else {"attention.causal": False}),
    }


def _architecture(name: str, *, examples: str, default_head_dim: int | None, keys: ConfigKeys) -> Architecture:
    return Architecture(
        name=name,
        prefix="model.",
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
        keys=keys,
        targets=partial(_targets, default_head_dim=default_head_dim),
        facts=partial(_facts, default_head_dim=default_head_dim),
        tokenizer_class="Qwen2Tokenizer",
        tokenizer_class_is_fixed=name == "qwen2",
        examples=examples,
    )


_CARRIED = (
    SIZES
    | {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}
    | {"layer_types", "is_causal"}
    | {"sliding_window", "max_window_layers"}  # of no effect without use_sliding_window
)
_REQUIRED = {"hidden_act": ("silu",), "use_sliding_window": (False, None)}
ARCHITECTURES = {
    "qwen3": _architecture(
        "qwen3",
        examples="F2LLM-v2, Qwen3-Embedding, harrier-oss-v1-0.6b",
        default_head_dim=_QWEN3_HEAD_DIM,
        keys=ConfigKeys(
            carried=_CARRIED,
            required={**_REQUIRED, "attention_bias": (False,)},
            classes=frozenset({"Qwen3Model", "Qwen3ForCausalLM"}),
        ),
    ),
    "qwen2": _architecture(
        "qwen2",
        examples="gte-Qwen2, jina-code-embeddings, KaLM-embedding-mini",
        default_head_dim=None,
        keys=ConfigKeys(
            carried=_CARRIED,
            required=_REQUIRED,
            classes=frozenset({"Qwen2Model", "Qwen2ForCausalLM"}),
            # gte-Qwen2's, which attends both ways: as is_causal says to transformers' own class. Its tokenizer closes
            # texts, as tokenizer.json does, or lock and user must say
            own_code={"modeling_qwen": ("is_causal",), "tokenization_qwen": ()},
        ),
    ),
}
