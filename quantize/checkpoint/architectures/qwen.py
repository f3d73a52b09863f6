"""Qwen3, as transformers computes it: RMS norms before each part, norms of queries and keys, RoPE."""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    head_dim,
    in_every_layer,
    shared_facts,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint


def _targets(checkpoint: Checkpoint) -> list[Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_head, n_head_kv = checkpoint.count("num_attention_heads"), checkpoint.count("num_key_value_heads")
    width = head_dim(checkpoint, default=128)
    block = [
        Target("input_layernorm.weight", "attn_norm.weight", (n_embd,)),
        Target("self_attn.q_proj.weight", "attn_q.weight", (n_head * width, n_embd)),
        Target("self_attn.q_norm.weight", "attn_q_norm.weight", (width,)),
        Target("self_attn.k_proj.weight", "attn_k.weight", (n_head_kv * width, n_embd)),
        Target("self_attn.k_norm.weight", "attn_k_norm.weight", (width,)),
        Target("self_attn.v_proj.weight", "attn_v.weight", (n_head_kv * width, n_embd)),
        Target("self_attn.o_proj.weight", "attn_output.weight", (n_embd, n_head * width)),
        Target("post_attention_layernorm.weight", "ffn_norm.weight", (n_embd,)),
        Target("mlp.gate_proj.weight", "ffn_gate.weight", (n_ff, n_embd)),
        Target("mlp.up_proj.weight", "ffn_up.weight", (n_ff, n_embd)),
        Target("mlp.down_proj.weight", "ffn_down.weight", (n_embd, n_ff)),
    ]
    return [
        Target("embed_tokens.weight", "token_embd.weight", (n_vocab, n_embd)),
        *in_every_layer(checkpoint, "layers.", block),
        Target("norm.weight", "output_norm.weight", (n_embd,)),
    ]


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config, config_path = checkpoint.config, checkpoint.folder / "config.json"
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers takes the first
    plain = {"rope_type": "default", "type": "default", "rope_theta": None}
    if not isinstance(rope, dict) or any(plain.get(key, ...) not in (None, value) for key, value in rope.items()):
        raise UnsupportedCheckpoint(f"{config_path}: RoPE scaling is not supported: {rope!r}.")
    layers = config.get("layer_types") or []  # F2LLM-v2-80M lists more than it has
    if any(layer != "full_attention" for layer in layers):
        raise UnsupportedCheckpoint(f"{config_path}: layer_types has {layers}; only full_attention is supported.")
    if type(is_causal := config.get("is_causal", True)) is not bool:
        raise BrokenCheckpoint(f"{config_path}: is_causal is {is_causal!r}, which is not true or false.")
    width = head_dim(checkpoint, default=128)
    return {
        **shared_facts(checkpoint),
        "attention.head_count_kv": checkpoint.count("num_key_value_heads"),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "rope.freq_base": checkpoint.real("rope_theta", rope if "rope_theta" in rope else None),
        **({} if is_causal else {"attention.causal": False}),
    }


ARCHITECTURES = {
    "qwen3": Architecture(
        name="qwen3",
        prefix="model.",
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
        keys=ConfigKeys(
            carried=SIZES
            | {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}
            | {"layer_types", "is_causal"}
            | {"sliding_window", "max_window_layers"},  # of no effect without use_sliding_window
            required={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False, None)},
            classes=frozenset({"Qwen3Model", "Qwen3ForCausalLM"}),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class="Qwen2Tokenizer",
    ),
}
