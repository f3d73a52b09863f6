"""A header's entries as bytes: packed, copied without being parsed, and sealed with a SHA-256 over the whole header.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from f2gguf.runtime.gguf.header import KEY_SEAL, Header, read_header

Value = bool | int | float | str
# Python type -> number of the GGUF type, and layout
VALUE_TYPES: dict[type, tuple[int, str]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f"), str: (8, "")}
_ARRAY = 9
UNSEALED = "0" * 64  # the seal of a header that is not finished


def packed(value: Value | Sequence[Value]) -> bytes:
    """A header value as GGUF stores it; the values of a sequence must have one type."""
    if isinstance(value, str):
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    if isinstance(value, Sequence):
        return struct.pack("<IQ", VALUE_TYPES[type(value[0])][0], len(value)) + b"".join(map(packed, value))
    return struct.pack(VALUE_TYPES[type(value)][1], value)


def entry(key: str, value: Value | Sequence[Value]) -> bytes:
    """A key and its value as GGUF stores them."""
    is_array = isinstance(value, Sequence) and not isinstance(value, str)
    return packed(key) + struct.pack("<I", _ARRAY if is_array else VALUE_TYPES[type(value)][0]) + packed(value)


def entries(header: Header) -> dict[str, bytes]:
    """Key -> the bytes of the key and its value in the file."""
    data = leading_bytes(header)
    begins = {key: at - 4 - len(key.encode()) - 8 for key, at in header.offsets.items()}
    ends = [*list(begins.values())[1:], header.values_end]
    return {key: data[begin:end] for (key, begin), end in zip(begins.items(), ends, strict=True)}


def leading_bytes(header: Header) -> bytes:
    """Everything before the tensors, without the padding."""
    with header.path.open("rb") as file:
        return file.read(header.end)


def is_sealed(header: Header) -> bool | None:
    """Whether the header is as f2gguf left it; None where it has no seal."""
    return header.values[KEY_SEAL] == _digest(header) if KEY_SEAL in header.values else None


def seal(path: Path) -> None:
    """Write the seal of a header that has room for it, after its last change."""
    header = read_header(path)
    if KEY_SEAL in header.values:
        with path.open("rb+") as file:
            file.seek(header.offsets[KEY_SEAL])
            file.write(packed(_digest(header)))


def _digest(header: Header) -> str:
    """SHA-256 of everything before the tensors, keys and tensors' entries alike, as if it were unsealed."""
    data = bytearray(leading_bytes(header))
    at = header.offsets[KEY_SEAL]
    data[at : at + len(packed(UNSEALED))] = packed(UNSEALED)
    return hashlib.sha256(data).hexdigest()
