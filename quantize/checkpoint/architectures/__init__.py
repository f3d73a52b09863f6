"""The families that f2gguf converts, one file each: the tensors that a checkpoint must have, and what its header needs.

Every file of this folder but shared.py states `ARCHITECTURES`, by the `model_type` of transformers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

from f2gguf.quantize.checkpoint.architectures.shared import Architecture
from f2gguf.quantize.checkpoint.config_keys import require_known_keys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.weights import StoredTensor
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

_DTYPES = ("BF16", "F16", "F32")  # of tensors that can be converted
_FILES = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__) if file.name != "shared"]
ARCHITECTURES: dict[str, Architecture] = {kind: one for file in _FILES for kind, one in file.ARCHITECTURES.items()}

# model_type -> why stock llama.cpp (of llama-cpp-python 0.3.36) cannot run it
REFUSED = {
    "mpnet": "llama.cpp has no MPNet, whose attention adds a learned bias for every distance",
    "new": "llama.cpp has no 'NewModel', of gte v1.5, gte-multilingual and arctic-embed-m-v2.0",
    "gte": "llama.cpp has no 'NewModel', of gte v1.5, gte-multilingual and arctic-embed-m-v2.0",
    "embedding_gemma2": "llama.cpp has it since 2026-10-06, and llama-cpp-python 0.3.36 is older",
    "deberta": "llama.cpp has no DeBERTa, whose attention takes content and distance apart",
    "deberta-v2": "llama.cpp has no DeBERTa, whose attention takes content and distance apart",
    "nvembed": "llama.cpp has no NV-Embed, which pools by attention to latent vectors",
    "c2llm": "llama.cpp has no C2LLM, which pools by attention (PMA)",
}


def architecture_of(checkpoint: Checkpoint, allowed_keys: Collection[str] = ()) -> Architecture:
    """The architecture of a checkpoint. Raises `UnsupportedCheckpoint` for one that f2gguf does not convert, and why.

    `allowed_keys` are keys of config.json that the user says are without effect.
    """
    kind, config_path = checkpoint.model_type, checkpoint.folder / "config.json"
    if why := REFUSED.get(kind):
        raise UnsupportedCheckpoint(f"{config_path}: model_type {kind!r} cannot be converted: {why}.")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedCheckpoint(f"{config_path}: model_type {kind!r} is not supported; {known} are.")
    architecture = ARCHITECTURES[kind]
    require_known_keys(config_path, checkpoint.config, architecture.keys, allowed_keys)
    if architecture.name_of:
        architecture = replace(architecture, name=architecture.name_of(checkpoint))
    if checkpoint.modules.dense and architecture.name not in architecture.takes_dense:
        words = f"has Dense modules, which llama.cpp does not compute for its architecture {architecture.name}"
        raise UnsupportedCheckpoint(f"{checkpoint.root / 'modules.json'}: {words}.")
    return architecture


def match_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, StoredTensor]:
    """GGUF name -> the tensor to write, in GGUF order.

    Raises `BrokenCheckpoint` for a tensor that is missing, surplus, or not of the shape that config.json implies, and
    `UnsupportedCheckpoint` for one of another type.
    """
    stored = {_plain_name(name, architecture): (name, tensor) for name, tensor in checkpoint.tensors.items()}
    if len(stored) < len(checkpoint.tensors):
        raise BrokenCheckpoint(f"{checkpoint.folder}: the weights hold a tensor twice, with and without a prefix.")
    targets = architecture.targets(checkpoint)
    needed = dict.fromkeys(target.stored for target in targets)
    if missing := [name for name in needed if name not in stored]:
        raise BrokenCheckpoint(f"{checkpoint.folder}: {_listed(missing)} missing from the weights. Fetch it again.")
    if surplus := [name for name in stored if name not in needed and not architecture.dropped.fullmatch(name)]:
        model = f"a {checkpoint.model_type} with {architecture.facts(checkpoint)['block_count']} layers"
        raise BrokenCheckpoint(f"{checkpoint.folder}: {_listed(surplus)} in the weights, but no part of {model}.")
    for target in targets:
        name, tensor = stored[target.stored]
        if tensor.shape != target.shape:
            implied = f"config.json implies {target.shape}"
            raise BrokenCheckpoint(f"{tensor.file}: {name} has the shape {tensor.shape}, but {implied}.")
        if tensor.dtype not in _DTYPES:
            supported = "BF16, F16 and F32 are supported"
            raise UnsupportedCheckpoint(f"{tensor.file}: {name} has the dtype {tensor.dtype}; {supported}.")
    return {target.name: target.transform(stored[target.stored][1]) for target in targets}


def implied_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, StoredTensor]:
    """The tensors that config.json implies, by their stored names, for a checkpoint whose weights are elsewhere."""
    config_path = checkpoint.folder / "config.json"
    return {
        target.stored: StoredTensor(config_path, "BF16", target.shape, begin=0)
        for target in architecture.targets(checkpoint)
    }


def _plain_name(name: str, architecture: Architecture) -> str:
    name = name.removeprefix(architecture.prefix)
    for old, new in architecture.renames.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _listed(names: list[str]) -> str:
    shown, more = ", ".join(names[:3]), len(names) - 3
    return f"{shown} and {more} more are" if more > 0 else f"{shown} {'is' if len(names) == 1 else 'are'}"
