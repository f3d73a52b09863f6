"""XLM-RoBERTa, and BERT with XLM-R's tokenizer: Unigram ids are the checkpoint's, and so are the vectors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from checkpoints import edit_json, edit_tensors, fill
from conftest import facts_of
from f2gguf.evals.full_precision import transformers_vectors
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.checkpoint.folder import read_settings
from f2gguf.quantize.checkpoint.tokenizer_files import build_tokenizer
from f2gguf.quantize.convert.readback import read_back, reference_ids
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BrokenCheckpoint, GGUFError, UnsupportedCheckpoint
from f2gguf.runtime.gguf.header import KEY_SCORE_STEPS, read_header
from f2gguf.runtime.gguf.vocabulary import KEY_CHARSMAP, Vocabulary
from f2gguf.runtime.llama.carried import carried_tokenizer
from others import write_other
from safetensors.numpy import load_file
from unigram import charsmap, write_tiny_xlmr

Edit = Callable[[Path], object]
TEXTS = [*load_texts()[::40], load_texts()[0]]
POSITIONS = "embeddings.position_embeddings.weight"


@pytest.fixture
def xlmr(tmp_path: Path) -> Path:
    return write_tiny_xlmr(tmp_path / "xlmr")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The F32 file of an XLM-RoBERTa, beside its checkpoint."""
    folder = write_tiny_xlmr(tmp_path_factory.mktemp("unigram") / "xlmr")
    convert(facts_of(folder), folder.with_suffix(".gguf"), dtype="f32")
    return folder.with_suffix(".gguf")


