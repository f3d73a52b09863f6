"""Which tensors a checkpoint must have, what they are called in GGUF, and which facts its header needs.

Names and keys are llama.cpp's (gguf-py, tensor_mapping.py and constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from f2gguf.quantize.checkpoint.folder import Checkpoint, StoredTensor
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A tensor's GGUF name and the shape that config.json implies."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers maps to a GGUF architecture."""

    name: str
    prefixes: tuple[str, ...]  # what some exports put before every tensor name
    renames: Mapping[str, str]  # endings of old exports -> today's
    dropped: re.Pattern[str]  # tensors that give no vector
    required: Mapping[
        str, tuple[Any, ...]
    ]  # config key -> values that llama.cpp computes (missing counts as the first)
    targets: Callable[[Checkpoint], dict[str, Target]]
    facts: Callable[[Checkpoint], dict[str, Any]]  # header keys below "<name>."


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint; `UnsupportedCheckpoint` for one that f2gguf does not convert."""
    kind = checkpoint.model_type
    config_path = checkpoint.folder / "config.json"
    if kind not in ARCHITECTURES:
        raise UnsupportedCheckpoint(
            f"{config_path}: model_type {kind!r} is not supported; {', '.join(ARCHITECTURES)} are."
        )
    architecture = ARCHITECTURES[kind]
    for key, values in architecture.required.items():
        found = checkpoint.config.get(key, values[0])
        if found not in values:
            raise UnsupportedCheckpoint(
                f"{config_path}: {key} is {found!r}; f2gguf converts {kind} with {values[0]!r}."
            )
    return architecture


def match_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, StoredTensor]:
    """GGUF name -> stored tensor, in GGUF order.

    Raises `BrokenCheckpoint` for a tensor that is missing, surplus, or shaped at odds with config.json.
    """
    found = {_plain_name(name, architecture): (name, tensor) for name, tensor in checkpoint.tensors.items()}
    if len(found) < len(checkpoint.tensors):
        raise BrokenCheckpoint(f"{checkpoint.folder}: the weights hold a tensor twice, with and without a prefix.")
    targets = architecture.targets(checkpoint)
    missing = [name for name in targets if name not in found]
    surplus = [name for name in found if name not in targets and not architecture.dropped.fullmatch(name)]
    if missing:
        raise BrokenCheckpoint(f"{checkpoint.folder}: {_listed(missing)} missing from the weights. Fetch it again.")
    if surplus:
        raise BrokenCheckpoint(
            f"{checkpoint.folder}: {_listed(surplus)} in the weights, but no part of a {checkpoint.model_type} with "
            f"{checkpoint.count('num_hidden_layers')} layers."
        )
    matched = {}
    for plain, target in targets.items():
        name, tensor = found[plain]
        if tensor.shape != target.shape:
            raise BrokenCheckpoint(
                f"{tensor.file}: {name} has the shape {tensor.shape}, but config.json implies {target.shape}."
            )
        matched[target.name] = tensor
    return matched


def _plain_name(name: str, architecture: Architecture) -> str:
    for prefix in architecture.prefixes:
        name = name.removeprefix(prefix)
    for old, new in architecture.renames.items():
        if name.endswith(old):
            name = name[: -len(old)] + new
    return name


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"{shown} and {len(names) - 3} more are" if len(names) > 3 else f"{shown} {'is' if len(names) == 1 else 'are'}"
    )


def _qwen3_targets(checkpoint: Checkpoint) -> dict[str, Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_head, n_head_kv = checkpoint.count("num_attention_heads"), checkpoint.count("num_key_value_heads")
    head_dim = _head_dim(checkpoint)
    block = {
        "input_layernorm": ("attn_norm", (n_embd,)),
        "self_attn.q_proj": ("attn_q", (n_head * head_dim, n_embd)),
        "self_attn.q_norm": ("attn_q_norm", (head_dim,)),
        "self_attn.k_proj": ("attn_k", (n_head_kv * head_dim, n_embd)),
        "self_attn.k_norm": ("attn_k_norm", (head_dim,)),
        "self_attn.v_proj": ("attn_v", (n_head_kv * head_dim, n_embd)),
        "self_attn.o_proj": ("attn_output", (n_embd, n_head * head_dim)),
        "post_attention_layernorm": ("ffn_norm", (n_embd,)),
        "mlp.gate_proj": ("ffn_gate", (n_ff, n_embd)),
        "mlp.up_proj": ("ffn_up", (n_ff, n_embd)),
        "mlp.down_proj": ("ffn_down", (n_embd, n_ff)),
    }
    targets = {"embed_tokens.weight": Target("token_embd.weight", (n_vocab, n_embd))}
    for i in range(checkpoint.count("num_hidden_layers")):
        for module, (name, shape) in block.items():
            targets[f"layers.{i}.{module}.weight"] = Target(f"blk.{i}.{name}.weight", shape)
    targets["norm.weight"] = Target("output_norm.weight", (n_embd,))
    return targets


def _qwen3_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    config_path = checkpoint.folder / "config.json"
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UnsupportedCheckpoint(f"{config_path}: RoPE scaling is not supported: {rope!r}.")
    theta = checkpoint.real("rope_theta", rope if "rope_theta" in rope else None)
    return {
        **_shared_facts(checkpoint),
        "attention.head_count_kv": checkpoint.count("num_key_value_heads"),
        "attention.key_length": _head_dim(checkpoint),
        "attention.value_length": _head_dim(checkpoint),
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "rope.freq_base": theta,
    }


def _bert_targets(checkpoint: Checkpoint) -> dict[str, Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    block = {
        "attention.self.query": ("attn_q", (n_embd, n_embd)),
        "attention.self.key": ("attn_k", (n_embd, n_embd)),
        "attention.self.value": ("attn_v", (n_embd, n_embd)),
        "attention.output.dense": ("attn_output", (n_embd, n_embd)),
        "attention.output.LayerNorm": ("attn_output_norm", (n_embd,)),
        "intermediate.dense": ("ffn_up", (n_ff, n_embd)),
        "output.dense": ("ffn_down", (n_embd, n_ff)),
        "output.LayerNorm": ("layer_output_norm", (n_embd,)),
    }
    n_ctx, n_types = checkpoint.count("max_position_embeddings"), checkpoint.count("type_vocab_size")
    targets = {
        "embeddings.word_embeddings.weight": Target("token_embd.weight", (n_vocab, n_embd)),
        "embeddings.position_embeddings.weight": Target("position_embd.weight", (n_ctx, n_embd)),
        "embeddings.token_type_embeddings.weight": Target("token_types.weight", (n_types, n_embd)),
        "embeddings.LayerNorm.weight": Target("token_embd_norm.weight", (n_embd,)),
        "embeddings.LayerNorm.bias": Target("token_embd_norm.bias", (n_embd,)),
    }
    for i in range(checkpoint.count("num_hidden_layers")):
        for module, (name, shape) in block.items():
            targets[f"encoder.layer.{i}.{module}.weight"] = Target(f"blk.{i}.{name}.weight", shape)
            targets[f"encoder.layer.{i}.{module}.bias"] = Target(f"blk.{i}.{name}.bias", shape[:1])
    return targets


def _bert_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    _head_dim(checkpoint)  # llama.cpp divides the width among the heads by itself
    return {
        **_shared_facts(checkpoint),
        "attention.layer_norm_epsilon": checkpoint.real("layer_norm_eps"),
        "attention.causal": False,
    }


def _shared_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "block_count": checkpoint.count("num_hidden_layers"),
        "context_length": checkpoint.count("max_position_embeddings"),
        "embedding_length": checkpoint.count("hidden_size"),
        "feed_forward_length": checkpoint.count("intermediate_size"),
        "attention.head_count": checkpoint.count("num_attention_heads"),
    }


def _head_dim(checkpoint: Checkpoint) -> int:
    if checkpoint.config.get("head_dim") is not None:
        return checkpoint.count("head_dim")
    n_embd, n_head = checkpoint.count("hidden_size"), checkpoint.count("num_attention_heads")
    if n_embd % n_head:
        raise BrokenCheckpoint(
            f"{checkpoint.folder / 'config.json'}: {n_head} heads do not divide hidden_size {n_embd}."
        )
    return n_embd // n_head


ARCHITECTURES = {
    "qwen3": Architecture(
        name="qwen3",
        prefixes=("model.",),
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
        required={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
        targets=_qwen3_targets,
        facts=_qwen3_facts,
    ),
    "bert": Architecture(
        name="bert",
        prefixes=("bert.",),
        renames={".gamma": ".weight", ".beta": ".bias"},
        dropped=re.compile(r"embeddings\.position_ids|pooler\..*|cls\..*"),
        required={"hidden_act": ("gelu",), "position_embedding_type": ("absolute", None)},
        targets=_bert_targets,
        facts=_bert_facts,
    ),
}
