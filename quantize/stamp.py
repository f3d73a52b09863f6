"""Values that are known only after a file was written, put into its header in place: no other byte moves."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from f2gguf.runtime.header import read_header


def stamp(path: Path, values: Mapping[str, float | bool | str]) -> None:
    """Overwrite header values of the same type and size: float32, bool, or a string of the same length in bytes."""
    header = read_header(path)
    with path.open("rb+") as file:
        for key, value in values.items():
            file.seek(header.offsets[key])
            file.write(_encoded(key, value, header.values[key]))


def _encoded(key: str, value: float | bool | str, placeholder: float | bool | str) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, float):
        return struct.pack("<f", value)
    data = str(value).encode()
    if len(data) != len(str(placeholder).encode()):
        raise ValueError(f"{key}: {value!r} does not fit the place of {placeholder!r}")
    return struct.pack("<Q", len(data)) + data
