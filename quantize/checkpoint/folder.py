"""A Hugging Face checkpoint folder, read without torch. Its facts are checked; its tensors are mapped, not loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint, parsing
from f2gguf.runtime.files import sha256_file
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

# safetensors dtype -> numpy dtype of its bytes (numpy has no bfloat16: its bits are read as uint16)
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
CHUNK_ELEMENTS = 1 << 19  # 8 to 16 MB: what a conversion holds in memory at a time
# The files that a conversion reads and that `Checkpoint.sha256` covers: never code, never pickle
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
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # formats of weights that can run code when they are read
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_FETCH_AGAIN = "Fetch the model again."
_Count = Annotated[int, Field(strict=True, ge=0)]
_POOLING_MODES = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}


@dataclass(frozen=True)
class _StatedTensor:
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True)
class StoredTensor:
    """Where the bytes of a tensor are."""

    file: Path
    dtype: str  # as safetensors spells it: 'BF16'
    shape: tuple[int, ...]
    begin: int  # offset in the file

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        return self.n_elements * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The values in order, flat. One chunk at a time is mapped from the file, so that memory stays small."""
        dtype = DTYPES[self.dtype]
        for start in range(0, self.n_elements, CHUNK_ELEMENTS):
            n = min(CHUNK_ELEMENTS, self.n_elements - start)
            yield np.memmap(self.file, dtype=dtype, mode="r", offset=self.begin + start * dtype.itemsize, shape=(n,))


