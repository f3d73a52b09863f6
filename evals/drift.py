"""How far a candidate's vectors are from the reference's: drift = 1 - cos(candidate, reference), text by text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np
from f2gguf.evals import neighbours
from f2gguf.evals.neighbours import Vectors, choose_pairs, pair_cosines, top10_overlap, unit_rows
from f2gguf.evals.precisions import Rounded, judge_precisions
from f2gguf.evals.texts import ANSWER_KINDS, EvalText
from f2gguf.runtime.calls import described
from f2gguf.runtime.errors import InputError
from f2gguf.runtime.files import format_bound
from f2gguf.runtime.llama.runner import unusable
from numpy.typing import NDArray

MAX_DRIFT = 0.02
N_RESAMPLES = 9999


@dataclass(frozen=True)
class Drifts:
    """The drift of some texts in a few figures. Drifts are fractions: 0.02 is 2%."""

    n: int
    mean: float
    lower: float  # bootstrap 95% interval of the mean
    upper: float
    p95: float
    p99: float
    worst: float
    worst_text: str


@dataclass(frozen=True)
class Distribution(Drifts):
    """Drift of the texts that were judged, and its bound."""

    max_drift: float

    @property
    def means(self) -> dict[str, float]:
        """The means that the bound is about."""
        return {"upper end of the mean": self.upper}

    @property
    def over(self) -> tuple[str, ...]:
        """Those of `means` that are at or over the bound, with their figures: as `as_dict` rounds them."""
        means = rounded(self.means)
        return tuple(f"{name} {mean:.2%}" for name, mean in means.items() if not mean < self.max_drift)

    @property
    def holds(self) -> bool:
        return not self.over

    @property
    def label(self) -> str:
        """'under 2%' or 'OVER 2%'."""
        return f"{'under' if self.holds else 'OVER'} {format_bound(self.max_drift)}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: figures rounded to a millionth, and what follows from the rounded ones."""
        stated = rounded(self)
        return {**asdict(stated), "over": list(stated.over), "holds": stated.holds}


@dataclass(frozen=True)
class Group:
    """The texts of one language or kind."""

    n: int
    mean: float


@dataclass(frozen=True)
class Verdict(Distribution):
    """What was measured of one set of vectors."""

    kinds: Mapping[str, Group]
    languages: Mapping[str, Group]
    dims: Mapping[int, float]  # Matryoshka width -> mean drift of the truncated, renormalised vectors
    top10_overlap: float | None  # share of each query's ten nearest documents that stays; None with ten or fewer
    spearman: float | None  # rank correlation of all pairwise similarities; None for a single text
    ndcg10: float | None  # None where no text is a query whose answers are known
    ndcg10_reference: float | None
    drifts: tuple[float, ...]  # of each text, in the order of the texts
    precisions: Mapping[str, Rounded] | None = field(default=None, kw_only=True)  # int8 and binary vectors

    @property
    def groups(self) -> dict[str, Mapping[str, Group]]:
        return {"kind": self.kinds, "language": self.languages}

    @property
    def means(self) -> dict[str, float]:
        """The upper end of the mean's interval, and the mean of every kind and language."""
        groups = {f"{by} {name}": g.mean for by, named in self.groups.items() for name, g in named.items()}
        return {**super().means, **groups}

    @property
    def highest(self) -> float:
        """The highest of `means`."""
        return max(self.means.values())


