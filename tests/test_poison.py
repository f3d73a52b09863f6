"""A text that has no finite vector is named, and spoils no other. The faults are real: weights that overflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import NANO
from conftest import Run, facts_of
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import NoVector
from others import edit_tensor

TEXTS = [text.text for text in load_texts() if text.kind != "long"][::12]
WORD = " zebra"  # not in TEXTS


@pytest.fixture(scope="module")
def f32_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("poison") / "nano-F32.gguf"
    convert(facts_of(NANO), path, dtype="f32")
    return path


def edited(source: Path, target: Path, name: str, edit) -> Path:
    """A copy of a file, one tensor of which went through `edit`, in place."""
    target.write_bytes(source.read_bytes())
    edit_tensor(target, name, edit)
    return target


@pytest.fixture(scope="module")
def poisoned(f32_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    """A model that has no vector for any text with WORD: a row of its token table is infinite."""
    with Embedder(f32_file) as model:
        used = {token for text in TEXTS for token in model.tokenize(text)}
        token = next(token for token in model.tokenize(WORD) if token not in used)

    def edit(table: np.ndarray) -> None:
        table[token] = np.inf

    with Embedder(edited(f32_file, tmp_path_factory.mktemp("p") / "poisoned.gguf", "token_embd.weight", edit)) as model:
        yield model


def test_only_the_poisoned_texts_are_named_and_all_others_get_their_vectors(poisoned: Embedder, f32_file: Path) -> None:
    texts = list(TEXTS)
    for i in (3, 11, 12):
        texts[i] += WORD
    with pytest.raises(NoVector, match=r"3 of \d+ texts \(number 4, 12, 13\)") as raised:
        poisoned.encode_query(texts)
    assert raised.value.indices == [3, 11, 12]
    with Embedder(f32_file) as sound:
        wanted = np.delete(sound.encode_query(texts), raised.value.indices, axis=0)
    assert drift(raised.value.embeddings.vectors, wanted).max() < 1e-6


def test_what_comes_after_a_poisoned_text_is_sound(poisoned: Embedder) -> None:
    before = poisoned.encode(TEXTS)
    with pytest.raises(NoVector):
        poisoned.encode(["a" + WORD])
    assert drift(poisoned.encode(TEXTS), before).max() < 1e-6


def with_larger_values(source: Path, folder: Path, factor: float) -> Path:
    """Values of one layer `factor` times larger, undone by the matrix behind them: the same function."""

    def grow(weights: np.ndarray) -> None:
        weights *= factor

    def shrink(weights: np.ndarray) -> None:
        weights /= factor

    grown = edited(source, folder / "grown.gguf", "blk.1.attn_v.weight", grow)
    return edited(grown, folder / "large.gguf", "blk.1.attn_output.weight", shrink)


def test_a_text_that_overflows_a_16_bit_cache_is_retried_in_higher_precision(
    f32_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = with_larger_values(f32_file, tmp_path, 2.0**20)  # too large for F16
    with Embedder(f32_file) as sound, Embedder(large) as model, caplog.at_level(logging.WARNING, "f2gguf"):
        assert drift(model.encode(TEXTS[:9]), sound.encode(TEXTS[:9])).max() < 1e-6
    assert "only with an F32 KV cache" in caplog.text


def test_deterministic_vectors_do_not_depend_on_texts_that_overflowed_before(
    f32_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = with_larger_values(f32_file, tmp_path, 13_500.0)  # so that some texts overflow F16, and others do not
    with Embedder(large, deterministic=True) as model, caplog.at_level(logging.WARNING, "f2gguf"):
        forward = np.stack([model.encode(text) for text in TEXTS])
        n_overflowed = len(caplog.records)
    with Embedder(large, deterministic=True) as model:
        backward = np.stack([model.encode(text) for text in TEXTS[::-1]])
    assert 0 < n_overflowed < len(TEXTS)
    np.testing.assert_array_equal(forward, backward[::-1])


def test_a_zero_vector_is_never_returned(f32_file: Path, tmp_path: Path) -> None:
    def erase(weights: np.ndarray) -> None:
        weights[:] = 0

    with (
        Embedder(edited(f32_file, tmp_path / "zero.gguf", "output_norm.weight", erase)) as model,
        pytest.raises(NoVector, match="2 of 2 texts"),
    ):
        model.encode(["one", "two"])


def test_embed_writes_every_other_text_and_names_the_bad_one(poisoned: Embedder, run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": f"t{i}", "text": text} for i, text in enumerate(["one", "two" + WORD, "three"])]
    source.write_text("\n".join(map(json.dumps, rows)))
    done = run("f2gguf", "embed", "-m", poisoned.header.path, "--input", source, "-o", target)
    assert done.returncode == 1
    assert "1 of 3 texts (number 2) have no finite vector" in done.stderr
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in written] == ["t0", "t2"]
    assert all(np.isfinite(row["embedding"]).all() for row in written)
