"""Header values that are known only after the tensors were written: room is reserved, and later filled in.

A file is written with placeholders of the same type and size, so that filling in moves no other byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.header import read_header
from gguf import GGUFValueType

Value = bool | int | float | str
# Python type -> type and layout of a header value
VALUE_TYPES: dict[type, tuple[GGUFValueType, str]] = {
    bool: (GGUFValueType.BOOL, "<?"),
    int: (GGUFValueType.UINT32, "<I"),
    float: (GGUFValueType.FLOAT32, "<f"),
    str: (GGUFValueType.STRING, ""),
}

UNKNOWN_SHA256 = "0" * 64  # of a checkpoint, which is hashed while it is converted
# of a variant, which is measured after it is made
VERDICT = {keys.KEY_MEAN_DRIFT: 0.0, keys.KEY_UPPER_DRIFT: 0.0, keys.KEY_HOLDS: False}


def fill_in(path: Path, values: Mapping[str, Value | Sequence[float]]) -> None:
    """Overwrite header values. A string must keep its number of bytes, an array of floats its number of values."""
    header = read_header(path)
    with path.open("rb+") as file:
        for key, value in values.items():
            data, old = packed(value), header.values[key]
            is_supported = not isinstance(old, tuple) or type(old[0]) is float
            if len(data) != len(packed(old)) or not is_supported:
                raise ValueError(f"{key}: a new value of {len(data):,} bytes does not fit its place in the header")
            file.seek(header.offsets[key])
            file.write(data)


def packed(value: Value | Sequence[float]) -> bytes:
    """A header value as GGUF stores it. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    if isinstance(value, str):
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    if isinstance(value, Sequence):
        return struct.pack(f"<IQ{len(value)}f", GGUFValueType.FLOAT32, len(value), *value)
    return struct.pack(VALUE_TYPES[type(value)][1], value)
