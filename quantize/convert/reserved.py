"""Header values that are known only after the tensors were written: room is reserved, and later filled in.

A file is written with placeholders of the same type and size, so that filling in moves no other byte.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.header import read_header

_FLOAT32 = 6  # GGUF specification, "enum gguf_metadata_value_type"
Value = float | bool | str | Sequence[float]

UNKNOWN_SHA256 = "0" * 64  # of a checkpoint, which is hashed while it is converted
# of a variant, which is measured after it is made
VERDICT = {keys.KEY_MEAN_DRIFT: 0.0, keys.KEY_UPPER_DRIFT: 0.0, keys.KEY_HOLDS: False}


def fill_in(path: Path, values: Mapping[str, Value]) -> None:
    """Overwrite header values. A string must keep its number of bytes, an array its number of values."""
    header = read_header(path)
    with path.open("rb+") as file:
        for key, value in values.items():
            file.seek(header.offsets[key])
            file.write(_encoded(key, value, header.values[key]))


def _encoded(key: str, value: Value, placeholder: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    if not isinstance(value, str):
        if len(value) != len(placeholder) or type(placeholder[0]) is not float:
            raise ValueError(f"{key}: {len(value)} numbers do not fit the place of {len(placeholder)}")
        return struct.pack(f"<IQ{len(value)}f", _FLOAT32, len(value), *value)
    data = value.encode()
    if len(data) != len(str(placeholder).encode()):
        raise ValueError(f"{key}: {value!r} does not fit the place of {placeholder!r}")
    return struct.pack("<Q", len(data)) + data
