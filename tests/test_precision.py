"""Vectors in fewer bits: the numbers of sentence-transformers, which do not depend on a batch, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Release, Run
from f2gguf.evals.drift import judge
from f2gguf.evals.texts import EvalText
from f2gguf.quantize.convert.reserved import fill_in, stamp_int8_steps
from f2gguf.quantize.report.report import read_report
from f2gguf.quantize.report.tables import precisions_table
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import NotGGUF, UnknownName, WrongUsage
from f2gguf.runtime.gguf.header import KEY_INT8_STEP, read_header
from f2gguf.runtime.precision import PRECISIONS, quantized, restored
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from serving import serving_thread

TEXTS = ["a cat on the mat", "ein Hund", "", "how do I compress a folder?"]
CALIBRATION = [EvalText(f"t{i}", "document", "en", f"{i} is a number, and {i * i} its square") for i in range(20)]


@pytest.fixture(scope="module")
def path(nano_f16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("precision") / "nano-F16.gguf"
    copy.write_bytes(nano_f16.read_bytes())
    stamp_int8_steps(copy, CALIBRATION)
    return copy


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Embedder]:
    with Embedder(path) as model:
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("width", [256, 64])
def test_precisions_are_those_of_sentence_transformers(model: Embedder, width: int) -> None:
    from sentence_transformers import quantize_embeddings

    vectors, ranges = model.encode(TEXTS, truncate_dim=width), model.header.ranges(width)
    for precision in (name for name in PRECISIONS if name != "float16"):
        found = model.encode(TEXTS, precision=precision, truncate_dim=width)
        wanted = quantize_embeddings(vectors, precision=precision, ranges=ranges)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(found, wanted)
        assert model.encode(TEXTS[0], precision=precision, truncate_dim=width).shape == wanted[0].shape
        tensor: Any = model.encode(TEXTS, precision=precision, truncate_dim=width, convert_to_tensor=True)
        np.testing.assert_array_equal(tensor.numpy(), wanted)
    assert model.encode([], precision="ubinary", truncate_dim=width).shape == (0, width // 8)


@given(
    arrays(np.float32, (5, 12), elements=st.floats(-1, 1, width=32)),
    arrays(np.float32, (3, 12), elements=st.floats(-1, 1, width=32)),
)
def test_any_vectors_get_the_numbers_of_sentence_transformers(vectors: np.ndarray, calibration: np.ndarray) -> None:
    from sentence_transformers import quantize_embeddings

    ranges = np.stack([calibration.min(axis=0), calibration.max(axis=0)])
    for precision in ("int8", "uint8", "binary", "ubinary"):
        with np.errstate(over="ignore"):  # where a range is hardly any
            wanted = quantize_embeddings(vectors, precision=precision, ranges=ranges)
        np.testing.assert_array_equal(quantized(vectors, precision, ranges), wanted)


def test_a_code_of_int8_is_the_number_in_steps(model: Embedder) -> None:
    vectors, codes = model.encode(TEXTS), model.encode(TEXTS, precision="int8")
    step = model.header.values[f"{KEY_INT8_STEP}256"]
    np.testing.assert_allclose(codes * step, vectors, atol=step * 0.501)
    assert np.abs(model.similarity(codes, codes) - model.similarity(vectors, vectors)).max() < 5e-3
    ranges = model.header.ranges(256)
    assert ranges is not None
    stands_for = restored(model.encode(TEXTS, precision="uint8"), ranges)
    np.testing.assert_allclose(stands_for, codes * step, atol=1e-6)


def test_ranges_are_those_of_each_width_and_hold_the_calibration(model: Embedder) -> None:
    texts = [text.text for text in CALIBRATION]
    for width in model.header.dims:
        codes = model.encode_document(texts, precision="int8", truncate_dim=width).astype(int)
        assert np.abs(codes).max() in (126, 127)


def test_a_vector_does_not_depend_on_its_batch(model: Embedder) -> None:
    for precision in ("int8", "binary"):
        alone = model.encode(TEXTS[1], precision=precision).astype(int)
        among = model.encode(TEXTS, precision=precision)[1].astype(int)
        assert np.count_nonzero(alone != among) <= 2  # numbers at the edge of a step


def test_a_file_without_ranges_has_no_int8_vectors_and_says_what_it_has(nano: Embedder) -> None:
    for precision in ("int8", "uint8"):
        with pytest.raises(WrongUsage, match=f"{precision}: .* states no ranges for it.*or take float32, binary"):
            nano.encode(TEXTS, precision=precision)
    assert nano.encode(TEXTS, precision="binary").shape == (4, 32)
    with pytest.raises(UnknownName, match=r"no precision is called 'int4'\. Did you mean 'int8'"):
        nano.encode(TEXTS, precision="int4")


def test_ranges_are_of_vectors_of_length_1(model: Embedder) -> None:
    with pytest.raises(WrongUsage, match=r"int8: .* Pass normalize_embeddings=True \(without --no"):
        model.embed(TEXTS, normalize=False, precision="int8")
    assert model.embed(TEXTS, normalize=False, precision="ubinary").vectors.shape == (4, 32)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_step_that_is_none_is_damage(path: Path, tmp_path: Path, value: float) -> None:
    copy = tmp_path / "damaged.gguf"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(NotGGUF, match=r"its header has f2gguf\.int8_step\.64 = "):
        fill_in(copy, {f"{KEY_INT8_STEP}64": value})
        read_header(copy)


# At the command line and over HTTP


def test_embed_prints_and_writes_whole_numbers(run: Run, path: Path, tmp_path: Path, model: Embedder) -> None:
    wanted = model.encode_document(TEXTS[0], precision="int8").tolist()
    printed = run("f2gguf", "embed", "-m", path, "--dtype", "int8", TEXTS[0])
    assert json.loads(printed.stdout)["embedding"] == wanted
    run("f2gguf", "embed", "-m", path, "--dtype", "ubinary", TEXTS[0], "-o", tmp_path / "x.npy")
    wanted = model.encode_document(TEXTS[0], precision="ubinary").tolist()
    assert np.load(tmp_path / "x.npy").tolist() == [wanted]


@pytest.fixture(scope="module")
def url(model: Embedder) -> Iterator[str]:
    with serving_thread(model) as url:
        yield url


def test_openai_and_cohere_get_each_type(url: str, model: Embedder) -> None:
    for kind in ("int8", "uint8", "binary", "ubinary"):
        body = {"input": TEXTS[:2], "encoding_format": kind, "dimensions": 64}
        data = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"]
        wanted = model.encode_document(TEXTS[:2], precision=kind, truncate_dim=64).tolist()
        assert [one["embedding"] for one in data] == wanted
    types = ["float", "int8", "ubinary", "base64"]
    body = {"texts": TEXTS[:2], "model": "nano", "input_type": "search_query", "embedding_types": types}
    found = httpx.post(f"{url}/v2/embed", json=body).json()["embeddings"]
    assert [kind for kind in types if found[kind]] == types
    for kind in ("int8", "ubinary"):
        assert found[kind] == model.encode_query(TEXTS[:2], precision=kind).tolist()


def test_a_server_refuses_what_the_file_has_no_ranges_for(nano: Embedder) -> None:
    with serving_thread(nano) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": "a", "encoding_format": "int8"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("int8: nano states no ranges for it")
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": "a", "encoding_format": "binary"})
        assert len(answer.json()["data"][0]["embedding"]) == 32


# What it costs


def test_a_verdict_measures_weights_and_vectors_together() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((60, 64)).astype(np.float32)
    reference[40:] = reference[:20] + 0.2 * reference[40:]  # a query is near its document
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    candidate = reference + rng.standard_normal(reference.shape).astype(np.float32) * 0.01
    texts = [EvalText(f"d{i}", "document", "en", "a") for i in range(40)]
    texts += [EvalText(f"q{i}", "query", "en", "a", (f"d{i}",)) for i in range(20)]
    step = np.abs(reference).max() / 126.5
    ranges = np.outer((-128.5 * step, 126.5 * step), np.ones(64)).astype(np.float32)
    verdict = judge(candidate, reference, texts, ranges=ranges)
    assert verdict.precisions is not None
    assert list(verdict.precisions) == ["int8", "binary"]
    int8, binary = verdict.precisions.values()
    assert verdict.mean < int8.mean < verdict.mean + 64 * step**2
    assert 0.1 < binary.mean < 0.4
    assert int8.ndcg10 == int8.ndcg10_rescored == verdict.ndcg10 == 1
    assert (int8.top10_overlap or 0) > (binary.top10_overlap or 0)
    assert list(judge(candidate, reference, texts).precisions or ()) == ["binary"]  # without ranges
    assert (judge(candidate, reference).precisions or {})["binary"].ndcg10 is None  # without texts


@pytest.mark.slow
def test_a_release_states_what_vectors_in_fewer_bits_cost(tiny_release: Release) -> None:
    report = read_report(tiny_release.folder)
    rows = precisions_table(report).rows
    assert [row[:2] for row in rows] == [["Q8_0", "int8"], ["Q8_0", "binary"]]
    assert all(cell for row in rows for cell in row[:4])
    assert "Vectors in fewer bits, of every file" in (tiny_release.folder / "README.md").read_text()
    with Embedder(tiny_release.file("F16")) as base, Embedder(tiny_release.file("Q8_0")) as variant:
        np.testing.assert_array_equal(base.header.ranges(base.header.n_embd), variant.header.ranges(base.header.n_embd))
        assert variant.encode(TEXTS, precision="int8").dtype == np.int8
