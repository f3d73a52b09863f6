"""The bytes of a text file become text: UTF-8, or what a byte order mark states. All else is an error."""

from __future__ import annotations

from f2gguf.runtime.errors import InputError

PACKED = {  # ending -> how such a file begins, and what unpacks it
    ".gz": (b"\x1f\x8b", "gunzip --keep"),
    ".bz2": (b"BZh91AY&SY", "bunzip2 --keep"),
    ".xz": (b"\xfd7zXZ\0", "unxz --keep"),
    ".zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
    ".zip": (b"PK\x03\x04", "unzip"),
}
_MARKS = {  # byte order mark -> encoding; the longer ones first
    b"\xff\xfe\0\0": "UTF-32LE",
    b"\0\0\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
    b"\xef\xbb\xbf": "UTF-8",
}


def decoded(name: str, data: bytes) -> str:
    """Text in UTF-8, or in the encoding that the byte order mark at its beginning states."""
    for ending, (beginning, command) in PACKED.items():
        if data.startswith(beginning):
            raise InputError(f"{name}: is no text, but packed as {ending} files are. Unpack it first ({command}).")
    mark = next(filter(data.startswith, _MARKS), b"")
    encoding, data = _MARKS.get(mark, "UTF-8"), data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="ignore").count("\n") + 1
        flaw = f"is not {encoding} ({error.reason})"
    else:
        if "\0" not in text:
            return text
        line = text[: text.index("\0")].count("\n") + 1
        flaw = "holds NUL characters, as UTF-16 without a byte order mark does, or what is no text"
    raise InputError(
        f"{name}, line {line}: {flaw}. Convert it to UTF-8, from the encoding that it has. It may be "
        f"{_likely_encoding(data)}: iconv -f {_likely_encoding(data)} -t UTF-8"
    )


def _likely_encoding(data: bytes) -> str:
    """By where its zeros are: an ASCII character has three of them in UTF-32, and one in UTF-16."""
    even, odd = data[::2].count(0), data[1::2].count(0)
    if not even + odd:
        return "ISO-8859-1"
    width = 32 if min(even, odd) > max(even, odd) / 3 else 16
    return f"UTF-{width}{'BE' if even > odd else 'LE'}"