@dataclass(frozen=True)
class Checkpoint:
    """What a folder states of its model. A fact that it does not state is `None` or empty."""

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
        """One hash of every file that the result depends on: weights, configuration, tokenizer."""
        total = hashlib.sha256()
        for path in sorted({path for pattern in NEEDED for path in self.folder.glob(pattern)}):
            total.update(f"{path.relative_to(self.folder).as_posix()} {sha256_file(path)}\n".encode())
        return total.hexdigest()

    def count(self, key: str) -> int:
        """A positive integer of config.json. Raises `BrokenCheckpoint` for anything else."""
        value = self.config.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._bad(key, value, "a positive integer")
        return value

    def real(self, key: str, within: Mapping[str, Any] | None = None) -> float:
        """A positive finite number of config.json, or of its part `within`. Raises `BrokenCheckpoint` otherwise."""
        value: Any = (self.config if within is None else within).get(key)
        if type(value) not in (int, float) or not 0 < value < np.inf:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def _bad(self, key: str, value: object, expected: str) -> BrokenCheckpoint:
        flaw = f"has no {key!r}" if value is None else f"{key} is {value!r}, which is not {expected}"
        return BrokenCheckpoint(f"{self.folder / 'config.json'}: {flaw}. {_FETCH_AGAIN}")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the facts and the tensor index of a checkpoint folder.

    Raises `BrokenCheckpoint` for files that are missing, cut off or contradict each other. Raises
    `UnsupportedCheckpoint` for modules and weight formats that f2gguf does not convert.
    """
    config = read_json(folder / "config.json")
    pooling, is_normalized = _read_modules(folder)
    prompts_path = folder / "config_sentence_transformers.json"
    prompts = _read_value(prompts_path, "prompts", dict[str, str | None] | None) if prompts_path.exists() else None
    return Checkpoint(
        folder=folder,
        config=config,
        tensors=_read_tensors(folder),
        pooling=pooling,
        is_normalized=is_normalized,
        prompts={name: text for name, text in (prompts or {}).items() if text is not None},
        max_seq_length=_read_max_seq_length(folder / "sentence_bert_config.json"),
    )


def is_legal(name: str) -> bool:
    """Whether a file of a repository is a licence or notice, which must come along wherever the weights go."""
    return "/" not in name and name.lower().startswith(("license", "licence", "notice"))


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file. Raises `BrokenCheckpoint` if it does not parse, or is missing and not `optional`."""
    if optional and not path.exists():
        return {}
    content = _load(path)
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path}: holds a JSON {type(content).__name__}, not an object. {_FETCH_AGAIN}")
    return content


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path}: no such file. A checkpoint folder needs it. {_FETCH_AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: does not parse as JSON: {error}. {_FETCH_AGAIN}") from error


def _read_value(path: Path, key: str, shape: Any) -> Any:
    """The value of `key` in a JSON file. pydantic checks that it has the type `shape`."""
    content = read_json(path)
    with parsing(path, BrokenCheckpoint, _FETCH_AGAIN):
        return TypeAdapter(dict[str, shape]).validate_python({key: content.get(key)})[key]


def _read_modules(folder: Path) -> tuple[str | None, bool]:
    """Pooling and whether vectors are normalised, from sentence-transformers' modules.json."""
    path = folder / "modules.json"
    if not path.exists():
        return None, True
    content = _load(path)
    with parsing(path, BrokenCheckpoint, _FETCH_AGAIN):
        rows = TypeAdapter(list[dict[str, Any]]).validate_python(content)
        modules = {str(row["type"]).rsplit(".", 1)[-1]: folder / str(row["path"]) for row in rows}
    if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        what = "f2gguf converts Transformer, Pooling and Normalize"
        raise UnsupportedCheckpoint(f"{path}: has the module {min(unknown)}; {what}.")
    pooling = _read_pooling(modules["Pooling"] / "config.json") if "Pooling" in modules else None
    return pooling, "Normalize" in modules


def _read_max_seq_length(path: Path) -> int | None:
    config = read_json(path, optional=True)
    if config.get("do_lower_case"):
        raise UnsupportedCheckpoint(f"{path}: do_lower_case is set; f2gguf normalises as tokenizer.json says, no more.")
    limit = config.get("max_seq_length")
    if limit is not None and (type(limit) is not int or limit < 2):
        raise BrokenCheckpoint(f"{path}: max_seq_length is {limit!r}, which is not a number of tokens. {_FETCH_AGAIN}")
    return limit


def _read_pooling(path: Path) -> str:
    config = read_json(path)
    if config.get("include_prompt") is False:
        raise UnsupportedCheckpoint(f"{path}: include_prompt is false; llama.cpp pools over the prompt too.")
    stated = [pooling for key, pooling in _POOLING_MODES.items() if config.get(f"pooling_mode_{key}") is True]
    if not stated:  # sentence-transformers 5.2 and later write one word
        stated = [p for p in _POOLING_MODES.values() if config.get("pooling_mode") in (p, f"{p}token")]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(stated) != 1 or len(others) > 1:
        modes = ", ".join(others) or "no pooling mode"
        raise UnsupportedCheckpoint(f"{path}: states {modes}; last token, mean or CLS is supported.")
    return stated[0]


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / "model.safetensors.index.json"
    index = _read_value(index_path, "weight_map", dict[str, str]) if index_path.exists() else None
    tensors: dict[str, StoredTensor] = {}
    for path in [_single_file(folder)] if index is None else _shards(index_path, index):
        for name, tensor in _read_safetensors(path).items():
            if name in tensors:
                raise BrokenCheckpoint(f"{path}: {name} is in {tensors[name].file.name} too.")
            tensors[name] = tensor
    for name, file in (index or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise BrokenCheckpoint(f"{folder / file}: lacks {name}, which the shard index places there.")
    return tensors


def _single_file(folder: Path) -> Path:
    single = folder / "model.safetensors"
    if single.is_file():
        return single
    if any(path.suffix in (*PICKLES, ".h5", ".onnx") for path in folder.iterdir()):
        raise UnsupportedCheckpoint(f"{folder}: has only pickle or foreign weights. Save them as safetensors.")
    raise BrokenCheckpoint(f"{single}: no such file, and no model.safetensors.index.json. {_FETCH_AGAIN}")


def _shards(index_path: Path, index: Mapping[str, str]) -> list[Path]:
    files = [index_path.parent / Path(name).name for name in sorted(set(index.values()))]
    if not files:
        raise BrokenCheckpoint(f"{index_path}: has an empty 'weight_map'. {_FETCH_AGAIN}")
    if missing := [path for path in files if not path.is_file()]:
        raise BrokenCheckpoint(f"{missing[0]}: no such file, but {index_path.name} names it. {_FETCH_AGAIN}")
    return files


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensor index of one file. Source: https://github.com/huggingface/safetensors#format"""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise BrokenCheckpoint(f"{path}: is no safetensors file, or is cut off in its header. {_FETCH_AGAIN}")
        raw = file.read(length)
    with parsing(f"{path}, its header", BrokenCheckpoint, _FETCH_AGAIN):
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
        entries.pop("__metadata__", None)
        stated = TypeAdapter(dict[str, _StatedTensor]).validate_python(entries)
    tensors = {name: _stored_tensor(path, 8 + length, size_bytes, name, entry) for name, entry in stated.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin < end:
            raise BrokenCheckpoint(f"{path}: {name} overlaps the tensor before it. {_FETCH_AGAIN}")
        end = tensor.begin + (tensor.size_bytes if tensor.dtype in DTYPES else 0)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _stored_tensor(path: Path, data_start: int, size_bytes: int, name: str, stated: _StatedTensor) -> StoredTensor:
    begin, end = (data_start + offset for offset in stated.data_offsets)
    tensor = StoredTensor(path, stated.dtype, stated.shape, begin)
    if end > size_bytes:
        where = f"{name} ends at byte {end:,} and the file at {size_bytes:,}"
        raise BrokenCheckpoint(f"{path}: truncated: {where}. {_FETCH_AGAIN}")
    if tensor.dtype in DTYPES and end - begin != tensor.size_bytes:
        raise BrokenCheckpoint(
            f"{path}: {name} has {end - begin:,} bytes, which its shape {tensor.shape} does not fill."
        )
    return tensor
