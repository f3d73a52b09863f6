"""Llama and Mistral, as transformers computes them: RMS norms before each part, RoPE, SwiGLU.

llama.cpp's architecture `llama` turns neighbouring values of a head, and transformers those half a head apart, so that
rows of queries and keys change their order. It knows no window: a Mistral is right up to its window's length.
"""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    head_dim,
    plain_rope_base,
    pre_norm_targets,
    shared_facts,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.transforms import interleave_halves
from f2gguf.runtime.errors import BrokenCheckpoint

_KEYS = {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}


def _name(checkpoint: Checkpoint) -> str:
    """Attention both ways is an architecture of its own, which keeps no memory of earlier tokens."""
    return "llama-embed" if checkpoint.config.get("is_causal") is False else "llama"


def _width(checkpoint: Checkpoint) -> int:
    stated = checkpoint.config.get("head_dim")
    return head_dim(checkpoint) if stated is None else checkpoint.count("head_dim")


def _targets(checkpoint: Checkpoint) -> list[Target]:
    n_embd, n_head, n_head_kv = (
        checkpoint.count("hidden_size"),
        checkpoint.count("num_attention_heads"),
        _n_head_kv(checkpoint),
    )
    width = _width(checkpoint)
    projections = [
        Target("self_attn.q_proj.weight", "attn_q.weight", (n_head * width, n_embd), interleave_halves(n_head)),
        Target("self_attn.k_proj.weight", "attn_k.weight", (n_head_kv * width, n_embd), interleave_halves(n_head_kv)),
        Target("self_attn.v_proj.weight", "attn_v.weight", (n_head_kv * width, n_embd)),
    ]
    return pre_norm_targets(checkpoint, projections, width)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config, config_path = checkpoint.config, checkpoint.folder / "config.json"
    if type(is_causal := config.get("is_causal", True)) is not bool:
        raise BrokenCheckpoint(f"{config_path}: is_causal is {is_causal!r}, which is not true or false.")
    width, shared = _width(checkpoint), shared_facts(checkpoint)
    if checkpoint.model_type == "mistral" and config.get("sliding_window", 4096) is not None:
        shared["context_length"] = min(shared["context_length"], _window(checkpoint))
    return {
        **shared,
        "attention.head_count_kv": _n_head_kv(checkpoint),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "rope.dimension_count": width,
        "rope.freq_base": plain_rope_base(checkpoint),
        **({} if is_causal else {"attention.causal": False}),
    }


def _n_head_kv(checkpoint: Checkpoint) -> int:
    key = "num_key_value_heads"
    return checkpoint.count(key if checkpoint.config.get(key) is not None else "num_attention_heads")


def _window(checkpoint: Checkpoint) -> int:
    """The longest text in which no token is out of another's sight."""
    return checkpoint.count("sliding_window") if "sliding_window" in checkpoint.config else 4096


def _architecture(
    classes: set[str], carried: set[str], required: dict[str, tuple[Any, ...]], *, is_fixed: bool, examples: str
) -> Architecture:
    return Architecture(
        name="llama",
        name_of=_name,
        prefix="model.",
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
        keys=ConfigKeys(
            carried=SIZES | _KEYS | {"is_causal"} | carried,
            required={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), **required},
            classes=frozenset(classes),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class="TokenizersBackend",
        tokenizer_class_is_fixed=is_fixed,
        examples=examples,
    )


ARCHITECTURES = {
    "llama": _architecture(
        {"LlamaModel", "LlamaForCausalLM"}, set(), {}, is_fixed=False, examples="tunes of Llama without RoPE scaling"
    ),
    "mistral": _architecture(
        {"MistralModel", "MistralForCausalLM"},
        {"sliding_window"},
        {"layer_types": (None,)},
        is_fixed=True,
        examples="E5-mistral, SFR-Embedding-Mistral, Linq-Embed-Mistral",
    ),
}
