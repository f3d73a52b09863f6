"""Golden vectors: probe texts in a file's header, their token ids, and the maker's measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from f2gguf.runtime.errors import SelftestMissing
from numpy.typing import NDArray

if TYPE_CHECKING:
    from f2gguf.runtime.gguf.header import Header

KEY_TEXTS = "f2gguf.golden.texts"  # without prompt
KEY_PROMPTS = "f2gguf.golden.prompts"  # a prompt's name for each text, or ""
KEY_N_TOKENS = "f2gguf.golden.n_tokens"  # of each text
KEY_TOKEN_IDS = "f2gguf.golden.token_ids"  # of all texts, one after the other
KEY_VECTORS = "f2gguf.golden.vectors"  # of the 16-bit file, n_texts * n_embd; zeros for a text that has none
KEY_COSINES = "f2gguf.golden.cosines"  # of this file's vector with that, as its maker measured it
_TYPES = {
    KEY_TEXTS: str,
    KEY_PROMPTS: str,
    KEY_N_TOKENS: int,
    KEY_TOKEN_IDS: int,
    KEY_VECTORS: float,
    KEY_COSINES: float,
}


@dataclass(frozen=True)
class Golden:
    """The probes of a file. Get them with `require_golden`."""

    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    ids: tuple[NDArray[np.int32], ...]  # by the checkpoint's own tokenizer, prompt in front, cut to the longest input
    vectors: NDArray[np.float32]  # (n_texts, n_embd)
    cosines: NDArray[np.float32]  # (n_texts,)

    @property
    def is_compared(self) -> NDArray[np.bool_]:
        """Which texts have a reference vector, (n_texts,)."""
        return np.asarray(self.vectors.any(axis=1))

    def part(self, which: Sequence[int]) -> Golden:
        """The probes `which`, by their indices."""
        return Golden(
            texts=tuple(self.texts[i] for i in which),
            prompts=tuple(self.prompts[i] for i in which),
            ids=tuple(self.ids[i] for i in which),
            vectors=self.vectors[[*which]],
            cosines=self.cosines[[*which]],
        )

    def cosines_of(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Cosines of L2-normalised `vectors` (n_texts, n_embd) with the reference, NaN for a NaN row, (n_texts,)."""
        return np.asarray(np.einsum("ij,ij->i", vectors, self.vectors, dtype=np.float64))


def has_golden(header: Header) -> bool:
    """Whether a file has golden vectors, filled in by its maker."""
    return any(header.values.get(KEY_VECTORS, ()))


def require_golden(header: Header) -> Golden:
    """The probes of a file; raises `SelftestMissing` where `has_golden` says that it has none."""
    if not has_golden(header):
        raise SelftestMissing(
            f"{header.path}: its header has no golden vectors to compare with. Make the file again with `quantize all`."
        )
    return golden_of(header)


def golden_of(header: Header) -> Golden:
    """The probes of a header that has their keys; the vectors may still be zeros."""
    values = header.values
    ends = np.cumsum(values[KEY_N_TOKENS])[:-1]
    return Golden(
        texts=values[KEY_TEXTS],
        prompts=values[KEY_PROMPTS],
        ids=tuple(np.split(np.array(values[KEY_TOKEN_IDS], dtype=np.int32), ends)),
        vectors=np.array(values[KEY_VECTORS], dtype=np.float32).reshape(-1, header.n_embd),
        cosines=np.array(values[KEY_COSINES], dtype=np.float32),
    )


def golden_flaw(values: Mapping[str, Any], n_embd: int) -> str | None:
    """A sentence on what is wrong with a header's golden values; None where nothing is, or there are none."""
    if not any(key in values for key in _TYPES):
        return None
    for key, kind in _TYPES.items():
        value = values.get(key)
        if not isinstance(value, tuple) or not value or type(value[0]) is not kind:  # an array has a single type
            return f"{key} is no array of {kind.__name__}"
        if kind is float and not math.isfinite(sum(value)):
            return f"{key} holds a number that is not finite"
    if min(values[KEY_N_TOKENS]) < 1 or min(values[KEY_TOKEN_IDS]) < 0:
        return f"{KEY_N_TOKENS} or {KEY_TOKEN_IDS} holds a negative number"
    n_texts = len(values[KEY_TEXTS])
    lengths = dict.fromkeys((KEY_PROMPTS, KEY_N_TOKENS, KEY_COSINES), n_texts)
    lengths |= {KEY_TOKEN_IDS: sum(values[KEY_N_TOKENS]), KEY_VECTORS: n_texts * n_embd}
    for key, length in lengths.items():
        if len(values[key]) != length:
            return f"{key} has {len(values[key])} elements instead of {length}"
    return None
