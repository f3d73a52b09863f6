"""The vocabulary in a header: its tokens, their types and the merges, which `read_header` only counts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from f2gguf.runtime.gguf.entries import leading_bytes
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.gguf.reader import LongArray
from numpy.typing import NDArray

KEY_TOKENS = "tokenizer.ggml.tokens"
KEY_TYPES = "tokenizer.ggml.token_type"
KEY_SCORES = "tokenizer.ggml.scores"
KEY_MERGES = "tokenizer.ggml.merges"
KEY_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens

_STRING = 8
# numbers of the GGUF types of charsmaps, token types and scores -> their layout
_LAYOUTS = {0: "u1", 1: "i1", 4: "<u4", 5: "<i4", 6: "<f4"}


class Vocabulary:
    """The arrays of a vocabulary, each read when it is asked for; None where the header has none of the right type."""

    def __init__(self, header: Header) -> None:
        self._header = header

    @property
    def n_tokens(self) -> int:
        return len(self.tokens or ())

    @cached_property
    def tokens(self) -> list[bytes] | None:
        return self._strings(KEY_TOKENS)

    @cached_property
    def merges(self) -> list[bytes] | None:
        return self._strings(KEY_MERGES)

    @cached_property
    def types(self) -> NDArray[Any] | None:
        return self.numbers(KEY_TYPES)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """Token -> its id; of a token that is there twice the last one, as in llama.cpp."""
        return {token: i for i, token in enumerate(self.tokens or ())}

    def text(self, token_id: object) -> str | None:
        """How the header spells a token; None for an id that is none."""
        tokens = self.tokens or []
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            return None
        return tokens[token_id].decode("utf-8", errors="replace")

    @cached_property
    def _data(self) -> bytes:
        return leading_bytes(self._header)

    def _array(self, key: str) -> tuple[int, int, int] | None:
        """Type and length of an array, and where its first value begins."""
        if not isinstance(self._header.values.get(key), (tuple, LongArray)):
            return None
        at = self._header.offsets[key]
        kind, length = struct.unpack_from("<IQ", self._data, at)
        return kind, length, at + 12

    def _strings(self, key: str) -> list[bytes] | None:
        kind, length, at = self._array(key) or (0, 0, 0)
        if kind != _STRING:
            return None
        length_at, data, found = struct.Struct("<Q").unpack_from, self._data, []
        for _ in range(length):
            end = at + 8 + length_at(data, at)[0]
            found.append(data[at + 8 : end])
            at = end
        return found

    def numbers(self, key: str) -> NDArray[Any] | None:
        """An array of numbers; None where the header has none of a known type."""
        kind, length, at = self._array(key) or (_STRING, 0, 0)
        return np.frombuffer(self._data, _LAYOUTS[kind], length, at) if kind in _LAYOUTS else None


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE, as GPT-2's `bytes_to_unicode` gives it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def product(merge: bytes) -> bytes:
    """The token that a merge makes: b"ab c" -> b"abc". The blank may not be the first letter, as in llama.cpp."""
    at = merge.find(b" ", 1)
    return b"" if at < 0 else merge[:at] + merge[at + 1 :]


def shown(tokens: Sequence[bytes]) -> str:
    """The first few of some tokens, for people."""
    words = [repr(token.decode("utf-8", errors="replace")) for token in tokens[:3]]
    return ", ".join(words) + ", ..." * (len(tokens) > 3)
