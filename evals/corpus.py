"""Drift on texts of the user's own, and what it does to their similarity scores, neighbours and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.drift import MAX_DRIFT, TOP_K, Vectors, distribution, drift, label, percent, rounded
from f2gguf.evals.texts import EvalText
from f2gguf.runtime.console import text_table
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.files import format_size
from f2gguf.runtime.tables import read_texts
from numpy.typing import NDArray

N_PAIRS = 200_000  # more are sampled
N_ANCHORS = 1_000  # texts whose nearest neighbours are compared; more are sampled
QUANTILES = (0.5, 0.9, 0.99, 0.999)  # of the reference's scores, as thresholds
COLUMNS = ("file", "size", "texts", "mean drift", "95% interval", "p95", "p99", "worst", "top-10 kept", "verdict")
THRESHOLD_COLUMNS = ("scores from", "reference keeps", "file keeps", "file keeps as many from")
_ROWS = 4096  # computed at a time
_ANCHORS = 32  # likewise, each against all others
Scores = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Threshold:
    """A similarity from which a pair counts, and the one that counts as many pairs of the candidate's scores."""

    reference: float
    kept: float  # share of the pairs that the reference has at or above it
    kept_unchanged: float  # share that the candidate has at or above the same
    candidate: float | None  # None where the reference keeps no pair


@dataclass(frozen=True)
class CorpusVerdict:
    """What was measured on a corpus. Drifts are fractions, scores cosines; equal texts count once."""

    n: int
    n_queries: int
    n_duplicates: int
    mean: float
    lower: float  # bootstrap 95% interval of the mean
    upper: float
    p95: float
    p99: float
    worst: float
    worst_text: str
    top10_overlap: float | None  # None where no text has more than ten to choose from
    n_pairs: int
    mean_score_shift: float  # of |candidate's score - reference's|
    p95_score_shift: float
    thresholds: tuple[Threshold, ...]
    max_drift: float

    @property
    def over(self) -> tuple[str, ...]:
        return () if self.upper < self.max_drift else (f"upper end of the mean {self.upper:.2%}",)

    @property
    def holds(self) -> bool:
        return not self.over

    def as_dict(self) -> dict[str, Any]:
        """For JSON, figures rounded to a millionth."""
        return {**rounded(asdict(self)), "over": list(self.over), "holds": self.holds}


def read_corpus(source: str, *, column: str = "text") -> tuple[EvalText, ...]:
    """The texts of a .txt, .jsonl or .csv file; rows of the kind "query" are queries, all others documents.

    Raises `WrongUsage` for fewer than two different texts, besides the errors of `read_texts`.
    """
    rows = read_texts(source, column=column)
    texts = tuple(
        EvalText(str(row_id), "query" if kind == "query" else "document", "und", text)
        for row_id, text, kind in zip(rows.ids, rows.texts, rows.kinds, strict=True)
    )
    if (n := len(_different(texts))) < 2:
        raise WrongUsage(f"{source}: holds {n} different texts; drift of scores takes at least 2 (--corpus).")
    return texts


def judge_corpus(
    candidate: Vectors,
    reference: Vectors,
    texts: Sequence[EvalText],
    *,
    thresholds: Sequence[float] = (),
    max_drift: float = MAX_DRIFT,
) -> CorpusVerdict:
    """The verdict on `candidate` against `reference`, both (n_texts, n_embd), row i the vector of texts[i].

    Scores are those of queries with documents, or of all pairs where there are not both. The bound holds when the upper
    end of the mean's interval is under `max_drift`.
    """
    kept = _different(texts)
    is_query = np.array([texts[i].kind == "query" for i in kept])
    anchors, others = (kept[is_query], kept[~is_query]) if 0 < is_query.sum() < len(kept) else (kept, kept)
    left, right = _pairs(anchors, others)
    drifts = _drifts(candidate, reference, kept, kept)
    found, wanted = (1.0 - _drifts(vectors, vectors, left, right) for vectors in (candidate, reference))
    shifts = np.abs(found - wanted)
    return CorpusVerdict(
        **distribution(drifts, [texts[i] for i in kept]),
        n_queries=int(is_query.sum()),
        n_duplicates=len(texts) - len(kept),
        top10_overlap=_overlap(candidate, reference, anchors, others),
        n_pairs=len(left),
        mean_score_shift=float(shifts.mean()),
        p95_score_shift=float(np.percentile(shifts, 95)),
        thresholds=_thresholds(found, wanted, thresholds or _quantiles(wanted)),
        max_drift=max_drift,
    )


