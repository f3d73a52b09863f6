"""Drift on texts of the user's own, and what it does to their similarity scores, neighbours and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from f2gguf.evals.drift import MAX_DRIFT, Distribution, distribution, drift, percent, require_comparable
from f2gguf.evals.neighbours import Indices, Scores, Vectors, choose_pairs, pair_cosines, top10_overlap
from f2gguf.evals.texts import EvalText
from f2gguf.runtime.console import text_table
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.files import format_size
from f2gguf.runtime.tables.texts import read_texts

QUANTILES = (0.5, 0.9, 0.99, 0.999)  # of the reference's scores: the thresholds when the user names none
COLUMNS = ("file", "size", "texts", "mean drift", "95% interval", "p95", "p99", "worst", "top-10 kept", "verdict")
THRESHOLD_COLUMNS = ("scores from", "reference keeps", "file keeps", "file keeps as many from")


@dataclass(frozen=True)
class Threshold:
    """A similarity from which a pair counts, and the one that counts as many pairs of the candidate's scores."""

    reference: float
    kept: float  # share of the pairs that the reference has at or above it
    kept_unchanged: float  # share that the candidate has at or above the same
    candidate: float | None  # None where the reference keeps no pair


@dataclass(frozen=True)
class CorpusVerdict(Distribution):
    """What was measured on a corpus. Drifts are fractions, scores are cosines. Equal texts count once."""

    n_queries: int
    n_duplicates: int
    top10_overlap: float | None  # None where no text has more than ten to choose from
    n_pairs: int
    mean_score_shift: float  # of |candidate's score - reference's|
    p95_score_shift: float
    thresholds: tuple[Threshold, ...]


def read_corpus(source: str, *, column: str | None = None) -> tuple[EvalText, ...]:
    """The texts of a file that `read_texts` reads; rows of the kind "query" are queries, all others documents.

    Raises `WrongUsage` for fewer than two different texts, besides the errors of `read_texts`.
    """
    rows = read_texts(source, column=column)
    kinds = ["query" if kind == "query" else "document" for kind in rows.kinds]
    names = [f"row {i}" if row_id is None else str(row_id) for i, row_id in enumerate(rows.ids, start=1)]
    labels = zip(names, kinds, rows.texts, strict=True)
    texts = tuple(EvalText(name, kind, "und", text) for name, kind, text in labels)
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
    candidate, reference = require_comparable(candidate, reference, texts)
    kept = _different(texts)
    is_query = np.array([texts[i].kind == "query" for i in kept])
    anchors, others = (kept[is_query], kept[~is_query]) if 0 < is_query.sum() < len(kept) else (kept, kept)
    pairs = choose_pairs(anchors, others)
    drifts = drift(candidate[kept], reference[kept])
    ours, theirs = (pair_cosines(vectors, pairs) for vectors in (candidate, reference))
    shifts = np.abs(ours - theirs)
    return CorpusVerdict(
        **distribution(drifts, [texts[i].id for i in kept]),
        n_queries=int(is_query.sum()),
        n_duplicates=len(texts) - len(kept),
        top10_overlap=top10_overlap(candidate, reference, anchors, others),
        n_pairs=len(shifts),
        mean_score_shift=float(shifts.mean()),
        p95_score_shift=float(np.percentile(shifts, 95)),
        thresholds=_thresholds(ours, theirs, thresholds or _quantiles(theirs)),
        max_drift=max_drift,
    )


def corpus_lines(path: Path, verdict: CorpusVerdict) -> list[str]:
    """The verdict for a terminal."""
    row = [
        path.name,
        format_size(path.stat().st_size),
        str(verdict.n),
        percent(verdict.mean),
        f"{percent(verdict.lower)} to {percent(verdict.upper)}",
        percent(verdict.p95),
        percent(verdict.p99),
        f"{percent(verdict.worst)} ({verdict.worst_text})",
        "" if verdict.top10_overlap is None else f"{verdict.top10_overlap:.1%}",
        verdict.label,
    ]
    n_queries, n_documents = verdict.n_queries, verdict.n - verdict.n_queries
    of = f"{n_queries} queries and {n_documents} documents" if n_queries and n_documents else f"{verdict.n} texts"
    equal = f" ({verdict.n_duplicates} more rows repeat one of them)" if verdict.n_duplicates else ""
    rows = [
        (
            f"{t.reference:.4f}",
            f"{t.kept:.2%}",
            f"{t.kept_unchanged:.2%}",
            f"{t.candidate:.4f}" if t.kept else "no score",
        )
        for t in verdict.thresholds
    ]
    return [
        text_table(COLUMNS, [row]),
        "",
        f"similarity scores, {verdict.n_pairs} pairs of {of}{equal}:",
        f"  move by {verdict.mean_score_shift:.4f} in the mean, {verdict.p95_score_shift:.4f} at the 95th percentile",
        "",
        text_table(THRESHOLD_COLUMNS, rows),
    ]


def _different(texts: Sequence[EvalText]) -> Indices:
    """Where each different text, as its kind, stands first."""
    first = {(text.kind == "query", text.text): i for i, text in reversed(list(enumerate(texts)))}
    return np.array(sorted(first.values()), dtype=np.int64)


def _quantiles(scores: Scores) -> list[float]:
    """The QUANTILES that at least ten pairs reach, or the median."""
    shares = [share for share in QUANTILES if (1 - share) * len(scores) >= 10] or QUANTILES[:1]
    return [float(score) for score in np.quantile(scores, shares)]


def _thresholds(ours: Scores, theirs: Scores, values: Sequence[float]) -> tuple[Threshold, ...]:
    ascending, thresholds = np.sort(ours), []
    for value in values:
        n_kept = int((theirs >= value).sum())
        candidate = float(ascending[-n_kept]) if n_kept else None
        thresholds.append(Threshold(float(value), n_kept / len(theirs), float((ours >= value).mean()), candidate))
    return tuple(thresholds)
