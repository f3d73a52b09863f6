"""The bytes of a text file become blocks of text: UTF-8, or what a byte order mark states. All else is an error."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from f2gguf.runtime.errors import InputError

_BLOCK_BYTES = 1 << 18


class Zstandard(io.RawIOBase):
    """A .zst file as it was before it was packed, read by pyarrow."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Begin again; only places from the beginning are found, by reading up to them."""
        from pyarrow import CompressedInputStream, PythonFile

        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("seek from another place than the beginning")
        self._file.seek(0)
        again = io.FileIO(os.dup(self._file.fileno()))  # which the stream closes
        self._stream = CompressedInputStream(PythonFile(again, mode="r"), "zstd")
        self._stream.read(offset)
        return offset

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        return bytes(self._stream.read(None if size < 0 else size))


class Packing(NamedTuple):
    beginning: bytes  # of such a file
    command: str  # that unpacks it
    opened: Callable[[Any], Any] | None = None  # where there is a reader


PACKED = {
    ".gz": Packing(b"\x1f\x8b", "gunzip --keep", gzip.open),
    ".bz2": Packing(b"BZh91AY&SY", "bunzip2 --keep", bz2.open),
    ".xz": Packing(b"\xfd7zXZ\0", "unxz --keep", lzma.open),
    ".zst": Packing(b"\x28\xb5\x2f\xfd", "unzstd", Zstandard),
    ".zip": Packing(b"PK\x03\x04", "unzip"),
}
_N_BEGINNING = max(len(packing.beginning) for packing in PACKED.values())
_MARKS = {  # byte order mark -> encoding; the longer ones first
    b"\xff\xfe\0\0": "UTF-32LE",
    b"\0\0\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
    b"\xef\xbb\xbf": "UTF-8",
}


def decoded(name: str, file: BinaryIO) -> Iterator[str]:
    """The text of a file in blocks: UTF-8, or the encoding that the byte order mark at its beginning states."""
    file.seek(0)
    beginning = file.read(_N_BEGINNING)
    for ending, packing in PACKED.items():
        if beginning.startswith(packing.beginning):
            how = f"Unpack it first ({packing.command})"
            raise InputError(f"{name}: is no text, but packed as {ending} files are. {how}.")
    mark = next(filter(beginning.startswith, _MARKS), b"")
    file.seek(len(mark))
    encoding, n_lines, is_last = _MARKS.get(mark, "UTF-8"), 1, False
    decoder = codecs.getincrementaldecoder(encoding)()
    while not is_last:
        is_last = not (data := file.read(_BLOCK_BYTES))
        try:
            text = decoder.decode(data, is_last)
        except UnicodeDecodeError as error:
            n_lines += error.object[: error.start].decode(encoding, errors="ignore").count("\n")
            raise _other_encoding(name, n_lines, f"is not {encoding} ({error.reason})", error.object) from error
        if "\0" in text:
            n_lines += text[: text.index("\0")].count("\n")
            flaw = "holds NUL characters, as UTF-16 without a byte order mark does, or what is no text"
            raise _other_encoding(name, n_lines, flaw, data)
        n_lines += text.count("\n")
        if text:
            yield text


def _other_encoding(name: str, line: int, flaw: str, data: bytes) -> InputError:
    encoding = _likely_encoding(data)
    return InputError(
        f"{name}, line {line}: {flaw}. Convert it to UTF-8, from the encoding that it has. It may be "
        f"{encoding}: iconv -f {encoding} -t UTF-8"
    )


def _likely_encoding(data: bytes) -> str:
    """By where its zeros are: an ASCII character has three of them in UTF-32, and one in UTF-16."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if not even + odd:
        return "ISO-8859-1"
    width = 32 if min(even, odd) > max(even, odd) / 3 else 16
    return f"UTF-{width}{'BE' if even > odd else 'LE'}"
