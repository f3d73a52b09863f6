"""The bytes of a .gguf header, front to back. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import NotGGUF

Values = dict[str, Any]

# GGUF specification, "enum gguf_metadata_value_type": number -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml_type: number -> name, elements of a block, bytes of a block. Those of the package gguf (a test compares the two),
# which takes 50 ms to import.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
_VOCABULARY = "f2gguf.tokenizer."  # keys of arrays with a value for each token
_LONG_ARRAY = 1024  # longer arrays (the vocabulary) are counted, not read
_LONGEST_ARRAY = 1 << 22  # of those that are read whatever their length: golden vectors of 5,120 dimensions have 81,920
_MAX_DIMS = 4  # of a tensor, as in ggml
_MAGIC = b"GGUF"
_DAMAGED = "; the file is damaged. Download or make it again."


@dataclass(frozen=True)
class LongArray:
    """The length of an array that was not read because nobody needs it in Python."""

    length: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape (as PyTorch orders it: rows first), GGML type name, bytes, and where they begin."""

    name: str
    shape: tuple[int, ...]
    type: str
    size_bytes: int
    begin: int  # in the file


class Reader:
    """Walks the header from front to back."""

    def __init__(self, path: Path, data: mmap.mmap, size_bytes: int) -> None:
        self.path, self.data, self.size_bytes, self.at = path, data, size_bytes, 0

    def read(
        self, require_sane: Callable[[Values], None]
    ) -> tuple[Values, tuple[TensorInfo, ...], dict[str, int], int, int]:
        """The values, checked by `require_sane`; the tensors; where each value begins in the file, the last value ends,
        and the last tensor's entry ends.
        """
        if self.data[:4] != _MAGIC:
            raise NotGGUF(
                f"{self.path}: is not a GGUF file (it begins with {bytes(self.data[:4])!r}, not b'GGUF'). "
                "Make one with `quantize all MODEL`."
            )
        self.at = 4
        version = self._scalar(4)
        if version not in (2, 3):
            known = "is not supported (2 and 3 are). Download or make it again, or update f2gguf"
            raise NotGGUF(f"{self.path}: GGUF version {version} {known}.")
        n_tensors, n_values = self._scalar(10), self._scalar(10)
        values: Values = {}
        offsets: dict[str, int] = {}
        for _ in range(n_values):
            key = self._string()
            if not key or key in values:  # llama.cpp refuses it too
                raise NotGGUF(f"{self.path}: its header has the key {key!r:.60}{' twice' if key else ''}{_DAMAGED}")
            kind = self._scalar(4)
            offsets[key] = self.at
            values[key] = self._value(kind, whole=key.startswith("f2gguf.") and not key.startswith(_VOCABULARY))
        require_sane(values)
        values_end = self.at
        placed = [self._tensor() for _ in range(n_tensors)]
        alignment = values.get("general.alignment", 32)
        data_begin = -(-self.at // alignment) * alignment
        tensors = tuple(replace(tensor, begin=data_begin + tensor.begin) for tensor in placed)
        self._require_complete(tensors)
        return values, tensors, offsets, values_end, self.at

    def _require_complete(self, tensors: tuple[TensorInfo, ...]) -> None:
        for tensor in tensors:
            if (end := tensor.begin + tensor.size_bytes) > self.size_bytes:
                raise NotGGUF(
                    f"{self.path}: truncated: {tensor.name} ends at byte {end:,} and the file at {self.size_bytes:,}. "
                    "Download or make it again."
                )

    def _take(self, n_bytes: int) -> int:
        start = self.at
        self.at += n_bytes
        if self.at > self.size_bytes:
            raise NotGGUF(f"{self.path}: truncated inside its header. Download or make it again.")
        return start

    def _scalar(self, kind: int) -> Any:
        layout = "<" + _SCALARS[kind]
        return struct.unpack_from(layout, self.data, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        length = self._scalar(10)
        start = self._take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def _value(self, kind: int, *, whole: bool = False) -> Any:
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(whole=whole)
        raise NotGGUF(f"{self.path}: its header has a value of unknown type {kind}{_DAMAGED}")

    def _array(self, *, whole: bool) -> Any:
        kind, length = self._scalar(4), self._scalar(10)
        if kind != _STRING and kind not in _SCALARS:
            raise NotGGUF(f"{self.path}: its header has an array of unknown type {kind}{_DAMAGED}")
        start = self._take(length * struct.calcsize("<" + _SCALARS[kind])) if kind in _SCALARS else self.at
        if whole and length > _LONGEST_ARRAY:
            raise NotGGUF(f"{self.path}: its header has an array of {length:,} values{_DAMAGED}")
        is_read = length <= _LONG_ARRAY or whole
        if kind in _SCALARS:
            return struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.data, start) if is_read else LongArray(length)
        return tuple(self._string() for _ in range(length)) if is_read else self._skip_strings(length)

    def strings(self, at: int) -> list[str]:
        """The array of strings whose value begins at byte `at` of the file, as `read` found it."""
        kind, n = struct.unpack_from("<IQ", self.data, at)
        if kind != _STRING:
            raise NotGGUF(f"{self.path}: its header has no array of texts at byte {at}; the file is damaged.")
        length_at, data, texts = struct.Struct("<Q").unpack_from, self.data, []
        at += 12
        for _ in range(n):
            start = at + 8
            at = start + length_at(data, at)[0]
            texts.append(data[start:at].decode("utf-8", errors="replace"))
        return texts

    def _skip_strings(self, n: int) -> LongArray:
        """Walk past `n` strings without reading them: a vocabulary and its merges have 300,000."""
        length_at, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        try:
            for _ in range(n):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            at = self.size_bytes + 1
        self.at = at
        self._take(0)
        return LongArray(n)

    def _tensor(self) -> TensorInfo:
        """A tensor whose `begin` still counts from the first tensor's."""
        name = self._string()
        if (n_dims := self._scalar(4)) > _MAX_DIMS:
            raise NotGGUF(f"{self.path}: {name!r:.60} has {n_dims:,} dimensions{_DAMAGED}")
        shape = tuple(self._scalar(10) for _ in range(n_dims))[::-1]
        number, offset = self._scalar(4), self._scalar(10)
        if number not in TENSOR_TYPES:
            raise NotGGUF(f"{self.path}: {name} has the unknown tensor type {number}; update f2gguf.")
        kind, block, block_bytes = TENSOR_TYPES[number]
        return TensorInfo(name, shape, kind, math.prod(shape) // block * block_bytes, offset)