def drift(candidate: Vectors, reference: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each candidate row with its reference row, (n,) float64.

    >>> drift(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))    # 1 - 1/sqrt(2)
    array([0.29289322])
    """
    return 1.0 - neighbours.cosines(candidate, reference)


def judge(
    candidate: Any,
    reference: Any,
    texts: Sequence[EvalText] | None = None,
    *,
    dims: Sequence[int] = (),
    ranges: NDArray[np.float32] | None = None,
    max_drift: float = MAX_DRIFT,
) -> Verdict:
    """The verdict on `candidate` against `reference`: vectors of the same texts, (n_texts, n_embd) each, of any origin.

    With `texts`, which describe the rows, each language and kind gets a mean of its own. The bound holds where the
    upper end of the mean's interval and all those means are under `max_drift`. `dims` are Matryoshka widths to measure
    as well. `ranges` (2, n_embd) are those of int8 vectors, which are measured where they are given. Raises
    `InputError` for vectors that cannot be compared.
    """
    candidate, reference = require_comparable(candidate, reference, texts, dims)
    names = [text.id for text in texts] if texts else [str(i) for i in range(len(candidate))]
    drifts = drift(candidate, reference)
    return Verdict(
        **distribution(drifts, names),
        kinds=_groups(drifts, texts, "kind"),
        languages=_groups(drifts, texts, "language"),
        dims={dim: float(drift(candidate[:, :dim], reference[:, :dim]).mean()) for dim in dims},
        **_rank_agreement(candidate, reference, texts or (), ranges),
        max_drift=max_drift,
        drifts=tuple(drifts.tolist()),
    )


def require_comparable(
    candidate: Any, reference: Any, texts: Sequence[EvalText] | None = None, dims: Sequence[int] = ()
) -> tuple[Vectors, Vectors]:
    """Both as arrays. Raises `InputError` unless they are finite vectors of one shape, with a row for each text."""
    pair = {"candidate": _array("candidate", candidate), "reference": _array("reference", reference)}
    for name, vectors in pair.items():
        shape, dtype = vectors.shape, vectors.dtype
        if len(shape) != 2 or not vectors.size or not np.issubdtype(dtype, np.number):
            raise InputError(f"{name}: has the shape {shape} of {dtype}, not (n_texts, n_embd) of floats.")
        if bad := unusable(vectors):
            raise InputError(
                f"{name}: {len(bad)} rows are no vectors (not finite, or zero); the first is row {bad[0]}."
            )
    ours, theirs = (v if np.issubdtype(v.dtype, np.floating) else v.astype(np.float32) for v in pair.values())
    if ours.shape != theirs.shape:
        raise InputError(f"candidate {ours.shape} and reference {theirs.shape} differ in shape: nothing to compare.")
    if other := [text for text in texts or () if not isinstance(text, EvalText)]:
        raise InputError(f"texts: describe rows with EvalText, and the first that does not is {described(other[0])}.")
    if texts is not None and len(texts) != len(ours):
        raise InputError(f"{len(ours)} vectors and {len(texts)} texts: each text needs one vector.")
    if wide := [dim for dim in dims if not 0 < dim <= ours.shape[1]]:
        raise InputError(f"dims: {wide[0]} is no width of vectors with {ours.shape[1]} dimensions.")
    return ours, theirs


def _array(name: str, vectors: Any) -> NDArray[Any]:
    try:
        return np.asarray(vectors)
    except (TypeError, ValueError) as error:  # rows of different lengths; tensors of a GPU
        raise InputError(f"{name}: is no array of vectors: {error}.") from error


def distribution(drifts: NDArray[np.float64], names: Sequence[str]) -> dict[str, Any]:
    """The fields of `Drifts`."""
    lower, upper = bootstrap_interval(drifts)
    p95, p99 = np.percentile(drifts, (95, 99)).tolist()
    figures = {"n": len(drifts), "mean": float(drifts.mean()), "lower": lower, "upper": upper, "p95": p95, "p99": p99}
    return {**figures, "worst": float(drifts.max()), "worst_text": names[int(drifts.argmax())]}


def highest_mean(drifts: NDArray[np.float64], texts: Sequence[EvalText]) -> float:
    """`Verdict.highest` of some drifts, without the rest of a verdict."""
    groups = [group.mean for by in ("kind", "language") for group in _groups(drifts, texts, by).values()]
    return max(bootstrap_interval(drifts)[1], *groups)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean, with a fixed seed so that a report can be made again."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    batch = min(1000, 10_000_000 // len(values) + 1)  # resamples in memory at a time: 160 MB at most
    result = bootstrap((values,), np.mean, n_resamples=N_RESAMPLES, method="percentile", rng=rng, batch=batch)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def percent(fraction: float) -> str:
    """0.00312 -> '0.312%'."""
    return f"{100 * fraction:.3f}%"


def rounded(value: Any) -> Any:
    """`value` with every figure in it rounded to a millionth, tuples as lists; a dataclass stays one."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: item if key == "max_drift" else rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return replace(value, **rounded(vars(value))) if is_dataclass(value) and not isinstance(value, type) else value


def json_text(document: Any) -> str:
    """JSON as f2gguf writes it: indented, in a fixed order, ended by a newline; NaN is refused, as JSON has none."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _rank_agreement(
    candidate: Vectors, reference: Vectors, texts: Sequence[EvalText], ranges: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Neighbours are the documents of each query whose answers are known; without such queries, all other rows."""
    from scipy.stats import spearmanr

    everything = np.arange(len(candidate))
    queries = np.array([i for i, text in enumerate(texts) if text.relevant], dtype=np.int64)
    documents = np.array([i for i, text in enumerate(texts) if text.kind in ANSWER_KINDS], dtype=np.int64)
    anchors, others = (queries, documents) if len(queries) else (everything, everything)
    pairs = choose_pairs(everything, everything)
    similarities = [pair_cosines(vectors, pairs) for vectors in (candidate, reference)] if len(everything) > 2 else None
    column = {texts[i].id: k for k, i in enumerate(documents)}
    relevant = [[column[name] for name in texts[i].relevant] for i in queries]

    def ndcg10(vectors: Vectors) -> float | None:
        similarity = unit_rows(vectors[queries]) @ unit_rows(vectors[documents]).T
        return neighbours.ndcg10(similarity, relevant) if relevant else None

    return {
        "top10_overlap": top10_overlap(candidate, reference, anchors, others),
        "spearman": float(spearmanr(*similarities).statistic) if similarities else None,
        "ndcg10": ndcg10(candidate),
        "ndcg10_reference": ndcg10(reference),
        "precisions": judge_precisions(candidate, reference, ranges, anchors=anchors, others=others, relevant=relevant),
    }


def _groups(drifts: NDArray[np.float64], texts: Sequence[EvalText] | None, by: str) -> dict[str, Group]:
    labels = np.array([getattr(text, by) for text in texts or ()])
    return {
        str(label): Group(int((labels == label).sum()), float(drifts[labels == label].mean()))
        for label in np.unique(labels)
    }
