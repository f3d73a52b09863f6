"""What one family is to a conversion, and what most families state alike.

Names and keys are those of llama.cpp (gguf-py, tensor_mapping.py and constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN
from f2gguf.quantize.checkpoint.transforms import Transform, as_stored
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

Shape = tuple[int, ...]
SIZES = frozenset(
    {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
    | {"max_position_embeddings"}
)


@dataclass(frozen=True)
class Target:
    """One tensor of the file, and the stored one that it is made from; several may be parts of one stored tensor."""

    stored: str  # its name in the checkpoint
    name: str  # its name in GGUF
    shape: Shape  # of the stored tensor, as config.json implies it
    transform: Transform = as_stored  # from the stored tensor to the written one


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` of transformers becomes a GGUF architecture."""

    name: str
    prefix: str  # some exports put it before every tensor name
    renames: Mapping[str, str]  # ending of a name in old exports -> today's ending
    dropped: re.Pattern[str]  # tensors that no vector depends on
    keys: ConfigKeys  # what config.json may say
    targets: Callable[[Checkpoint], list[Target]]  # in GGUF order
    facts: Callable[[Checkpoint], dict[str, Any]]  # header keys below "<name>."
    tokenizer_class: str  # the class of transformers that builds the tokenizer where no file names one
    tokenizer_class_is_fixed: bool = False  # transformers takes no other class, whatever the files name
    examples: str = ""  # models of this type that people know
    pre_names: Mapping[str, str] = field(default_factory=dict)  # split -> what llama.cpp calls it for this family
    tokenizer_facts: Callable[[Checkpoint], dict[str, Any]] = lambda _: {}  # header keys below "tokenizer.ggml."
    name_of: Callable[[Checkpoint], str] | None = None  # for a type that is one of several GGUF architectures
    takes_dense: tuple[str, ...] = ()  # those of them that apply Dense modules to what they pooled
    fits_f16: bool = True  # whether all that enters its matrices stays below F16's 65504


def with_bias(stored: str, name: str, shape: Shape, transform: Transform = as_stored) -> list[Target]:
    """The targets of a module's weight and of its bias, which has a value for each row of the weight."""
    return [
        Target(f"{stored}.weight", f"{name}.weight", shape, transform),
        Target(f"{stored}.bias", f"{name}.bias", shape[:1], transform),
    ]


def in_every_layer(checkpoint: Checkpoint, prefix: str, block: Iterable[Target]) -> list[Target]:
    """The targets of `block` in every layer N: stored as `prefix`N.*, written as blk.N.*"""
    return [
        Target(f"{prefix}{i}.{target.stored}", f"blk.{i}.{target.name}", target.shape, target.transform)
        for i in range(checkpoint.count("num_hidden_layers"))
        for target in block
    ]


def pre_norm_targets(checkpoint: Checkpoint, projections: Iterable[Target], width: int) -> list[Target]:
    """The tensors of a model with an RMS norm before each part and SwiGLU; `projections` make its heads of `width`."""
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    block = [
        Target("input_layernorm.weight", "attn_norm.weight", (n_embd,)),
        *projections,
        Target(
            "self_attn.o_proj.weight", "attn_output.weight", (n_embd, checkpoint.count("num_attention_heads") * width)
        ),
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


def dense_targets(checkpoint: Checkpoint) -> list[Target]:
    """The matrices of the Dense modules behind the pooling."""
    return [
        Target(f"{dense.path}.linear.weight", f"dense_{i}.weight", (dense.n_out, dense.n_in))
        for i, dense in enumerate(checkpoint.modules.dense, start=2)
    ]


def dense_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Their header keys. Raises `BrokenCheckpoint` where widths do not fit, `UnsupportedCheckpoint` for another one."""
    facts: dict[str, Any] = {}
    width, path = checkpoint.count("hidden_size"), checkpoint.root
    for i, dense in enumerate(checkpoint.modules.dense, start=2):
        if dense.n_in != width:
            words = f"in_features is {dense.n_in}, and what comes before gives {width}"
            raise BrokenCheckpoint(f"{path / dense.path / 'config.json'}: {words}. {FETCH_AGAIN}")
        facts |= {f"dense_{i}_feat_in": dense.n_in, f"dense_{i}_feat_out": dense.n_out}
        width = dense.n_out
    if width != (n_embd := checkpoint.count("hidden_size")):
        words = f"the last Dense module gives vectors of width {width}; llama.cpp gives the model's own {n_embd} alone"
        raise UnsupportedCheckpoint(f"{path / 'modules.json'}: {words}.")
    return facts


def shared_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header keys of sizes, for a config.json that calls them as most do."""
    return {
        "block_count": checkpoint.count("num_hidden_layers"),
        "context_length": checkpoint.count("max_position_embeddings"),
        "embedding_length": checkpoint.count("hidden_size"),
        "feed_forward_length": checkpoint.count("intermediate_size"),
        "attention.head_count": checkpoint.count("num_attention_heads"),
    }


def require_tables_by_kind(checkpoint: Checkpoint, kinds: Collection[str]) -> Mapping[str, Any]:
    """RoPE's tables of `rope_parameters` by kind of layer. Raises `UnsupportedCheckpoint` for others."""
    tables = checkpoint.config.get("rope_parameters") or {}
    if not isinstance(tables, dict) or tables.keys() - {*kinds}:
        known = " and ".join(kinds)
        words = f"rope_parameters is {tables!r:.200}; {known} are supported"
        raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: {words}.")
    return tables


def head_dim(checkpoint: Checkpoint, *, default: int | None = None) -> int:
    """Width of a head; `default` is that of transformers where the configuration leaves it out."""
    if default:
        return checkpoint.count("head_dim") if "head_dim" in checkpoint.config else default
    n_embd, n_head = checkpoint.count("hidden_size"), checkpoint.count("num_attention_heads")
    if n_embd % n_head:
        raise BrokenCheckpoint(f"{checkpoint.folder}/config.json: {n_head} heads do not divide hidden_size {n_embd}.")
    return n_embd // n_head


def plain_rope_base(checkpoint: Checkpoint, rope: Any = None) -> float:
    """The base of RoPE's frequencies: of `rope`, a part of config.json, or of where most families state it.

    Raises `UnsupportedCheckpoint` for positions that are scaled.
    """
    config = checkpoint.config
    rope = rope or config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers takes the first
    plain = {"rope_type": "default", "type": "default", "rope_theta": None}
    if not isinstance(rope, dict) or any(plain.get(key, ...) not in (None, value) for key, value in rope.items()):
        raise UnsupportedCheckpoint(f"{checkpoint.folder / 'config.json'}: RoPE scaling is not supported: {rope!r}.")
    return checkpoint.real("rope_theta", rope if "rope_theta" in rope else None)
