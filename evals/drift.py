"""How far a variant's vectors are from the reference's: drift = 1 - cos(candidate, reference), text by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from f2gguf.evals.texts import EvalText
from f2gguf.runtime.files import format_bound
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]
MAX_DRIFT = 0.02
TOP_K = 10
N_RESAMPLES = 9999


@dataclass(frozen=True)
class Group:
    """The texts of one language or kind."""

    n: int
    mean: float


@dataclass(frozen=True)
class Verdict:
    """What was measured of one variant. All drifts are fractions: 0.02 is 2%."""

    n: int
    mean: float
    lower: float  # bootstrap 95% interval of the mean
    upper: float
    p95: float
    p99: float
    worst: float
    worst_text: str
    kinds: dict[str, Group]
    languages: dict[str, Group]
    dims: dict[int, float]  # Matryoshka width -> mean drift of the truncated, renormalised vectors
    top10_overlap: float  # share of each query's ten nearest documents that stays
    spearman: float  # rank correlation of all pairwise similarities
    ndcg10: float
    ndcg10_reference: float
    max_drift: float
    over: tuple[str, ...]  # what is at or over the bound
    drifts: tuple[float, ...]  # of each text, in the order of the texts

    @property
    def holds(self) -> bool:
        return not self.over

    @property
    def highest(self) -> float:
        """The highest of what the bound is over."""
        groups = [group.mean for by in (self.kinds, self.languages) for group in by.values()]
        return max(self.upper, *groups)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, drifts rounded to a millionth."""
        return {**rounded(asdict(self)), "holds": self.holds}


def drift(candidate: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each candidate row with its reference row, (n,) float64.

    >>> drift(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))    # 1 - 1/sqrt(2)
    array([0.29289322])
    """
    left, right = (vectors.astype(np.float64) for vectors in (candidate, reference))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray(1.0 - (left * right).sum(axis=1) / norms)


def judge(
    candidate: Vectors,
    reference: Vectors,
    texts: Sequence[EvalText],
    *,
    dims: Sequence[int] = (),
    max_drift: float = MAX_DRIFT,
) -> Verdict:
    """The verdict on `candidate` against `reference`, both (n_texts, n_embd), row i the vector of texts[i].

    The bound holds when the upper end of the mean's interval, and the mean of every language and every kind, are under
    `max_drift`.
    """
    drifts = drift(candidate, reference)
    kinds, languages = (_groups(drifts, texts, by) for by in ("kind", "language"))
    means = bound_means(drifts, texts)
    over = tuple(f"{what} {mean:.2%}" for what, mean in means.items() if not mean < max_drift)
    return Verdict(
        **distribution(drifts, texts),
        kinds=kinds,
        languages=languages,
        dims={dim: float(drift(candidate[:, :dim], reference[:, :dim]).mean()) for dim in dims},
        **_rank_agreement(candidate, reference, texts),
        max_drift=max_drift,
        over=over,
        drifts=tuple(drifts.tolist()),
    )


def distribution(drifts: NDArray[np.float64], texts: Sequence[EvalText]) -> dict[str, Any]:
    """What a verdict states of the drifts of all texts."""
    lower, upper = bootstrap_interval(drifts)
    return {
        "n": len(texts),
        "mean": float(drifts.mean()),
        "lower": lower,
        "upper": upper,
        "p95": float(np.percentile(drifts, 95)),
        "p99": float(np.percentile(drifts, 99)),
        "worst": float(drifts.max()),
        "worst_text": texts[int(drifts.argmax())].id,
    }


def bound_means(drifts: NDArray[np.float64], texts: Sequence[EvalText]) -> dict[str, float]:
    """What the bound is over: the upper end of the mean's interval, the mean of every kind and of every language."""
    means = {"upper end of the mean": bootstrap_interval(drifts)[1]}
    for by in ("kind", "language"):
        means |= {f"{by} {name}": group.mean for name, group in _groups(drifts, texts, by).items()}
    return means


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean, with a fixed seed so that a report can be made again."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    batch = min(1000, 10_000_000 // len(values) + 1)  # resamples in memory at a time: 160 MB at most
    found = bootstrap((values,), np.mean, n_resamples=N_RESAMPLES, method="percentile", rng=rng, batch=batch)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ndcg10(similarities: NDArray[np.floating[Any]], relevant: Sequence[Sequence[int]]) -> float:
    """Mean nDCG@10 of queries, similarities (n_queries, n_documents), relevant[i] the columns that answer query i.

    >>> ndcg10(np.array([[0.1, 0.9, 0.5]]), [[2]])               # found at rank 2: 1 / log2(3)
    0.6309297535714575
    """
    discounts = 1.0 / np.log2(np.arange(2, TOP_K + 2))
    scores = []
    for row, wanted in zip(similarities, relevant, strict=True):
        hits = np.isin(_top(row), wanted)
        scores.append((discounts[: len(hits)] * hits).sum() / discounts[: min(len(wanted), TOP_K)].sum())
    return float(np.mean(scores))


def _rank_agreement(candidate: Vectors, reference: Vectors, texts: Sequence[EvalText]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    index = {text.id: i for i, text in enumerate(texts)}
    queries = [i for i, text in enumerate(texts) if text.relevant]
    documents = [i for i, text in enumerate(texts) if text.kind in ("document", "code", "long")]
    column = {i: k for k, i in enumerate(documents)}
    relevant = [[column[index[name]] for name in texts[i].relevant] for i in queries]
    pairs = np.triu_indices(len(texts), k=1)
    ours, theirs = (_normalized(vectors) for vectors in (candidate, reference))
    found = ours[queries] @ ours[documents].T
    wanted = theirs[queries] @ theirs[documents].T
    kept = [len(np.intersect1d(_top(a), _top(b))) / len(_top(b)) for a, b in zip(found, wanted, strict=True)]
    return {
        "top10_overlap": float(np.mean(kept)),
        "spearman": float(spearmanr((ours @ ours.T)[pairs], (theirs @ theirs.T)[pairs]).statistic),
        "ndcg10": ndcg10(found, relevant),
        "ndcg10_reference": ndcg10(wanted, relevant),
    }


def _top(row: NDArray[np.floating[Any]]) -> NDArray[np.intp]:
    return np.argsort(-row, kind="stable")[:TOP_K]


def _normalized(vectors: Vectors) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def _groups(drifts: NDArray[np.float64], texts: Sequence[EvalText], by: str) -> dict[str, Group]:
    labels = np.array([getattr(text, by) for text in texts])
    return {
        str(label): Group(int((labels == label).sum()), float(drifts[labels == label].mean()))
        for label in np.unique(labels)
    }


def label(verdict: dict[str, Any]) -> str:
    return f"{'under' if verdict['holds'] else 'OVER'} {format_bound(verdict['max_drift'])}"


def percent(fraction: float) -> str:
    """0.00312 -> '0.312%'."""
    return f"{100 * fraction:.3f}%"


def rounded(value: Any) -> Any:
    """`value` with every float in it rounded to a millionth, tuples as lists."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
