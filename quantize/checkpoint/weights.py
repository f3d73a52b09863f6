"""The weights of a checkpoint folder: which files transformers takes, and what tensors they hold.

Nothing is loaded: the bytes of a tensor are mapped from its file, chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN, read_json, read_value
from f2gguf.quantize.checkpoint.pickles import read_pickled
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint, parsing
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

# safetensors dtype -> numpy dtype of its bytes (numpy has no bfloat16: its bits are read as uint16)
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
CHUNK_ELEMENTS = 1 << 19  # 8 to 16 MB: what a conversion holds in memory at a time
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # formats of weights that can run code when they are read
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # where there are no safetensors
PICKLED_FILES = (PICKLED, PICKLED_INDEX, "pytorch_model-*.bin")
_ADAPTER = "adapter_config.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_Count = Annotated[int, Field(strict=True, ge=0)]
# Endings of tensors that only quantised weights have: GPTQ and AWQ, compressed-tensors, FP8, bitsandbytes, MLX
_QUANTIZED_ENDINGS = (
    *(".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".weight.absmax", ".weight.quant_map", ".SCB", ".scales", ".biases"),
)


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
    strides: tuple[int, ...] | None = field(default=None, kw_only=True)  # in values, where not row by row
    byte_order: Literal["<", ">"] = field(default="<", kw_only=True)

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def size_bytes(self) -> int:
        return self.n_elements * DTYPES[self.dtype].itemsize

    def chunks(self) -> Iterator[NDArray[Any]]:
        """The values in order, flat. One chunk at a time is mapped from the file, so that memory stays small."""
        dtype = self._stored_dtype
        for start in range(0, self.n_elements, CHUNK_ELEMENTS):
            n = min(CHUNK_ELEMENTS, self.n_elements - start)
            if self.strides is not None:
                values = self.mapped().flat[start : start + n]
            else:
                place = self.begin + start * dtype.itemsize
                values = np.memmap(self.file, dtype=dtype, mode="r", offset=place, shape=(n,))
            yield values.astype(DTYPES[self.dtype], copy=False)

    def mapped(self) -> NDArray[Any]:
        """All values in their shape, mapped from the file and in its byte order."""
        if not self.n_elements:
            return np.empty(self.shape, dtype=self._stored_dtype)
        if self.strides is None:
            return np.memmap(self.file, dtype=self._stored_dtype, mode="r", offset=self.begin, shape=self.shape)
        n = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.strides, strict=True))
        span = np.memmap(self.file, dtype=self._stored_dtype, mode="r", offset=self.begin, shape=(n,))
        steps = [step * span.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(span, self.shape, steps, writeable=False)

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Rows `begin` to `end`, which is left out."""
        n_apart = self.strides[0] if self.strides else int(np.prod(self.shape[1:], dtype=np.int64))
        place = self.begin + begin * n_apart * DTYPES[self.dtype].itemsize
        return replace(self, shape=(end - begin, *self.shape[1:]), begin=place)

    @property
    def _stored_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype].newbyteorder(self.byte_order)


