"""Exact search: the cosine of a query with every vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from f2gguf.runtime.index.store import Keys, Rows

MOST_NEAREST = 4096  # that an index is asked for, and sqlite-vec gives; more are searched exactly
_BLOCK_ROWS = 262_144


def nearest(vectors: Rows, queries: Rows, top: int, *, without: Keys, first: int = 0) -> tuple[Rows, Keys]:
    """Scores and keys of the `top` nearest of unit vectors for each query, the best first, both (n_queries, <= top).

    `first` is the key of the first vector. Keys in `without` are left out. Equal scores are in the order of keys.
    """
    parts: list[tuple[Rows, Keys]] = []
    for start in range(0, len(vectors), _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS]
        scores = np.ascontiguousarray((block @ queries.T).T)  # (n_queries, n_rows)
        low = first + start
        scores[:, without[(without >= low) & (without < low + len(block))] - low] = -np.inf
        n_kept = min(top, len(block))
        kept = np.argpartition(-scores, n_kept - 1, axis=1)[:, :n_kept]
        parts.append((np.take_along_axis(scores, kept, axis=1), kept + low))
    return merged(parts, top, len(queries))


def merged(parts: list[tuple[Rows, Keys]], top: int, n_queries: int) -> tuple[Rows, Keys]:
    """The best of several results; the score -inf, which stands for nothing, comes last."""
    if not parts:
        return np.zeros((n_queries, 0), np.float32), np.zeros((n_queries, 0), np.int64)
    scores = np.concatenate([part[0] for part in parts], axis=1)
    keys = np.concatenate([part[1] for part in parts], axis=1)
    order = np.lexsort((keys, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(keys, order, axis=1)


def until_enough(ask: Callable[[int], tuple[Rows, Keys]], top: int, n_most: int, without: Keys) -> tuple[Rows, Keys]:
    """What an index that takes no keys to leave out gives: `ask` for more until `top` are left, or there are no more.

    What is left out has the score -inf and the key -1.
    """
    n_asked = top
    while True:
        scores, keys = ask(max(1, min(n_asked, n_most)))
        is_out = np.isin(keys, without) | (keys < 0)
        if n_asked >= n_most or (~is_out).sum(axis=1).min() >= top:
            return np.where(is_out, np.float32(-np.inf), scores), np.where(is_out, -1, keys)
        n_asked *= 4
