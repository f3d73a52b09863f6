"""Which texts go through llama.cpp together: equal ones once, like lengths side by side, shared beginnings apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

MIN_SHARED = 4  # fewer shared tokens do not pay for the pass of their own that they take


def unique(texts: Sequence[Ids]) -> tuple[list[Ids], NDArray[np.intp]]:
    """The different token sequences in order of appearance, and for every text the index of its own, (n_texts,).

    >>> unique([a, b, a])    # [a, b], [0, 1, 0]
    """
    rows: dict[bytes, int] = {}
    inverse = np.array([rows.setdefault(ids.tobytes(), len(rows)) for ids in texts], dtype=np.intp)
    return [np.frombuffer(data, dtype=np.int32) for data in rows], inverse


def shared_length(texts: Sequence[Ids]) -> int:
    """How many leading token ids all texts have in common; every text keeps at least one token of its own.

    0 for fewer than two texts, and where it is under MIN_SHARED.
    """
    if len(texts) < 2:
        return 0
    first, n = texts[0], min(map(len, texts)) - 1
    for ids in texts[1:]:
        n = leading_length(first[:n], ids[:n])
        if n < MIN_SHARED:
            return 0
    return n


def leading_length(left: Ids, right: Ids) -> int:
    """Number of equal leading ids of two sequences."""
    n = min(len(left), len(right))
    differing = np.flatnonzero(left[:n] != right[:n])
    return int(differing[0]) if len(differing) else n


def pack(lengths: Sequence[int], *, n_tokens: int, n_texts: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of up to `n_tokens` and `n_texts`; longer ones alone."""
    batch: list[int] = []
    used = 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batch and (used + lengths[i] > n_tokens or len(batch) == n_texts):
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += lengths[i]
    if batch:
        yield batch
