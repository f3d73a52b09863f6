"""Vectors are the checkpoint's own: against sentence-transformers, alone and in batches, prompted, cut, truncated."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from checkpoints import MINILM, NANO, copy_of, edit_json
from conftest import facts_of
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import HOSTILE, load_texts
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import (
    FileWarning,
    GGUFError,
    PoolingMissing,
    TextError,
    TruncationWarning,
    UnknownDims,
    UnknownName,
)
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama import engine
from f2gguf.runtime.llama.context import Context
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as CheckpointTokenizer

TEXTS = [text.text for text in load_texts() if text.kind != "long"][::18]
PROMPT = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "


def sentence_transformer(folder: Path):
    """The same checkpoint in the library that users come from, in float32 on the CPU."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "fixture"), [(NANO, "nano"), (MINILM, "minilm")])
def test_vectors_equal_sentence_transformers(folder: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    model: Embedder = request.getfixturevalue(fixture)
    wanted = sentence_transformer(folder).encode(TEXTS, normalize_embeddings=True)
    # F16 weights against float32: measured 3e-6 and 6e-6 at most over all evaluation texts
    assert drift(model.encode(TEXTS), wanted).max() < 2e-5


@pytest.mark.slow
def test_queries_equal_sentence_transformers(nano: Embedder) -> None:
    wanted = sentence_transformer(NANO).encode_query(TEXTS)
    assert drift(nano.encode_query(TEXTS), wanted).max() < 2e-5


@pytest.mark.slow
def test_cls_pooling_equals_sentence_transformers(tmp_path: Path) -> None:
    folder = copy_of(MINILM, tmp_path / "cls")
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    convert(facts_of(folder), tmp_path / "cls.gguf")
    with Embedder(tmp_path / "cls.gguf") as model:
        assert model.pooling == "cls"
        vectors = model.encode(TEXTS)
    wanted = sentence_transformer(folder).encode(TEXTS, normalize_embeddings=True)
    assert drift(vectors, wanted).max() < 2e-5


def test_alone_equals_in_a_batch(nano: Embedder) -> None:
    together = nano.encode(TEXTS)
    alone = np.stack([nano.encode(text) for text in TEXTS])
    assert drift(together, alone).max() < 1e-6


def test_order_of_the_results_is_the_callers(nano: Embedder) -> None:
    forward, backward = nano.encode(TEXTS), nano.encode(TEXTS[::-1])
    assert drift(forward, backward[::-1]).max() < 1e-6


@pytest.mark.parametrize("fixture", ["nano", "minilm"])
def test_contexts_side_by_side_give_the_vectors_of_one(
    fixture: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, for texts of all lengths, one of them longer than a batch."""
    model: Embedder = request.getfixturevalue(fixture)
    texts = [text.text for text in load_texts()[:30]]
    texts.append(" ".join(texts))
    monkeypatch.setattr(engine, "_n_runners", lambda _model: 3)
    with Embedder(model.header.path) as several, warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        assert "3 contexts" in several.description
        for prompt in (None, "a prompt that all texts of a batch share: "):
            assert drift(several.encode(texts, prompt=prompt), model.encode(texts, prompt=prompt)).max() < 1e-5
        with monkeypatch.context() as broken, pytest.raises(GGUFError, match="failed on a batch"):
            broken.setattr(Context, "_decode", fails)
            several.encode(texts)
        assert drift(several.encode(texts[:9]), model.encode(texts[:9])).max() < 1e-5, "in new contexts"


def test_a_context_that_has_no_room_leaves_its_batch_to_the_first(
    nano: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text.text for text in load_texts()[:20]]
    monkeypatch.setattr(engine, "_n_runners", lambda _model: 3)
    with Embedder(nano.header.path) as several:
        for runner in several.encoder.engine._runners[1:]:
            monkeypatch.setattr(runner, "_new_context", fails)
        assert drift(several.encode(texts), nano.encode(texts)).max() < 1e-5
    said = {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}
    path = nano.header.path
    assert said == {f"{path}: a further context failed, and is not used again: llama.cpp failed on a batch"}


def fails(*_: object, **__: object) -> None:
    raise GGUFError("llama.cpp failed on a batch")


def test_truncated_text_keeps_its_eos(nano: Embedder) -> None:
    with Embedder(nano.header.path, max_tokens=32) as model, pytest.warns(TruncationWarning, match="1 of 2 texts"):
        vectors = model.encode(["word " * 100, "short"])
        ids = model.tokenize("word " * 100)
    assert len(ids) == 32
    assert ids[-1] == 16383
    kept = "word " * 100
    assert np.isfinite(vectors).all()
    assert list(ids[:31]) == list(nano.tokenize(kept)[:31])


@pytest.mark.slow
def test_long_text_equals_sentence_transformers(nano: Embedder) -> None:
    """2,048 tokens pass through several micro-batches."""
    text = next(text.text for text in load_texts() if text.kind == "long")
    with pytest.warns(TruncationWarning):
        vector = Embedder(nano.header.path).encode([text])
    assert drift(vector, sentence_transformer(NANO).encode([text])).max() < 2e-5


def test_prompt_is_never_doubled(nano: Embedder) -> None:
    bare, prompted = nano.encode_query(["what is gzip?", PROMPT + "what is gzip?"])
    np.testing.assert_array_equal(bare, prompted)
    np.testing.assert_array_equal(nano.encode("what is gzip?", prompt=PROMPT), nano.encode_query("what is gzip?"))


def test_matryoshka_widths_are_leading_dimensions_normalised_again(nano: Embedder) -> None:
    full, short = nano.encode(TEXTS[:3]), nano.encode(TEXTS[:3], truncate_dim=64)
    cut = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    assert short.shape == (3, 64)
    np.testing.assert_allclose(short, cut, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)


def test_untrained_widths_are_refused(nano: Embedder, minilm: Embedder) -> None:
    with pytest.raises(UnknownDims, match="100 dimensions: f2llm-nano was trained for 32, 64, 128, 256"):
        nano.encode("a", truncate_dim=100)
    with pytest.raises(UnknownDims, match="gives only 384"):
        minilm.encode("a", truncate_dim=128)


def test_single_text_gives_a_single_vector(nano: Embedder) -> None:
    assert nano.encode("a").shape == (256,)
    assert nano.encode(["a"]).shape == (1, 256)
    assert nano.encode([]).shape == (0, 256)
    assert nano.encode(["a"], precision="float16").dtype == np.float16


def test_empty_text_has_the_vector_of_its_closing_token(nano: Embedder) -> None:
    assert nano.tokenize("").tolist() == [16383]
    assert np.isfinite(nano.encode("")).all()


def test_nul_is_a_character_like_others(nano: Embedder) -> None:
    assert drift(nano.encode(["a\0b"]), nano.encode(["ab"]))[0] > 1e-4


def test_lone_surrogate_is_named_with_its_text(nano: Embedder) -> None:
    with pytest.raises(TextError, match=r"text 2 of 2: character 3 is a lone surrogate \('\\ud83d'\)"):
        nano.encode(["fine", "ab\ud83d"])


@pytest.mark.parametrize("value", [None, float("nan"), 5, [1, 2], b"text"])
def test_what_is_no_text_is_named_with_its_number_and_type(nano: Embedder, value: object) -> None:
    with pytest.raises(TextError, match=f"text 2 of 2: is no text, but .* of type {type(value).__name__}"):
        nano.encode(["fine", value])  # type: ignore[list-item]


def test_unknown_prompt_is_refused_with_the_known_ones(nano: Embedder) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'query'\? Known: query, document"):
        nano.encode("a", prompt_name="querry")


def test_query_of_a_model_without_prompts_is_the_plain_text(minilm: Embedder) -> None:
    np.testing.assert_array_equal(minilm.encode_query("a"), minilm.encode("a"))


def test_similarity_is_cosine() -> None:
    found = Embedder.similarity(np.array([[3.0, 4.0]]), np.array([[4.0, 3.0], [-3.0, -4.0]]))
    np.testing.assert_allclose(found, [[0.96, -1.0]], atol=1e-6)


def test_file_without_pooling_needs_the_callers_word(tiny: Path, tmp_path: Path) -> None:
    convert(facts_of(tiny), tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes().replace(b"qwen3.pooling_type", b"qwen3.pooling_tipe")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(PoolingMissing, match="pass --pooling last"):
        Embedder(tmp_path / "x.gguf")
    with pytest.warns(FileWarning), Embedder(tmp_path / "x.gguf", pooling="last") as model:
        assert model.encode("a").shape == (32,)


def test_another_pooling_than_the_files_own_is_warned_of(nano_f16: Path) -> None:
    with pytest.warns(FileWarning, match="its header says last pooling. With mean"), Embedder(nano_f16, pooling="mean"):
        pass
    with Embedder(nano_f16, pooling="last") as model:
        assert model.file_warnings == ()


@pytest.mark.parametrize(("folder", "fixture"), [(NANO, "nano"), (MINILM, "minilm")])
def test_token_ids_equal_the_checkpoints_on_any_text(
    folder: Path, fixture: str, request: pytest.FixtureRequest
) -> None:
    model: Embedder = request.getfixturevalue(fixture)
    reference = CheckpointTokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_padding()
    reference.enable_truncation(model.max_seq_length)
    letters = sorted({letter for text in [*TEXTS, *HOSTILE] for letter in text})
    pieces = st.sampled_from(
        [*letters, *letters, " ", "\n", "'s", "'LL", "<|im_end|>", "[SEP]", "[UNK]", "##", "\u0301"]
    )

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(pieces, max_size=60).map("".join))
    def ids_are_equal(text: str) -> None:
        assert model.tokenize(text).tolist() == reference.encode(text).ids

    ids_are_equal()


def test_header_is_read_without_the_vocabulary(nano_f16: Path) -> None:
    header = read_header(nano_f16)
    assert header.values["tokenizer.ggml.tokens"].length == 16384
    assert len(header.tensors) == 46
    assert sum(tensor.size_bytes for tensor in header.tensors) < nano_f16.stat().st_size
