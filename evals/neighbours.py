"""Which rows are similar to which: pairs, nearest neighbours and ranks, for sets of vectors of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]
Scores = NDArray[np.float64]
Indices = NDArray[np.int64]

TOP_K = 10
N_PAIRS = 200_000  # at most; more pairs are sampled
N_ANCHORS = 1_000  # rows whose neighbours are compared, at most; more are sampled
_ROWS = 4096  # rows that are computed at a time
_ANCHORS = 32  # anchors that are computed at a time, each against all others


def cosines(left: Vectors, right: Vectors) -> Scores:
    """Cosine of each row of `left` with the same row of `right`, (n,) float64, a part at a time.

    >>> cosines(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))    # 1/sqrt(2)
    array([0.70710678])
    """
    parts = [slice(start, start + _ROWS) for start in range(0, len(left), _ROWS)]
    return np.concatenate([_cosines(left[part], right[part]) for part in parts])


def pair_cosines(vectors: Vectors, pairs: tuple[Indices, Indices]) -> Scores:
    """Cosine of each pair of rows of one set, (n_pairs,) float64, a part at a time."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(pairs[0]), _ROWS)]
    return np.concatenate([_cosines(*(vectors[rows[part]] for rows in pairs)) for part in parts])


def choose_pairs(anchors: Indices, others: Indices) -> tuple[Indices, Indices]:
    """Every anchor with every other; each two rows once where both are the same set. Many pairs: a fixed sample."""
    rng, n_anchors, n_others = np.random.default_rng(0), len(anchors), len(others)
    if anchors is not others:
        total = n_anchors * n_others
        i, j = np.divmod(np.arange(total) if total <= N_PAIRS else rng.integers(total, size=N_PAIRS), n_others)
    elif n_others * (n_others - 1) // 2 <= N_PAIRS:
        i, j = np.triu_indices(n_others, k=1)
    else:
        i = rng.integers(n_others, size=N_PAIRS)
        j = (i + rng.integers(1, n_others, size=N_PAIRS)) % n_others
    return anchors[i], others[j]


def top10_overlap(candidate: Vectors, reference: Vectors, anchors: Indices, others: Indices) -> float | None:
    """Share of each anchor's ten nearest others that stays. None if there are no more than ten to choose from."""
    if not len(anchors) or len(others) - (anchors is others) <= TOP_K:
        return None
    chosen = anchors
    if len(anchors) > N_ANCHORS:
        chosen = np.random.default_rng(0).choice(anchors, N_ANCHORS, replace=False)
    ours, theirs = (_nearest(vectors, chosen, others) for vectors in (candidate, reference))
    return float(np.mean([len(np.intersect1d(a, b)) / TOP_K for a, b in zip(ours, theirs, strict=True)]))


def ndcg10(similarities: NDArray[np.floating[Any]], relevant: Sequence[Sequence[int]]) -> float:
    """Mean nDCG@10 of queries, similarities (n_queries, n_documents), relevant[i] the columns that answer query i.

    >>> ndcg10(np.array([[0.1, 0.9, 0.5]]), [[2]])               # at rank 2: 1 / log2(3)
    0.6309297535714575
    """
    discounts = 1.0 / np.log2(np.arange(2, TOP_K + 2))
    scores = []
    for row, right in zip(similarities, relevant, strict=True):
        hits = np.isin(np.argsort(-row, kind="stable")[:TOP_K], right)
        scores.append((discounts[: len(hits)] * hits).sum() / discounts[: min(len(right), TOP_K)].sum())
    return float(np.mean(scores))


def unit_rows(vectors: Vectors) -> Scores:
    """Rows of length 1, float64."""
    wide = vectors.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def _cosines(left: Vectors, right: Vectors) -> Scores:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return np.asarray((left * right).sum(axis=1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)))


def _nearest(vectors: Vectors, anchors: Indices, others: Indices) -> NDArray[np.intp]:
    """The ten others with the highest similarity to each anchor, itself left out, (n_anchors, 10) in no order."""
    table = vectors[others].astype(np.float32)
    table /= np.sqrt(np.einsum("ij,ij->i", table, table))[:, None]
    nearest = []
    for start in range(0, len(anchors), _ANCHORS):
        rows = anchors[start : start + _ANCHORS]
        scores = vectors[rows].astype(np.float32) @ table.T
        scores[rows[:, None] == others] = -np.inf
        nearest.append(np.argpartition(-scores, TOP_K - 1, axis=1)[:, :TOP_K])
    return np.concatenate(nearest)
