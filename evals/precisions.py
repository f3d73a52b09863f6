"""What vectors in fewer bits cost: the weights' drift and the vectors' rounding together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from f2gguf.evals import neighbours
from f2gguf.evals.neighbours import Indices, Scores, Vectors
from f2gguf.runtime.precision import quantized, restored
from numpy.typing import NDArray

RESCORED = 2  # times as many documents as are asked for are scored again, as in sentence-transformers


@dataclass(frozen=True)
class Rounded:
    """Vectors in one precision against the reference's in float32. Queries and documents are both rounded."""

    mean: float  # drift of what the codes stand for; binary: of vectors of 1 and -1
    top10_overlap: float | None  # share of the reference's ten nearest that stays; None with ten or fewer
    ndcg10: float | None  # by the codes alone; None where no text is a query whose answers are known
    ndcg10_rescored: float | None  # of the best 20 by the codes, ranked again by float32 queries


def judge_precisions(
    candidate: Vectors,
    reference: Vectors,
    ranges: NDArray[np.float32] | None,
    *,
    anchors: Indices,
    others: Indices,
    relevant: Sequence[Sequence[int]],
) -> dict[str, Rounded]:
    """The candidate's vectors as binary, and as int8 where `ranges` (2, n_embd) are known.

    Neighbours of `anchors` are looked for among `others`; `relevant[i]` are the places in `others` that answer the
    anchor i, where there are such anchors.
    """
    unit = neighbours.unit_rows(candidate).astype(np.float32)
    stands_for = {"binary": np.where(unit > 0, 1.0, -1.0).astype(np.float32)}
    searched = dict(stands_for)
    if ranges is not None:
        stands_for["int8"] = restored(quantized(unit, "uint8", ranges), ranges)
        searched["int8"] = quantized(unit, "int8", ranges).astype(np.float32)  # an index compares the codes

    def judged(name: str) -> Rounded:
        codes, meant = searched[name], stands_for[name]
        ndcg: tuple[float | None, float | None] = None, None
        if relevant:
            found = neighbours.unit_rows(codes[anchors]) @ neighbours.unit_rows(codes[others]).T
            again = _rescored(found, unit[anchors] @ meant[others].T)
            ndcg = neighbours.ndcg10(found, relevant), neighbours.ndcg10(again, relevant)
        kept = neighbours.top10_overlap(codes, reference, anchors, others)
        return Rounded(float(1 - neighbours.cosines(meant, reference).mean()), kept, *ndcg)

    return {name: judged(name) for name in ("int8", "binary") if name in searched}


def _rescored(found: Scores, again: NDArray[Any]) -> NDArray[Any]:
    """`again` for the best columns of each row of `found`, and nothing for all others."""
    n_kept = min(RESCORED * neighbours.TOP_K, found.shape[1])
    best = np.argsort(-found, axis=1, kind="stable")[:, :n_kept]
    scores = np.full(found.shape, -np.inf)
    np.put_along_axis(scores, best, np.take_along_axis(again, best, axis=1), axis=1)
    return scores
