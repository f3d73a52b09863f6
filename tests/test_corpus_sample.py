"""A corpus of any size: what is sampled of it, what is left out, and the drift on the texts that chose nothing."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import QUICK, Run
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.repair import corpus as module
from f2gguf.quantize.repair.calibration import PATH, load_calibration
from f2gguf.quantize.repair.corpus import MAX_CHARS, MIN_TEXTS, sample_corpus
from f2gguf.runtime.errors import InputError, WrongUsage
from f2gguf.runtime.gguf.header import read_header


def write(path: Path, texts: Iterable[str], **fields: str) -> Path:
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return path


def numbered(n: int, start: int = 0) -> list[str]:
    return [f"a text of my own, number {i}" for i in range(start, start + n)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of at most 100 texts, 20 more held out."""
    monkeypatch.setattr(module, "N_HELD_OUT", 20)


@pytest.mark.usefixtures("small")
def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    texts = numbered(1000)
    first = sample_corpus(write(tmp_path / "a.jsonl", texts), n_texts=100)
    assert (len(first.texts), len(first.held_out)) == (100, 20)
    assert not {text.text for text in first.texts} & {text.text for text in first.held_out}
    shuffled = sample_corpus(write(tmp_path / "b.jsonl", random.Random(0).sample(texts, len(texts))), n_texts=100)
    assert [text.text for text in shuffled.texts] == [text.text for text in first.texts]
    assert [text.text for text in shuffled.held_out] == [text.text for text in first.held_out]
    fewer = sample_corpus(tmp_path / "a.jsonl", n_texts=80)
    assert (fewer.held_out, fewer.texts) == (first.held_out, first.texts[:80])


@pytest.mark.usefixtures("small")
def test_these_rows_give_this_sample_on_every_machine(tmp_path: Path) -> None:
    """Golden: the ids that this code gave when it was written. Others mean that files of a corpus change."""
    sample = sample_corpus(write(tmp_path / "x.jsonl", numbered(1000)), n_texts=100)
    assert [text.id for text in sample.held_out[:4]] == ["row 927", "row 547", "row 41", "row 211"]


def test_a_large_corpus_gives_as_many_texts_as_are_promised(tmp_path: Path) -> None:
    sample = sample_corpus(write(tmp_path / "x.jsonl", numbered(2000)))
    assert (len(sample.texts), len(sample.held_out)) == (800, 300)


def test_texts_that_differ_in_case_and_white_space_count_once(tmp_path: Path) -> None:
    texts = numbered(80)
    others = [text.upper().replace(" ", "\n  ") for text in texts]
    sample = sample_corpus(write(tmp_path / "x.jsonl", [*texts, *others, "", " \n"]))
    assert sorted(text.text for text in (*sample.texts, *sample.held_out)) == sorted(texts)
    assert len(sample.held_out) == 26, "a third of a small corpus"


def test_a_text_counts_as_far_as_it_is_read(tmp_path: Path) -> None:
    texts = [f"{text} {'and so on ' * 300}" for text in numbered(MIN_TEXTS)]
    sample = sample_corpus(write(tmp_path / "x.jsonl", [*texts, *(f"{text}!" for text in texts)]))
    assert {len(text.text) for text in (*sample.texts, *sample.held_out)} == {MAX_CHARS}
    assert len(sample.texts) + len(sample.held_out) == MIN_TEXTS


def test_texts_with_a_passage_of_an_evaluation_text_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = next(text for text in load_texts() if text.kind == "document")
    edge = next(text for text in load_texts() if text.kind == "edge" and text.text.strip())
    shared = [f"as it says: {judged.text[5:60]}", edge.text]
    path = write(tmp_path / "x.jsonl", [*numbered(MIN_TEXTS), *shared])
    sample = sample_corpus(path)
    kept = {text.text for text in (*sample.texts, *sample.held_out)}
    assert kept == set(numbered(MIN_TEXTS))
    assert (
        f"{path}: warning: 2 of 66 sampled texts share a passage with the evaluation texts" in capsys.readouterr().err
    )


def test_a_corpus_of_evaluation_texts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [text.text for text in load_texts() if text.kind == "document"])
    with pytest.raises(WrongUsage, match=r"holds 0 different texts, and \d+ more share a passage with the evaluation"):
        sample_corpus(path)


def test_too_few_texts_other_kinds_and_damage_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ["one"] * 200)
    with pytest.raises(WrongUsage, match=f"holds 1 different texts; calibration needs {MIN_TEXTS}"):
        sample_corpus(path)
    path.write_text("")
    with pytest.raises(WrongUsage, match="holds 0 different texts"):
        sample_corpus(path)
    write(path, numbered(MIN_TEXTS))
    path.write_text(path.read_text() + "no json\n")
    with pytest.raises(InputError, match=r"mine\.jsonl, line 65"):
        sample_corpus(path)
    write(path, numbered(MIN_TEXTS), kind="quarry")
    with pytest.raises(WrongUsage, match="row 1 is of the kind 'quarry'"):
        sample_corpus(path)


def test_a_corpus_is_added_to_our_own_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", numbered(100), kind="query", language="fr")
    calibration, own = load_calibration(path, ["en"]), load_calibration(None, ["en"])
    assert own.corpus is None
    assert calibration.corpus is not None
    assert calibration.texts == (*own.texts, *calibration.corpus.texts)
    assert {(text.kind, text.language) for text in calibration.corpus.texts} == {("query", "fr")}
    assert len(calibration.corpus.texts) == 67
    assert len(own.texts) < len(load_texts(PATH)), "those in the model's languages"


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, ending: str) -> None:
    """8 MB are read in less than 5."""
    path, texts = tmp_path / f"x.{ending}", [f"{i} {'word ' * 100}" for i in range(16_000)]
    if ending == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        __import__("pyarrow.parquet").parquet.write_table(pyarrow.table({"text": texts}), path)
    elif ending == "jsonl":
        write(path, texts)
    else:
        path.write_text("text\n" * (ending == "csv") + "\n".join(texts))
    tracemalloc.start()
    try:
        sample = module._with_smallest_hashes(module._texts(path, None), 120)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(sample) == 120
    assert peak_bytes < 5e6 < sum(map(len, texts))


def test_a_variant_for_a_corpus_says_so_and_its_recipe_makes_the_same_bytes(
    own: Path, tmp_path: Path, run: Run
) -> None:
    path, made, again = tmp_path / "x.jsonl.gz", tmp_path / "made.gguf", tmp_path / "again.gguf"
    path.write_bytes(gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in numbered(100)).encode()))
    corpus = ("--calibration", path, "--column", "body")
    variant = ("quantize", "variant", own, "Q4_0", *corpus, "--max-drift", "1.9")
    process = run(*variant, "-o", made, prelude=QUICK)
    assert process.returncode == 0, process.stderr
    drift = read_header(made).values["f2gguf.drift.corpus.mean"]
    assert f"on your corpus: mean drift {drift:.3%} (" in process.stdout
    assert "over 33 held-out texts of x.jsonl.gz" in process.stdout
    options = ("--recipe", made, "--imatrix", made.with_suffix(".imatrix.gguf"), "--json")
    process = run(*variant, *options, "-o", again, prelude=QUICK)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["corpus"]["mean"] == pytest.approx(drift, abs=1e-6)
    assert again.read_bytes() == made.read_bytes()