def spec(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return edit


def plain(change: Callable[[dict[str, Any]], object]) -> Edit:
    """A change of a tokenizer.json that is taken as it is."""
    return lambda folder: (
        edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
        spec(change)(folder),
    )


@pytest.mark.parametrize(
    "edit",
    [lambda folder: None, plain(lambda s: None), plain(lambda s: s.update(normalizer=None))],
    ids=["xlm-roberta", "plain class", "no charsmap"],
)
def test_ids_are_the_checkpoints_on_every_text(edit: Edit, xlmr: Path, tmp_path: Path) -> None:
    edit(xlmr)
    facts = facts_of(xlmr)
    convert(facts, tmp_path / "x.gguf")
    stock_differs = read_back(tmp_path / "x.gguf", facts, load_texts()[::6])
    assert 0 < len(stock_differs) < 40


def test_longest_text_in_a_bf16_file_has_the_vector_of_transformers(xlmr: Path, tmp_path: Path) -> None:
    facts, path = facts_of(xlmr), tmp_path / "x.gguf"
    convert(facts, path, dtype="bf16")
    ids = reference_ids(facts, TEXTS)
    with Embedder(path) as model, pytest.warns(match="longer than 64 tokens"):
        ours = model.encode([text.text for text in TEXTS])
    assert max(map(len, ids)) == facts.max_tokens == 64
    assert (ours * transformers_vectors(xlmr, ids, pooling="mean")).sum(axis=1).min() > 0.9999


def test_header_has_every_key_of_llama_cpps_unigram(file: Path) -> None:
    values = {k.removeprefix("tokenizer.ggml."): v for k, v in read_header(file).values.items()}
    wanted = {"model": "t5", "pre": "default", "bos_token_id": 0, "eos_token_id": 2, "seperator_token_id": 2}
    wanted |= {"unknown_token_id": 3, "padding_token_id": 1, "mask_token_id": 2871, "token_type_count": 1}
    wanted |= dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"), True)
    assert {key: values[key] for key in wanted} == wanted
    vocabulary = Vocabulary(read_header(file))
    types, scores = vocabulary.types, vocabulary.numbers("tokenizer.ggml.scores")
    assert types is not None and scores is not None
    assert [*types[:5], *types[2870:2873]] == [3, 3, 3, 2, 1, 1, 3, 5]
    assert scores[2871:2873].tolist() == [0, -10000]


def test_charsmap_is_stored_once(file: Path) -> None:
    data = file.read_bytes()
    assert data.count(charsmap()) == 1
    assert base64.b64encode(charsmap())[:80] not in data
    found = Vocabulary(read_header(file)).numbers(KEY_CHARSMAP)
    assert found is not None
    assert found.tobytes() == charsmap()


@pytest.mark.parametrize("shift", [0.0, 1e-16, 0.123456789])
def test_scores_are_the_checkpoints_to_the_last_bit(shift: float, xlmr: Path, tmp_path: Path) -> None:
    spec(lambda s: s["model"].update(vocab=[[text, score * (1 + shift)] for text, score in s["model"]["vocab"]]))(xlmr)
    facts = facts_of(xlmr)
    convert(facts, tmp_path / "x.gguf")
    ours, theirs = (
        json.loads(tokenizer.to_str())["model"]
        for tokenizer in (carried_tokenizer(read_header(tmp_path / "x.gguf")), build_tokenizer(facts.checkpoint))
    )
    assert ours == theirs


def test_file_without_its_arrays_is_named(file: Path, tmp_path: Path) -> None:
    keys = {key: value for key, value in read_header(file).values.items() if key == "f2gguf.tokenizer"}
    for lacking in (KEY_CHARSMAP, "tokenizer.ggml.scores"):
        path = write_other(tmp_path / "x.gguf", file, without=(lacking,), **keys)
        with pytest.raises(GGUFError, match=rf"its tokenizer does not work: the header has no {lacking}"):
            carried_tokenizer(read_header(path))
    path = write_other(tmp_path / "x.gguf", file, **{**keys, KEY_SCORE_STEPS: [1, 2]})
    with pytest.raises(GGUFError, match="the header has 2 steps for 2,872 scores"):
        carried_tokenizer(read_header(path))


def two_charsmaps(content: dict[str, Any]) -> None:
    steps = content["normalizer"]["normalizers"]
    steps.append({**steps[0], "precompiled_charsmap": base64.b64encode(charsmap() + b"x\0").decode()})


REFUSED: dict[str, tuple[Edit, type[Exception], str]] = {
    "byte fallback": (
        plain(lambda s: s["model"].update(byte_fallback=True, vocab=[*s["model"]["vocab"], ["<0x00>", -9.0]])),
        UnsupportedCheckpoint,
        "tokenizer.json: its Unigram model has byte_fallback",
    ),
    "no unknown token": (plain(lambda s: s["model"].update(unk_id=None)), UnsupportedCheckpoint, "has no unk_id"),
    "a piece twice": (
        spec(lambda s: s["model"]["vocab"].insert(9, s["model"]["vocab"][8])),
        UnsupportedCheckpoint,
        "has the piece '.' twice",
    ),
    "a score that is no number": (
        spec(lambda s: s["model"]["vocab"][9].__setitem__(1, float("-inf"))),
        UnsupportedCheckpoint,
        "scores that are not finite",
    ),
    "a score near zero": (
        spec(lambda s: s["model"]["vocab"][9].__setitem__(1, -1e-300)),
        UnsupportedCheckpoint,
        "scores that are not finite, or too near to zero",
    ),
    "another split": (
        plain(lambda s: s.update(pre_tokenizer={"type": "Whitespace"})),
        UnsupportedCheckpoint,
        "its pre-tokenizer Whitespace is not supported with Unigram",
    ),
    "another blank": (
        plain(lambda s: s["pre_tokenizer"].update(replacement="_")),
        UnsupportedCheckpoint,
        "pre-tokenizer Metaspace is not supported",
    ),
    "two charsmaps": (plain(two_charsmaps), UnsupportedCheckpoint, "its normaliser has 2 charsmaps"),
    "two tokens before a text": (
        plain(lambda s: s["post_processor"]["single"].insert(0, s["post_processor"]["single"][0])),
        UnsupportedCheckpoint,
        "puts 2 tokens before a text",
    ),
    "pieces that are none": (
        spec(lambda s: s["model"].update(vocab={"a": 0})),
        BrokenCheckpoint,
        "is no working tokenizer",
    ),
    "positions behind no padding": (
        lambda folder: edit_json(folder / "config.json", pad_token_id=None),
        BrokenCheckpoint,
        "config.json: pad_token_id is None, behind which the 66 positions begin",
    ),
    "a classifier": (
        lambda folder: edit_json(folder / "config.json", architectures=["XLMRobertaForSequenceClassification"]),
        UnsupportedCheckpoint,
        "does not know architectures",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(case: str, xlmr: Path) -> None:
    edit, kind, message = REFUSED[case]
    edit(xlmr)
    with pytest.raises(kind, match=message):
        facts_of(xlmr)


def test_positions_begin_behind_the_padding_token_and_the_prefix_is_known(xlmr: Path, tmp_path: Path) -> None:
    tensors = load_file(xlmr / "model.safetensors")
    edit_tensors(xlmr, **{f"roberta.{name}": tensor for name, tensor in tensors.items()}, **dict.fromkeys(tensors, ...))
    edit_tensors(xlmr, lm_head__bias=np.zeros(9, "f4"), roberta__pooler__dense__bias=np.zeros(32, "f4"))
    convert(facts_of(xlmr), tmp_path / "x.gguf")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    np.testing.assert_array_equal(written["position_embd.weight"], tensors[POSITIONS][2:])


def test_padding_token_of_another_id_moves_the_positions(xlmr: Path) -> None:
    edit_json(xlmr / "config.json", pad_token_id=3)
    assert facts_of(fill(xlmr)).shape["context_length"] == 62
    assert read_settings(xlmr).config["max_position_embeddings"] == 66
