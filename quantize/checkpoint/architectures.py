"""The tensors that a checkpoint must have, their names in GGUF, and the facts that its header needs.

Names and keys are those of llama.cpp (gguf-py, tensor_mapping.py and constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from f2gguf.quantize.checkpoint.config_keys import ConfigKeys, require_known_keys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.weights import StoredTensor
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

Target = tuple[str, tuple[int, ...]]  # a tensor's name in GGUF, and the shape that config.json implies


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers becomes a GGUF architecture."""

    name: str
    prefix: str  # some exports put it before every tensor name
    renames: Mapping[str, str]  # ending of a name in old exports -> today's ending
    dropped: re.Pattern[str]  # tensors that no vector depends on
    keys: ConfigKeys  # what config.json may say
    targets: Callable[[Checkpoint], dict[str, Target]]
    facts: Callable[[Checkpoint], dict[str, Any]]  # header keys below "<name>."


def architecture_of(checkpoint: Checkpoint, allowed_keys: Collection[str] = ()) -> Architecture:
    """The architecture of a checkpoint. Raises `UnsupportedCheckpoint` for one that f2gguf does not convert.

    `allowed_keys` are keys of config.json that the user says are without effect.
    """
    kind, config_path = checkpoint.model_type, checkpoint.folder / "config.json"
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedCheckpoint(f"{config_path}: model_type {kind!r} is not supported; {known} are.")
    require_known_keys(config_path, checkpoint.config, ARCHITECTURES[kind].keys, allowed_keys)
    return ARCHITECTURES[kind]


def match_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, StoredTensor]:
    """GGUF name -> stored tensor, in GGUF order.

    Raises `BrokenCheckpoint` for a tensor that is missing, surplus, or not of the shape that config.json implies.
    """
    stored = {_plain_name(name, architecture): (name, tensor) for name, tensor in checkpoint.tensors.items()}
    if len(stored) < len(checkpoint.tensors):
        raise BrokenCheckpoint(f"{checkpoint.folder}: the weights hold a tensor twice, with and without a prefix.")
    targets = architecture.targets(checkpoint)
    if missing := [name for name in targets if name not in stored]:
        raise BrokenCheckpoint(f"{checkpoint.folder}: {_listed(missing)} missing from the weights. Fetch it again.")
    if surplus := [name for name in stored if name not in targets and not architecture.dropped.fullmatch(name)]:
        model = f"a {checkpoint.model_type} with {checkpoint.count('num_hidden_layers')} layers"
        raise BrokenCheckpoint(f"{checkpoint.folder}: {_listed(surplus)} in the weights, but no part of {model}.")
    for plain, (_, shape) in targets.items():
        name, tensor = stored[plain]
        if tensor.shape != shape:
            implied = f"config.json implies {shape}"
            raise BrokenCheckpoint(f"{tensor.file}: {name} has the shape {tensor.shape}, but {implied}.")
    return {gguf_name: stored[plain][1] for plain, (gguf_name, _) in targets.items()}


def _plain_name(name: str, architecture: Architecture) -> str:
    name = name.removeprefix(architecture.prefix)
    for old, new in architecture.renames.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _listed(names: list[str]) -> str:
    shown, more = ", ".join(names[:3]), len(names) - 3
    return f"{shown} and {more} more are" if more > 0 else f"{shown} {'is' if len(names) == 1 else 'are'}"


def _qwen3_targets(checkpoint: Checkpoint) -> dict[str, Target]:
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_head, n_head_kv = checkpoint.count("num_attention_heads"), checkpoint.count("num_key_value_heads")
    head_dim = _head_dim(checkpoint, default=128)
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
    targets: dict[str, Target] = {"embed_tokens.weight": ("token_embd.weight", (n_vocab, n_embd))}
    for i in range(checkpoint.count("num_hidden_layers")):
        for module, (name, shape) in block.items():
            targets[f"layers.{i}.{module}.weight"] = f"blk.{i}.{name}.weight", shape
    targets["norm.weight"] = "output_norm.weight", (n_embd,)
    return targets


def _qwen3_facts(checkpoint: Checkpoint) -> dict[str, Any]:
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
    head_dim = _head_dim(checkpoint, default=128)
    return {
        **_shared_facts(checkpoint),
        "attention.head_count_kv": checkpoint.count("num_key_value_heads"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": checkpoint.real("rms_norm_eps"),
        "rope.freq_base": checkpoint.real("rope_theta", rope if "rope_theta" in rope else None),
        **({} if is_causal else {"attention.causal": False}),
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
    targets: dict[str, Target] = {
        "embeddings.word_embeddings.weight": ("token_embd.weight", (n_vocab, n_embd)),
        "embeddings.position_embeddings.weight": ("position_embd.weight", (n_ctx, n_embd)),
        "embeddings.token_type_embeddings.weight": ("token_types.weight", (n_types, n_embd)),
        "embeddings.LayerNorm.weight": ("token_embd_norm.weight", (n_embd,)),
        "embeddings.LayerNorm.bias": ("token_embd_norm.bias", (n_embd,)),
    }
    for i in range(checkpoint.count("num_hidden_layers")):
        for module, (name, shape) in block.items():
            targets[f"encoder.layer.{i}.{module}.weight"] = f"blk.{i}.{name}.weight", shape
            targets[f"encoder.layer.{i}.{module}.bias"] = f"blk.{i}.{name}.bias", shape[:1]
    return targets


def _bert_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    _head_dim(checkpoint)  # checked only: llama.cpp divides the width among the heads
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


def _head_dim(checkpoint: Checkpoint, *, default: int | None = None) -> int:
    """Width of a head; `default` is that of transformers where the configuration leaves it out."""
    if default:
        return checkpoint.count("head_dim") if "head_dim" in checkpoint.config else default
    n_embd, n_head = checkpoint.count("hidden_size"), checkpoint.count("num_attention_heads")
    if n_embd % n_head:
        raise BrokenCheckpoint(f"{checkpoint.folder}/config.json: {n_head} heads do not divide hidden_size {n_embd}.")
    return n_embd // n_head


_SIZES = frozenset(
    {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    | {"max_position_embeddings"}
)
ARCHITECTURES = {
    "qwen3": Architecture(
        name="qwen3",
        prefix="model.",
        renames={},
        dropped=re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq"),
        keys=ConfigKeys(
            carried=_SIZES
            | {"num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"}
            | {"layer_types", "is_causal"}
            | {"sliding_window", "max_window_layers"},  # of no effect without use_sliding_window
            required={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False, None)},
            classes=frozenset({"Qwen3Model", "Qwen3ForCausalLM"}),
        ),
        targets=_qwen3_targets,
        facts=_qwen3_facts,
    ),
    "bert": Architecture(
        name="bert",
        prefix="bert.",
        renames={".gamma": ".weight", ".beta": ".bias"},
        dropped=re.compile(r"embeddings\.position_ids|pooler\..*|cls\..*"),
        keys=ConfigKeys(
            carried=_SIZES | {"type_vocab_size", "layer_norm_eps"},
            required={
                "hidden_act": ("gelu",),
                "position_embedding_type": ("absolute", None),
                "is_causal": (None, False),
            },
            classes=frozenset({"BertModel", "BertForMaskedLM", "BertForPreTraining"}),
        ),
        targets=_bert_targets,
        facts=_bert_facts,
    ),
}
