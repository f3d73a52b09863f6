"""Drift on texts of one's own, on vectors whose answer can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from f2gguf.evals import neighbours
from f2gguf.evals.corpus import CorpusVerdict, corpus_lines, judge_corpus, read_corpus
from f2gguf.evals.drift import bootstrap_interval
from f2gguf.evals.texts import EvalText
from f2gguf.runtime.errors import InputError, WrongUsage

RNG = np.random.default_rng(0)


def texts_of(n: int, *, n_queries: int = 0) -> list[EvalText]:
    return [EvalText(f"t{i}", "query" if i < n_queries else "document", "und", f"text {i}") for i in range(n)]


def at_angles(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane: the score of two is the cosine of the angle between them."""
    return np.array([[np.cos(np.radians(a)), np.sin(np.radians(a))] for a in degrees])


def noisy(vectors: np.ndarray, noise: float) -> np.ndarray:
    return vectors + noise * np.random.default_rng(1).standard_normal(vectors.shape)


def test_scores_move_by_the_cosines_between_the_texts() -> None:
    """The second text turns by 60 degrees: its scores with the others change from 1 and 0 to 0.5 and 0.866."""
    verdict = judge_corpus(at_angles(0, 60, 90), at_angles(0, 0, 90), texts_of(3))
    assert verdict.n_pairs == 3
    assert verdict.mean_score_shift == pytest.approx((0.5 + 0.8660254 + 0) / 3)
    assert (verdict.worst_text, verdict.worst) == ("t1", pytest.approx(0.5))
    assert verdict.mean == pytest.approx(0.5 / 3)
    assert verdict.over == (f"upper end of the mean {verdict.upper:.2%}",)


def test_a_threshold_moves_to_where_as_many_pairs_are_kept() -> None:
    reference, candidate = at_angles(0, 10, 40, 80), at_angles(0, 20, 50, 80)
    found = judge_corpus(candidate, reference, texts_of(4, n_queries=1), thresholds=(0.7, 0.99, 0.1))
    cosine = {a: pytest.approx(np.cos(np.radians(a))) for a in (20, 50, 80)}
    at_070, at_099, at_010 = found.thresholds
    assert (at_070.kept, at_070.candidate, at_070.kept_unchanged) == (2 / 3, cosine[50], 1 / 3)
    assert (at_099.kept, at_099.candidate) == (0, None)
    assert (at_010.kept, at_010.candidate, at_010.kept_unchanged) == (1, cosine[80], 1)


def test_without_a_threshold_quantiles_that_ten_pairs_reach_are_taken() -> None:
    vectors = RNG.standard_normal((30, 8))  # 435 pairs
    found = judge_corpus(noisy(vectors, 0.01), vectors, texts_of(30)).thresholds
    assert [round(threshold.kept, 2) for threshold in found] == [0.5, 0.1]
    assert len(judge_corpus(vectors[:2], vectors[:2], texts_of(2)).thresholds) == 1


def test_queries_are_scored_with_documents_and_else_all_texts_with_each_other() -> None:
    vectors = RNG.standard_normal((40, 8))
    assert judge_corpus(vectors, vectors, texts_of(40, n_queries=15)).n_pairs == 15 * 25
    assert judge_corpus(vectors, vectors, texts_of(40)).n_pairs == 40 * 39 // 2
    assert judge_corpus(vectors, vectors, texts_of(40, n_queries=40)).n_pairs == 40 * 39 // 2


def test_a_text_is_not_its_own_neighbour() -> None:
    """Its score with itself is 1 in both, which would hide a change of all its other neighbours."""
    reference, other = RNG.standard_normal((200, 64)), RNG.standard_normal((200, 64))
    assert judge_corpus(reference, reference, texts_of(200)).top10_overlap == 1
    overlap = judge_corpus(other, reference, texts_of(200)).top10_overlap
    assert overlap is not None
    assert overlap < 0.1  # 10 of 199 by chance: 0.05; each text itself would add 0.1


def test_ten_or_fewer_to_choose_from_give_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    verdict = judge_corpus(at_angles(*range(11)), at_angles(*range(11)), texts_of(11, n_queries=1))
    assert verdict.top10_overlap is None
    assert verdict.as_dict()["top10_overlap"] is None
    assert "1 queries and 10 documents" in "\n".join(corpus_lines(tmp_path / "x.gguf", verdict))


def test_equal_texts_count_once() -> None:
    texts = [*texts_of(5), *texts_of(5)[3:], EvalText("q", "query", "und", "text 3")]
    vectors = noisy(np.eye(8)[: len(texts)], 0.1)
    verdict = judge_corpus(vectors, np.eye(8)[: len(texts)], texts)
    assert (verdict.n, verdict.n_queries, verdict.n_duplicates) == (6, 1, 2)


def test_many_texts_are_sampled_and_give_the_same_figures_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = RNG.standard_normal((300, 16)).astype(np.float32)
    candidate, texts = noisy(reference, 0.1), texts_of(300)

    def judged() -> CorpusVerdict:
        return judge_corpus(candidate, reference, texts)

    exact = judged()
    monkeypatch.setattr(neighbours, "N_PAIRS", 20_000)
    monkeypatch.setattr(neighbours, "N_ANCHORS", 100)
    sampled = judged()
    assert (exact.n_pairs, sampled.n_pairs) == (300 * 299 // 2, 20_000)
    assert sampled.mean_score_shift == pytest.approx(exact.mean_score_shift, rel=0.05)
    assert sampled.top10_overlap == pytest.approx(exact.top10_overlap, abs=0.05)
    assert judged() == sampled
    between = judge_corpus(candidate, reference, texts_of(300, n_queries=150))
    assert (between.n_pairs, between.mean_score_shift) == (20_000, pytest.approx(exact.mean_score_shift, rel=0.1))


def test_interval_of_many_values_is_the_same_in_smaller_parts() -> None:
    values = RNG.exponential(0.01, 20_000)  # resampled 501 at a time
    low, high = bootstrap_interval(values)
    standard_error = values.std() / np.sqrt(len(values))
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)


def test_kinds_and_ids_are_read(tmp_path: Path) -> None:
    rows = [{"id": 7, "text": "what?", "kind": "query"}, {"text": "this", "kind": 3}, {"text": "that"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = read_corpus(str(tmp_path / "x.jsonl"))
    assert [(text.id, text.kind) for text in texts] == [("7", "query"), ("row 2", "document"), ("row 3", "document")]
    (tmp_path / "x.csv").write_text("body,kind\nwhat?,query\nthis,\n")
    assert [text.kind for text in read_corpus(str(tmp_path / "x.csv"), column="body")] == ["query", "document"]


@pytest.mark.parametrize("content", ["", "one\n", "one\none\none\n"])
def test_fewer_than_two_different_texts_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(WrongUsage, match=r"x\.txt: holds [01] different texts; .* at least 2 \(--corpus\)"):
        read_corpus(str(tmp_path / "x.txt"))
    with pytest.raises(InputError, match="cannot be read"):
        read_corpus(str(tmp_path / "missing.txt"))
