"""The verdict, on vectors whose answer can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from f2gguf.evals.conversion import NOT_CHECKED, ConversionCheck, compare, store
from f2gguf.evals.drift import Distribution, bootstrap_interval, drift, judge
from f2gguf.evals.neighbours import ndcg10
from f2gguf.evals.texts import EvalText
from f2gguf.runtime.errors import InputError

TEXTS = (
    EvalText("q1", "query", "en", "one", ("d1",)),
    EvalText("q2", "query", "de", "zwei", ("d2",)),
    EvalText("d1", "document", "en", "first"),
    EvalText("d2", "document", "de", "zweites"),
)
REFERENCE = np.eye(4, dtype=np.float32)[[0, 1, 0, 1]] + 0.1 * np.eye(4, dtype=np.float32)


def turned(vectors: np.ndarray, row: int, cosine: float) -> np.ndarray:
    """`vectors` with one row turned away from itself by the angle of `cosine`, towards an unused axis."""
    wide = np.hstack([vectors, np.zeros((len(vectors), 1))])
    unit = wide[row] / np.linalg.norm(wide[row])
    wide[row] = cosine * unit
    wide[row, -1] = np.sqrt(1 - cosine**2)
    return wide


def wide(vectors: np.ndarray) -> np.ndarray:
    return np.hstack([vectors, np.zeros((len(vectors), 1))])


def test_drift_is_one_minus_cosine_whatever_the_lengths() -> None:
    found = drift(np.array([[2.0, 0.0], [0.0, 5.0]]), np.array([[1.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_allclose(found, [1 - 2**-0.5, 0], atol=1e-12)


def test_verdict_of_equal_vectors_is_clean() -> None:
    verdict = judge(REFERENCE, REFERENCE, TEXTS, dims=(2, 4))
    assert verdict.holds
    assert (verdict.n, verdict.spearman) == (4, pytest.approx(1.0))
    assert verdict.top10_overlap is None, "there are not more than ten documents to choose from"
    assert verdict.mean == pytest.approx(0, abs=1e-7)
    assert verdict.ndcg10 == verdict.ndcg10_reference == 1.0
    assert set(verdict.dims) == {2, 4}


def test_verdict_names_the_worst_text_and_every_group_over_the_bound() -> None:
    verdict = judge(turned(REFERENCE, row=3, cosine=0.9), wide(REFERENCE), TEXTS, max_drift=0.02)
    assert not verdict.holds
    assert verdict.worst_text == "d2"
    assert verdict.worst == pytest.approx(0.1, abs=1e-6)
    assert verdict.mean == pytest.approx(0.025, abs=1e-6)
    assert verdict.languages["de"].mean == pytest.approx(0.05, abs=1e-6)
    assert verdict.kinds["query"].mean == pytest.approx(0, abs=1e-6)
    assert [what.rsplit(" ", 1)[0] for what in verdict.over] == [
        "upper end of the mean",
        "kind document",
        "language de",
    ]


def test_one_bad_language_is_enough_to_fail() -> None:
    texts = (*TEXTS, *(EvalText(f"d{i}", "document", "en", str(i)) for i in range(3, 200)))
    reference = np.vstack([REFERENCE, np.random.default_rng(0).standard_normal((197, 4))])
    verdict = judge(turned(reference, row=3, cosine=0.95), wide(reference), texts)
    assert verdict.upper < 0.002
    assert verdict.over == ("language de 2.50%",)


def with_row(value: float) -> np.ndarray:
    broken = REFERENCE.copy()
    broken[1] = value
    return broken


@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    [
        (with_row(np.nan), REFERENCE, "candidate: 1 rows are no vectors .* row 1"),
        (REFERENCE, with_row(0.0), "reference: 1 rows are no vectors .* row 1"),
        (REFERENCE[:3], REFERENCE, "differ in shape"),
        (REFERENCE[0], REFERENCE, r"candidate: has the shape \(4,\)"),
        ([["a"]], REFERENCE, "candidate: has the shape"),
        ([], [], "candidate: has the shape"),
        (REFERENCE[:3], REFERENCE[:3], "3 vectors and 4 texts"),
    ],
)
def test_vectors_that_cannot_be_compared_are_refused(candidate: Any, reference: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(candidate, reference, TEXTS)


def test_width_beyond_the_vectors_is_refused() -> None:
    with pytest.raises(InputError, match="dims: 5 is no width of vectors with 4 dimensions"):
        judge(REFERENCE, REFERENCE, dims=(2, 5))


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (["a", "b"], "candidate: has the shape .2,. of <U1"),
        ([[1.0, 2.0], [1.0]], "candidate: is no array of vectors"),
        ([[1.0, None], [1.0, 2.0]], "of object, not .n_texts, n_embd. of floats"),
        (float("nan"), "candidate: has the shape .. of float64"),
    ],
)
def test_what_is_no_vector_is_named(candidate: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        judge(candidate, REFERENCE)


def test_texts_of_another_kind_are_named() -> None:
    with pytest.raises(InputError, match=r"describe rows with EvalText, and the first .* is 'a' of type str"):
        judge(REFERENCE, REFERENCE, ["a"] * len(REFERENCE))  # type: ignore[list-item]


def test_anybodys_vectors_are_judged_without_texts() -> None:
    """From lists, in another precision, of rows that nobody describes: the bound is about the mean alone."""
    rng = np.random.default_rng(2)
    reference = rng.standard_normal((300, 16)).astype(np.float16)
    verdict = judge((reference + 0.05 * rng.standard_normal(reference.shape)).tolist(), reference)
    assert (verdict.n, verdict.kinds, verdict.languages, verdict.ndcg10) == (300, {}, {}, None)
    assert 0 < verdict.lower < verdict.mean < verdict.upper < 0.02
    assert verdict.worst_text == str(np.argmax(verdict.drifts))
    assert verdict.top10_overlap is not None
    assert 0.5 < verdict.top10_overlap < 1
    assert verdict.spearman is not None
    assert 0.9 < verdict.spearman < 1
    assert verdict.holds
    assert judge(reference, reference).top10_overlap == 1.0


def test_interval_covers_the_mean_and_narrows_with_more_texts() -> None:
    values = np.random.default_rng(1).exponential(0.01, 400)
    few, many = bootstrap_interval(values[:40]), bootstrap_interval(values)
    assert many[0] < values.mean() < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert bootstrap_interval(values) == many


def test_ndcg_is_the_discount_of_the_rank() -> None:
    similarities = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    assert ndcg10(similarities, [[2], [0]]) == pytest.approx((1 / np.log2(3) + 1) / 2)
    assert ndcg10(np.arange(20.0)[None], [[0]]) == 0


def test_conversion_check_takes_the_worst_text() -> None:
    check = compare(turned(REFERENCE, row=1, cosine=0.999), wide(REFERENCE), TEXTS, "a reference")
    assert (check.holds, check.worst_text, check.n) == (False, "q2", 4)
    assert check.min_cosine == pytest.approx(0.999, abs=1e-6)
    assert compare(REFERENCE, REFERENCE, TEXTS, "itself").holds is True


def test_what_was_not_checked_neither_holds_nor_fails() -> None:
    assert ConversionCheck(NOT_CHECKED, why="no torch").as_dict()["holds"] is None


def test_stored_vectors_are_found_only_for_their_own_texts(tmp_path, monkeypatch) -> None:
    from f2gguf.evals import conversion

    monkeypatch.setattr(conversion, "REFERENCES", tmp_path)
    store(tmp_path / "x.safetensors", REFERENCE, "abc", TEXTS)
    found = conversion.find_stored("abc", TEXTS)
    assert found is not None
    assert drift(found, REFERENCE).max() < 1e-6
    assert conversion.find_stored("abd", TEXTS) is None
    assert conversion.find_stored("abc", TEXTS[:3]) is None


@pytest.mark.parametrize(("upper", "holds"), [(0.0199994, True), (0.0199996, False)])
def test_header_and_report_decide_on_the_same_figures(upper: float, holds: bool) -> None:
    """drift.json has millionths, which may be at the bound where the mean itself is under it."""
    found = Distribution(3, 0.01, 0.01, upper, 0.02, 0.02, 0.02, "x", max_drift=0.02)
    assert (found.holds, found.as_dict()["holds"]) == (holds, holds)