def corpus_lines(path: Path, verdict: CorpusVerdict) -> list[str]:
    """The verdict for a terminal."""
    row = [path.name, format_size(path.stat().st_size), str(verdict.n), percent(verdict.mean)]
    row += [f"{percent(verdict.lower)} to {percent(verdict.upper)}", percent(verdict.p95), percent(verdict.p99)]
    row += [f"{percent(verdict.worst)} ({verdict.worst_text})"]
    row += ["" if verdict.top10_overlap is None else f"{verdict.top10_overlap:.1%}", label(verdict.as_dict())]
    n_queries, n_documents = verdict.n_queries, verdict.n - verdict.n_queries
    of = f"{n_queries} queries and {n_documents} documents" if n_queries and n_documents else f"{verdict.n} texts"
    equal = f" ({verdict.n_duplicates} more rows repeat one of them)" if verdict.n_duplicates else ""
    lines = [
        text_table(COLUMNS, [row]),
        "",
        f"similarity scores, {verdict.n_pairs} pairs of {of}{equal}:",
        f"  move by {verdict.mean_score_shift:.4f} in the mean, {verdict.p95_score_shift:.4f} at the 95th percentile",
    ]
    rows = [
        [f"{t.reference:.4f}", f"{t.kept:.2%}", f"{t.kept_unchanged:.2%}", _score(t.candidate)]
        for t in verdict.thresholds
    ]
    return [*lines, "", text_table(THRESHOLD_COLUMNS, rows)]


def _score(score: float | None) -> str:
    return "no score" if score is None else f"{score:.4f}"


def _different(texts: Sequence[EvalText]) -> Indices:
    """Where each different text, as its kind, stands first."""
    first = {(text.kind == "query", text.text): i for i, text in reversed(list(enumerate(texts)))}
    return np.array(sorted(first.values()), dtype=np.int64)


def _pairs(anchors: Indices, others: Indices) -> tuple[Indices, Indices]:
    """Every anchor with every other, or each two texts once where they are the same; a fixed sample of many."""
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


def _drifts(candidate: Vectors, reference: Vectors, left: Indices, right: Indices) -> Scores:
    """Drift of the rows `left` of one from the rows `right` of the other, (n,), a part at a time."""
    parts = [slice(start, start + _ROWS) for start in range(0, len(left), _ROWS)]
    return np.concatenate([drift(candidate[left[part]], reference[right[part]]) for part in parts])


def _overlap(candidate: Vectors, reference: Vectors, anchors: Indices, others: Indices) -> float | None:
    """Share of each anchor's ten nearest others that stays."""
    if len(others) - (anchors is others) <= TOP_K:
        return None
    chosen = anchors
    if len(anchors) > N_ANCHORS:
        chosen = np.random.default_rng(0).choice(anchors, N_ANCHORS, replace=False)
    found, wanted = (_nearest(vectors, chosen, others) for vectors in (candidate, reference))
    return float(np.mean([len(np.intersect1d(a, b)) / TOP_K for a, b in zip(found, wanted, strict=True)]))


def _nearest(vectors: Vectors, anchors: Indices, others: Indices) -> NDArray[np.intp]:
    """Which ten others score highest with each anchor, itself left out, (n_anchors, 10) in no order."""
    table = vectors[others].astype(np.float32)
    table /= np.sqrt(np.einsum("ij,ij->i", table, table))[:, None]
    found = []
    for start in range(0, len(anchors), _ANCHORS):
        rows = anchors[start : start + _ANCHORS]
        scores = vectors[rows].astype(np.float32) @ table.T
        scores[rows[:, None] == others] = -np.inf
        found.append(np.argpartition(-scores, TOP_K - 1, axis=1)[:, :TOP_K])
    return np.concatenate(found)


def _quantiles(scores: Scores) -> list[float]:
    """The QUANTILES that at least ten pairs reach, or the median."""
    shares = [share for share in QUANTILES if (1 - share) * len(scores) >= 10] or QUANTILES[:1]
    return [float(score) for score in np.quantile(scores, shares)]


def _thresholds(found: Scores, wanted: Scores, values: Sequence[float]) -> tuple[Threshold, ...]:
    ascending = np.sort(found)
    thresholds = []
    for value in values:
        n_kept = int((wanted >= value).sum())
        candidate = float(ascending[-n_kept]) if n_kept else None
        kept, kept_unchanged = n_kept / len(wanted), float((found >= value).mean())
        thresholds.append(Threshold(float(value), kept, kept_unchanged, candidate))
    return tuple(thresholds)
