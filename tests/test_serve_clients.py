"""The clients that people have, each with the vectors of `Embedder`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from f2gguf.runtime import Embedder
from serving import Served, serving_process

TEXTS = ["how do I compress a folder?", "tar is an archiving program", "", "日本語のテキスト", "word " * 300]
GIVEN = [text for text in TEXTS if text]  # OpenAI and TEI refuse empty texts


@pytest.fixture(scope="module")
def served(nano_f16: Path, minilm_f16: Path) -> Iterator[Served]:
    with serving_process("-m", f"nano={nano_f16}", "-m", minilm_f16) as served:
        yield served


@pytest.fixture(scope="module")
def nano(nano_f16: Path) -> Iterator[Embedder]:
    """Its own: after a text that overflows, an Embedder keeps keys and values in F32, which moves others by 2e-6."""
    with Embedder(nano_f16) as model:
        yield model


def same(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), wanted, atol=1e-6)


@pytest.fixture
def openai(served: Served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ollama(served: Served) -> Iterator[Any]:
    import ollama

    with ollama.Client(host=served.url) as client:
        yield client


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_gets_the_embedders_vectors(openai: Any, nano: Embedder, encoding: str) -> None:
    answer = openai.embeddings.create(model="nano", input=GIVEN, encoding_format=encoding)
    rows = [item.embedding for item in answer.data]
    if encoding == "base64":
        import base64

        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    same(rows, nano.encode_document(GIVEN))
    assert answer.usage.prompt_tokens == sum(len(nano.tokenize(text)) for text in GIVEN)
    assert [item.index for item in answer.data] == list(range(len(GIVEN)))


def test_openai_says_query_by_the_models_name_or_by_input_type(openai: Any, nano: Embedder) -> None:
    by_name = openai.embeddings.create(model="nano:query", input=GIVEN[0])
    by_field = openai.embeddings.create(model="nano", input=GIVEN[0], extra_body={"input_type": "query"})
    wanted = nano.encode_query(GIVEN[0])
    same(by_name.data[0].embedding, wanted)
    same(by_field.data[0].embedding, wanted)


def test_openai_takes_token_ids_and_adds_the_closing_token_that_they_lack(openai: Any, nano: Embedder) -> None:
    ids = nano.tokenize(GIVEN[0]).tolist()
    wanted = nano.encode(GIVEN[0])
    same(openai.embeddings.create(model="nano", input=ids).data[0].embedding, wanted)
    both = openai.embeddings.create(model="nano", input=[ids, ids[:-1]])
    same([item.embedding for item in both.data], np.stack([wanted, wanted]))


def test_token_ids_of_a_model_that_opens_texts_too(openai: Any, minilm: Embedder, minilm_f16: Path) -> None:
    ids = minilm.tokenize(GIVEN[0]).tolist()[1:-1]
    same(openai.embeddings.create(model=minilm_f16.stem, input=ids).data[0].embedding, minilm.encode(GIVEN[0]))


def test_openai_dimensions_are_trained_widths_normalised_again(openai: Any, nano: Embedder) -> None:
    answer = openai.embeddings.create(model="nano", input=GIVEN, dimensions=64)
    same([item.embedding for item in answer.data], nano.encode_document(GIVEN, truncate_dim=64))


def test_openai_refusals_are_its_own_errors(openai: Any) -> None:
    import openai as library

    with pytest.raises(library.NotFoundError, match="model 'gpt' not found") as raised:
        openai.embeddings.create(model="gpt", input="a")
    assert raised.value.code == "model_not_found"
    with pytest.raises(library.BadRequestError, match="100 dimensions: nano was trained for 32, 64, 128, 256"):
        openai.embeddings.create(model="nano", input="a", dimensions=100)
    with pytest.raises(library.BadRequestError, match="longer than 2,048 tokens") as too_long:
        openai.embeddings.create(model="nano", input="word " * 5000)
    assert too_long.value.code == "context_length_exceeded"


def test_openai_lists_the_models(openai: Any, minilm_f16: Path) -> None:
    assert [model.id for model in openai.models.list()] == ["nano", minilm_f16.stem]
    assert openai.models.retrieve("nano").object == "model"


def test_langchain_gets_the_embedders_vectors(served: Served, nano: Embedder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model="nano", base_url=f"{served.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    same(embeddings.embed_documents(GIVEN), nano.encode_document(GIVEN))


def test_ollama_gets_the_embedders_vectors(ollama: Any, nano: Embedder) -> None:
    answer = ollama.embed(model="nano", input=TEXTS)
    same(answer.embeddings, nano.encode_document(TEXTS))
    assert answer.prompt_eval_count == sum(len(nano.tokenize(text)) for text in TEXTS)
    same(ollama.embed(model="nano:query", input=TEXTS[0]).embeddings[0], nano.encode_query(TEXTS[0]))
    same(ollama.embed(model="nano:latest", input=TEXTS[0], dimensions=32).embeddings[0],
         nano.encode_document(TEXTS[0], truncate_dim=32))  # fmt: skip
    same(ollama.embeddings(model="nano", prompt=TEXTS[0]).embedding, nano.encode_document(TEXTS[0]))


def test_ollama_loads_a_model_by_an_empty_input(ollama: Any) -> None:
    assert ollama.embed(model="nano", input="").embeddings == []


def test_ollama_lists_and_shows_the_models(ollama: Any, nano_f16: Path) -> None:
    first = ollama.list().models[0]
    assert (first.model, first.size, first.details.quantization_level) == ("nano", nano_f16.stat().st_size, "F16")
    shown = ollama.show("nano")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["general.architecture"] == "qwen3"


def test_ollama_refusals_are_its_own_errors(ollama: Any) -> None:
    import ollama as library

    with pytest.raises(library.ResponseError, match="model 'llama' not found") as raised:
        ollama.embed(model="llama", input="a")
    assert raised.value.status_code == 404
    with pytest.raises(library.ResponseError, match="longer than 2,048 tokens"):
        ollama.embed(model="nano", input="word " * 5000, truncate=False)


@pytest.mark.parametrize("path", ["", "/embed"])
def test_inference_client_gets_the_embedders_vectors(served: Served, nano: Embedder, path: str) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=served.url + path)
    same(client.feature_extraction(GIVEN), nano.encode_document(GIVEN))
    same(client.feature_extraction(GIVEN[0], prompt_name="query")[0], nano.encode_query(GIVEN[0]))
    long = client.feature_extraction("word " * 5000, truncate=True, truncation_direction="Right")
    with pytest.warns(UserWarning, match="were cut"), Embedder(nano.header.path) as model:
        same(long[0], model.encode_document("word " * 5000))


def test_inference_client_compares_sentences(served: Served, nano: Embedder) -> None:
    from huggingface_hub import InferenceClient

    found = InferenceClient(model=f"{served.url}/similarity").sentence_similarity(GIVEN[0], other_sentences=GIVEN[1:])
    vectors = nano.encode_document(GIVEN)
    same(found, nano.similarity(vectors[:1], vectors[1:])[0])


def test_tei_vectors_keep_their_length_where_asked(served: Served, nano: Embedder) -> None:
    rows = httpx.post(f"{served.url}/embed", json={"inputs": GIVEN, "normalize": False}).json()
    np.testing.assert_allclose(rows, nano.embed(GIVEN, normalize=False).vectors, rtol=1e-4, atol=1e-4)


def test_tei_tokens_are_the_models(served: Served, nano: Embedder) -> None:
    tokens = httpx.post(f"{served.url}/tokenize", json={"inputs": GIVEN[0]}).json()[0]
    assert [token["id"] for token in tokens] == nano.tokenize(GIVEN[0]).tolist()
    assert "".join(token["text"] for token in tokens if not token["special"]) == GIVEN[0]
    bare = httpx.post(f"{served.url}/tokenize", json={"inputs": GIVEN[0], "add_special_tokens": False}).json()[0]
    assert bare == tokens[:-1]


def test_tei_info_names_the_model_and_its_limits(served: Served) -> None:
    info = httpx.get(f"{served.url}/info").json()
    assert (info["model_id"], info["max_input_length"]) == ("nano", 2048)
    assert info["model_type"] == {"embedding": {"pooling": "last"}}


LONG = {"short": "a", "long": "word " * 5000}
TRUNCATING: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "nano", "input": list(LONG.values()), "truncate": True},
    "/embed": {"inputs": list(LONG.values()), "truncate": True},
    "/api/embed": {"model": "nano", "input": list(LONG.values())},
}


@pytest.mark.parametrize("path", TRUNCATING)
def test_every_dialect_tells_which_texts_were_cut(served: Served, path: str) -> None:
    answer = httpx.post(served.url + path, json=TRUNCATING[path])
    assert answer.headers["X-Embedding-Truncated"] == "1"
    if path != "/embed":  # whose body is the vectors
        assert answer.json()["truncated"] == [1]


@pytest.mark.parametrize("path", TRUNCATING)
def test_too_long_texts_are_refused_where_cutting_is_not_wanted(served: Served, path: str) -> None:
    answer = httpx.post(served.url + path, json={**TRUNCATING[path], "truncate": False})
    assert answer.status_code == (413 if path == "/embed" else 400)
    assert "is longer than 2,048 tokens" in answer.text


def fingerprint(served: Served, **body: Any) -> tuple[str, ...]:
    answer = httpx.post(f"{served.url}/v1/embeddings", json={"model": "nano", "input": "a", **body})
    return tuple(answer.headers["X-Embedding-Fingerprint"].split("."))


def test_fingerprints_differ_where_vectors_do_not_compare(served: Served, minilm_f16: Path) -> None:
    space, prompt = fingerprint(served)
    assert fingerprint(served, input="b") == (space, prompt)
    assert fingerprint(served, dimensions=256) == (space, prompt)
    assert fingerprint(served, dimensions=64)[0] != space
    assert fingerprint(served, model=minilm_f16.stem)[0] != space
    query_space, query_prompt = fingerprint(served, model="nano:query")
    assert query_space == space
    assert query_prompt != prompt
    assert httpx.get(f"{served.url}/info").headers["X-Embedding-Fingerprint"] == space