def as_float32(dtype: str, chunk: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values of `dtype`, widened."""
    if dtype == "BF16":
        return (chunk.astype(np.uint32) << 16).view(np.float32)
    return chunk.astype(np.float32)


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Every tensor of the files that transformers would load.

    Raises `UnsupportedCheckpoint` for weights that are quantised, or no safetensors, `BrokenCheckpoint` for files that
    are missing, damaged or contradict each other.
    """
    path = _weights_file(folder, config)
    tensors = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    if quantized := next((name for name in tensors if name.endswith(_QUANTIZED_ENDINGS)), None):
        raise _quantized(tensors[quantized].file, f"its tensor {quantized} is of quantised weights")
    return tensors


def read_dense(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file of a Dense module. Raises the errors of `read_tensors`."""
    if not path.is_file():
        if there := [
            other for other in (path.parent.iterdir() if path.parent.is_dir() else ()) if other.suffix in PICKLES
        ]:
            raise UnsupportedCheckpoint(
                f"{there[0]}: is pickle, which runs code when it is read. Save it as {path.name}."
            )
        raise BrokenCheckpoint(f"{path}: no such file, but modules.json names its folder. {FETCH_AGAIN}")
    return _read_safetensors(path)


def weights_paths(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that `read_tensors` reads: an index and its shards, or one file."""
    path = _weights_file(folder, config)
    return [path, *_shards(path)] if path.name.endswith(".index.json") else [path]


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter, which changes the weights that it is loaded with, also where these are there."""
    path = folder / _ADAPTER
    if not path.exists():
        return
    adapter = read_json(path)
    base = adapter.get("base_model_name_or_path") or "its base model"
    kind = adapter.get("peft_type") or "PEFT"
    raise UnsupportedCheckpoint(
        f"{path}: is a {kind} adapter of {base}, which must be merged first: with the package peft, "
        "m = PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), FOLDER).merge_and_unload(), then "
        "m.save_pretrained(NEW); copy all other files but adapter_* to NEW, and convert NEW."
    )


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose weights are quantised; the error names the method."""
    for key in ("quantization_config", "quantization", "compression_config"):
        if stated := config.get(key):
            method = stated.get("quant_method") or stated.get("bits") if isinstance(stated, dict) else stated
            method = f"{method} bits" if isinstance(method, int) else method or "a method that it does not name"
            raise _quantized(folder / "config.json", f"{key} says that the weights are quantised ({method})")


def _quantized(path: Path, flaw: str) -> UnsupportedCheckpoint:
    original = "f2gguf needs the original: the BF16, F16 or F32 checkpoint that this was made from"
    return UnsupportedCheckpoint(f"{path}: {flaw}. {original}.")


def _weights_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file that transformers begins with: the one that config.json names, else one file, else an index of shards.

    Source: transformers 5.24, modeling_utils.py, `_get_resolved_checkpoint_files`
    """
    if stated := config.get("transformers_weights"):
        path = folder / str(stated)
        if not str(stated).endswith((".safetensors", ".safetensors.index.json")) or path.parent != folder:
            raise UnsupportedCheckpoint(
                f"{folder / 'config.json'}: transformers_weights is {stated!r}, no safetensors."
            )
        if not path.is_file():
            raise BrokenCheckpoint(f"{path}: no such file, but config.json names it. {FETCH_AGAIN}")
        return path
    if there := [path for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if (path := folder / name).is_file()]:
        return there[0]
    if any(path.suffix in (*PICKLES, ".h5", ".onnx", ".gguf", ".msgpack") for path in folder.iterdir()):
        raise UnsupportedCheckpoint(f"{folder}: has only pickle or foreign weights. Save them as safetensors.")
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    beside = f" transformers would not load {others[0]} either: rename it if it holds the weights." if others else ""
    raise BrokenCheckpoint(f"{folder / SINGLE}: no such file, and no {INDEX}.{beside or f' {FETCH_AGAIN}'}")


def _read_shards(index_path: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in _shards(index_path):
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise BrokenCheckpoint(f"{path}: {name} is in {tensors[name].file.name} too. {FETCH_AGAIN}")
            tensors[name] = tensor
    for name, file in _weight_map(index_path).items():
        if name not in tensors or tensors[name].file.name != file:
            lacks = f"lacks {name}, which the shard index places there"
            raise BrokenCheckpoint(f"{index_path.with_name(file)}: {lacks}. {FETCH_AGAIN}")
    return tensors


def _weight_map(index_path: Path) -> dict[str, str]:
    stated = dict(read_value(index_path, "weight_map", dict[str, str]))
    if elsewhere := next((file for file in stated.values() if Path(file).name != file), None):
        words = f"names {elsewhere!r}, which is no file beside it. Move the shards there, and correct their names"
        raise UnsupportedCheckpoint(f"{index_path}: {words}.")
    return stated


def _shards(index_path: Path) -> list[Path]:
    files = [index_path.parent / name for name in sorted(set(_weight_map(index_path).values()))]
    if not files:
        raise BrokenCheckpoint(f"{index_path}: has an empty 'weight_map'. {FETCH_AGAIN}")
    if missing := [path for path in files if not path.is_file()]:
        raise BrokenCheckpoint(f"{missing[0]}: no such file, but {index_path.name} names it. {FETCH_AGAIN}")
    return files


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix != ".bin":
        return _read_safetensors(path)
    tensors = {}
    for name, stated in read_pickled(path).items():
        row_by_row = tuple(int(np.prod(stated.shape[i + 1 :], dtype=np.int64)) for i in range(len(stated.shape)))
        pairs = zip(stated.shape, stated.strides, row_by_row, strict=True)
        is_plain = all(step == usual or length == 1 for length, step, usual in pairs)
        order: Literal["<", ">"] = ">" if stated.is_big_endian else "<"
        strides = None if is_plain else stated.strides
        tensors[name] = StoredTensor(path, stated.dtype, stated.shape, stated.begin, strides=strides, byte_order=order)
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensor index of one file. Source: https://github.com/huggingface/safetensors#format"""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise BrokenCheckpoint(f"{path}: is no safetensors file, or is cut off in its header. {FETCH_AGAIN}")
        raw = file.read(length)
    with parsing(f"{path}, its header", BrokenCheckpoint, FETCH_AGAIN):
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
        entries.pop("__metadata__", None)
        stated = TypeAdapter(dict[str, _StatedTensor]).validate_python(entries)
    tensors = {name: _stored_tensor(path, 8 + length, size_bytes, name, entry) for name, entry in stated.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin < end:
            raise BrokenCheckpoint(f"{path}: {name} overlaps the tensor before it. {FETCH_AGAIN}")
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
        raise BrokenCheckpoint(f"{path}: truncated: {where}. {FETCH_AGAIN}")
    if tensor.dtype in DTYPES and end - begin != tensor.size_bytes:
        raise BrokenCheckpoint(
            f"{path}: {name} has {end - begin:,} bytes, which its shape {tensor.shape} does not fill."
        )
    return tensor
