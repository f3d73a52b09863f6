"""A Hugging Face checkpoint folder, read without torch: its facts checked, its tensors mapped, not loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint
from f2gguf.runtime.files import sha256_file
from numpy.typing import NDArray

# safetensors dtype -> numpy dtype of its bytes (numpy has no bfloat16: its bits are read as uint16)
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
CHUNK_ELEMENTS = 1 << 19  # 8 to 16 MB: what a conversion holds in memory at a time
# What a conversion reads; never code, never pickle
NEEDED = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "*_Pooling/config.json",
)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_POOLING_MODES = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes stand."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The values in order, flat, mapped from the file a chunk at a time so that memory stays small."""
        dtype = DTYPES[self.dtype]
        for start in range(0, self.n_elements, CHUNK_ELEMENTS):
            n = min(CHUNK_ELEMENTS, self.n_elements - start)
            yield np.memmap(self.file, dtype=dtype, mode="r", offset=self.begin + start * dtype.itemsize, shape=(n,))


@dataclass(frozen=True)
class Checkpoint:
    """What a folder states of its model. `None` or empty where it does not say."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    pooling: str | None
    is_normalized: bool
    prompts: Mapping[str, str]
    max_seq_length: int | None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """One hash over the bytes of every file that shapes the result: weights, configuration, tokenizer."""
        total = hashlib.sha256()
        for path in sorted({path for pattern in NEEDED for path in self.folder.glob(pattern)}):
            total.update(f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}\n".encode())
        return total.hexdigest()

    def number(self, *keys: str) -> Any:
        """The first of `keys` that config.json has; raises `BrokenCheckpoint` where it has none."""
        for key in keys:
            if self.config.get(key) is not None:
                return self.config[key]
        raise BrokenCheckpoint(f"{self.folder / 'config.json'}: has no {' or '.join(map(repr, keys))}.")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the facts and the tensor index of a checkpoint folder.

    Raises `BrokenCheckpoint` for files that are missing, cut off or contradict each other, `UnsupportedCheckpoint` for
    modules and weight formats that f2gguf does not convert.
    """
    config = read_json(folder / "config.json")
    pooling, is_normalized = _read_modules(folder)
    sentence = read_json(folder / "config_sentence_transformers.json", optional=True)
    limits = read_json(folder / "sentence_bert_config.json", optional=True)
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=_read_tensors(folder),
        pooling=pooling,
        is_normalized=is_normalized,
        prompts={name: text for name, text in (sentence.get("prompts") or {}).items() if text is not None},
        max_seq_length=limits.get("max_seq_length"),
    )


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; `BrokenCheckpoint` where it does not parse, or is missing and not `optional`."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path}: no such file. A checkpoint folder needs it; fetch the model again.") from error
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path}: does not parse as JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path}: holds a JSON {type(content).__name__}, not an object.")
    return content


def _read_modules(folder: Path) -> tuple[str | None, bool]:
    """Pooling and whether vectors are normalised, from sentence-transformers' modules.json."""
    path = folder / "modules.json"
    if not path.exists():
        return None, True
    try:
        modules = [(module["type"].rsplit(".", 1)[-1], module["path"]) for module in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path}: is no list of modules with 'type' and 'path': {error!r}.") from error
    kinds = [kind for kind, _ in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise UnsupportedCheckpoint(
            f"{path}: has the module {unknown[0]}; f2gguf converts Transformer, Pooling and Normalize."
        )
    pooling = next(
        (_read_pooling(folder / where / "config.json") for kind, where in modules if kind == "Pooling"), None
    )
    return pooling, "Normalize" in kinds


def _read_pooling(path: Path) -> str:
    config = read_json(path)
    stated = [pooling for key, pooling in _POOLING_MODES.items() if config.get(key)]
    if not stated:  # sentence-transformers 5.2 and later write one word
        stated = [p for p in _POOLING_MODES.values() if config.get("pooling_mode") in (p, f"{p}token")]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(stated) != 1 or len(others) > 1:
        raise UnsupportedCheckpoint(
            f"{path}: states {', '.join(others) or 'no pooling mode'}; last token, mean or CLS is supported."
        )
    return stated[0]


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _read_safetensors(path).items():
            if name in tensors:
                raise BrokenCheckpoint(f"{path}: {name} is in {tensors[name].file.name} too.")
            tensors[name] = tensor
    index = read_json(folder / "model.safetensors.index.json", optional=True).get("weight_map", {})
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise BrokenCheckpoint(f"{folder / file}: lacks {name}, which the shard index places there.")
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return [single]
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise UnsupportedCheckpoint(
                f"{folder}: has only pickle weights, which can run code. Save it as safetensors."
            )
        raise BrokenCheckpoint(f"{single}: no such file, and no model.safetensors.index.json. Fetch the model again.")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenCheckpoint(f"{index_path}: has no 'weight_map'. Fetch the model again.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.exists():
            raise BrokenCheckpoint(f"{path}: no such file, but {index_path.name} names it. Fetch the model again.")
    return files


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensor index of one file. Source: https://github.com/huggingface/safetensors#format"""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise BrokenCheckpoint(f"{path}: is no safetensors file, or is cut off in its header. Fetch it again.")
        raw = file.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        return {name: _stored_tensor(path, 8 + length, size_bytes, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path}: its header is damaged: {error!r}. Fetch it again.") from error


def _stored_tensor(path: Path, data_start: int, size_bytes: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = (data_start + offset for offset in entry["data_offsets"])
    tensor = StoredTensor(path, str(entry["dtype"]), tuple(entry["shape"]), begin)
    if end > size_bytes:
        raise BrokenCheckpoint(
            f"{path}: truncated: {name} ends at byte {end:,} and the file at {size_bytes:,}. Fetch it again."
        )
    if tensor.dtype in DTYPES and end - begin != tensor.n_elements * DTYPES[tensor.dtype].itemsize:
        raise BrokenCheckpoint(
            f"{path}: {name} has {end - begin:,} bytes, which its shape {tensor.shape} does not fill."
        )
    return tensor
