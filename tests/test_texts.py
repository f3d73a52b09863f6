"""The shipped evaluation and calibration texts hold what the README says of them."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter

import pytest
from f2gguf.evals.conversion import REFERENCES, find_stored
from f2gguf.evals.texts import KINDS, claimed_texts, load_texts
from f2gguf.quantize.repair import calibration
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder

TEXTS = load_texts()
CALIBRATION = [json.loads(line) for line in calibration.PATH.read_text().split("\n") if line]


def test_ids_and_texts_are_unique() -> None:
    for column in ([t.id for t in TEXTS], [t.text for t in TEXTS], [row["id"] for row in CALIBRATION]):
        assert [name for name, n in Counter(column).items() if n > 1] == []


def test_enough_texts_of_every_kind() -> None:
    kinds = Counter(text.kind for text in TEXTS)
    assert len(TEXTS) >= 400
    assert len(CALIBRATION) >= 300
    assert set(kinds) == set(KINDS)
    assert len({text.language for text in TEXTS if text.kind == "code"}) >= 10


def test_forty_languages_in_fifteen_scripts_have_queries_and_documents() -> None:
    languages = [{t.language for t in TEXTS if t.kind == kind} for kind in ("query", "document")]
    scripts = {unicodedata.name(_commonest_letter(t.text)).split()[0] for t in TEXTS if t.kind == "document"}
    assert len(languages[0] & languages[1]) >= 40
    assert len(scripts) >= 15


def test_every_query_names_an_answer() -> None:
    documents = {text.id for text in TEXTS if text.kind in ("document", "code", "long")}
    queries = [text for text in TEXTS if text.kind == "query"]
    assert all(text.relevant and set(text.relevant) <= documents for text in queries)


def test_long_texts_pass_two_thousand_tokens(nano: Embedder) -> None:
    with Embedder(nano.header.path, max_tokens=4096) as model:
        lengths = {text.id: len(model.tokenize(text.text)) for text in TEXTS if text.kind == "long"}
    assert min(lengths.values()) > 2000, lengths


def test_calibration_shares_no_passage_with_the_evaluation() -> None:
    passages = {passage for text in TEXTS if text.kind != "edge" for passage in _passages(text.text)}
    shared = {row["id"] for row in CALIBRATION if passages & _passages(row["text"])}
    assert shared == set()


def test_an_english_model_answers_for_english_code_and_no_language() -> None:
    claimed = claimed_texts(TEXTS, ["en"])
    assert {text.language for text in claimed if text.kind != "code"} == {"en", "und"}
    assert claimed_texts(TEXTS, ["multilingual"]) == claimed_texts(TEXTS, []) == TEXTS


@pytest.mark.parametrize("name", ["f2llm-nano", "all-MiniLM-L6-v2"])
def test_stored_references_are_of_these_texts_and_checkpoints(name: str, request: pytest.FixtureRequest) -> None:
    facts: Facts = request.getfixturevalue({"f2llm-nano": "nano_facts", "all-MiniLM-L6-v2": "minilm_facts"}[name])
    stored = find_stored(facts.checkpoint.sha256, TEXTS)
    assert stored is not None, f"run scripts/references again: {REFERENCES / name}.safetensors is of other texts"
    assert stored.shape == (len(TEXTS), facts.n_embd)


def _commonest_letter(text: str) -> str:
    return Counter(c for c in text if c.isalpha()).most_common(1)[0][0]


def _passages(text: str, length: int = 40) -> set[str]:
    plain = " ".join(text.split())
    return {plain[i : i + length] for i in range(len(plain) - length + 1)}
