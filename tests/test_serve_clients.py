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
from f2gguf.runtime.server.models import Limits
from serving import Served, serving_process, serving_thread

TEXTS = ["how do I compress a folder?", "tar is an archiving program", "", "日本語のテキスト", "word " * 300]
GIVEN = [text for text in TEXTS if text]  # OpenAI, TEI and Cohere refuse empty texts


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


ASKED_WITH_IDS = {"/v1/embeddings": "input", "/embeddings": "input", "/embed": "inputs", "/": "inputs"}


def rows_of_ids(url: str, path: str, ids: list[Any]) -> list[list[float]]:
    answer = httpx.post(url + path, json={ASKED_WITH_IDS[path]: ids}).json()
    return [item["embedding"] for item in answer["data"]] if "data" in answer else answer


@pytest.mark.parametrize("path", ASKED_WITH_IDS)
def test_token_ids_are_taken_where_allowed_and_completed(nano: Embedder, path: str) -> None:
    ids = nano.tokenize(GIVEN[0]).tolist()
    wanted = nano.encode(GIVEN[0])
    with serving_thread(nano, Limits(allow_token_ids=True)) as url:
        same(rows_of_ids(url, path, ids), wanted[None])
        same(rows_of_ids(url, path, [ids, ids[:-1]]), np.stack([wanted, wanted]))


def test_token_ids_of_a_model_that_opens_texts_too(minilm: Embedder) -> None:
    ids = minilm.tokenize(GIVEN[0]).tolist()[1:-1]
    with serving_thread(minilm, Limits(allow_token_ids=True)) as url:
        same(rows_of_ids(url, "/v1/embeddings", ids), minilm.encode(GIVEN[0])[None])


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


@pytest.mark.parametrize(("given", "n"), [("", 0), ([], 0), ([""], 1), (["", ""], 2), (["a", ""], 2), (["", "a"], 2)])
def test_ollama_gives_a_vector_for_each_text_of_a_list_and_none_for_nothing(
    ollama: Any, nano: Embedder, given: Any, n: int
) -> None:
    rows = ollama.embed(model="nano", input=given).embeddings
    assert len(rows) == n
    if n:
        same(rows, nano.encode_document(given))


def test_ollama_takes_the_fields_that_say_nothing_here(ollama: Any, nano: Embedder) -> None:
    fields = {"options": {"num_ctx": 8, "temperature": None}, "keep_alive": "5m"}
    same(ollama.embed(model="nano", input=TEXTS[0], **fields).embeddings[0], nano.encode_document(TEXTS[0]))
    same(ollama.embeddings(model="nano", prompt=TEXTS[0], **fields).embedding, nano.encode_document(TEXTS[0]))
    assert list(ollama.embeddings(model="nano", prompt="").embedding) == []


def test_ollama_lists_and_shows_the_models(ollama: Any, served: Served, nano_f16: Path) -> None:
    first = ollama.list().models[0]
    assert (first.model, first.size, first.details.quantization_level) == ("nano", nano_f16.stat().st_size, "F16")
    shown = ollama.show("nano")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo["general.architecture"] == "qwen3"
    assert (shown.modelinfo["qwen3.context_length"], shown.modelinfo["qwen3.embedding_length"]) == (4096, 256)
    tag, loaded = (httpx.get(f"{served.url}/api/{path}").json()["models"][0] for path in ("tags", "ps"))
    assert tag["capabilities"] == ["embedding"]
    for details in (tag["details"], loaded["details"]):
        assert (details["context_length"], details["embedding_length"]) == (2048, 256)


def test_ollama_says_which_models_are_in_memory(ollama: Any, nano_f16: Path, minilm_f16: Path) -> None:
    loaded = ollama.ps().models
    assert [model.model for model in loaded] == ["nano", minilm_f16.stem]
    assert (loaded[0].size, loaded[0].size_vram, loaded[0].context_length) == (nano_f16.stat().st_size, 0, 2048)


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


def test_inference_client_asks_for_everything_at_once(served: Served, nano: Embedder) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(base_url=served.url)
    options = {"normalize": True, "prompt_name": "query", "truncate": True}
    for direction in ("right", "Right"):
        found = client.feature_extraction(GIVEN[0], truncation_direction=direction, **options)
        same(found[0], nano.encode_query(GIVEN[0]))
    raw = client.feature_extraction(GIVEN[0], normalize=False, truncate=False, truncation_direction="left")
    same(raw[0] / np.linalg.norm(raw[0]), nano.encode_document(GIVEN[0]))
    with pytest.raises(HfHubHTTPError, match="cuts only the end of texts"):
        client.feature_extraction(GIVEN[0], truncation_direction="left", **options)


NVIDIA = {"input": GIVEN[:2], "encoding_format": "float", "user": "u", "truncate": "NONE"}
KINDS_OF = {
    "query": "query",
    "passage": "document",
    "search_query": "query",
    "search_document": "document",
    "classification": "document",
    "clustering": "document",
}


@pytest.mark.parametrize("word", KINDS_OF)
def test_the_words_of_nvidia_and_cohere_are_understood(served: Served, nano: Embedder, word: str) -> None:
    wanted = nano.encode_query(GIVEN[:2]) if KINDS_OF[word] == "query" else nano.encode_document(GIVEN[:2])
    body = {**NVIDIA, "model": "nano", "input_type": word}
    by_field = httpx.post(f"{served.url}/v1/embeddings", json=body).json()["data"]
    same([item["embedding"] for item in by_field], wanted)
    by_name = httpx.post(f"{served.url}/v1/embeddings", json={**NVIDIA, "model": f"nano:{word}"}).json()["data"]
    same([item["embedding"] for item in by_name], wanted)
    tei = httpx.post(f"{served.url}/embed", json={"inputs": GIVEN[:2], "prompt_name": word}).json()
    same(tei, wanted)


def test_the_models_own_prompt_goes_before_what_the_word_means(nano: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As e5 (passage) and nomic (clustering) call theirs."""
    prompts = {"query": "q: ", "passage": "p: ", "clustering": "c: "}
    monkeypatch.setattr(type(nano.header), "prompts", prompts)
    wanted = {"document": "p: ", "search_document": "p: ", None: "p: ", "classification": "p: ", "clustering": "c: "}
    with serving_thread(nano) as url:
        for word, prompt in wanted.items():
            answer = httpx.post(f"{url}/v1/embeddings", json={"input": GIVEN[0], "input_type": word}).json()
            same(answer["data"][0]["embedding"], nano.encode(GIVEN[0], prompt=prompt))


def test_cohere_gets_the_embedders_vectors(served: Served, nano: Embedder) -> None:
    """The body that cohere.ClientV2 sends, and the answer that it reads."""
    body = {"texts": GIVEN[:2], "model": "nano", "input_type": "search_query", "embedding_types": ["float", "base64"]}
    answer = httpx.post(f"{served.url}/v2/embed", json=body).json()
    same(answer["embeddings"]["float"], nano.encode_query(GIVEN[:2]))
    assert len(answer["embeddings"]["base64"]) == 2
    assert (answer["response_type"], answer["texts"]) == ("embeddings_by_type", GIVEN[:2])
    narrow = httpx.post(f"{served.url}/v2/embed", json={"texts": GIVEN[:1], "model": "nano", "output_dimension": 32})
    same(narrow.json()["embeddings"]["float"], nano.encode_document(GIVEN[:1], truncate_dim=32))
    refused = httpx.post(f"{served.url}/v2/embed", json={**body, "embedding_types": ["int4"]})
    assert (refused.status_code, list(refused.json())) == (400, ["message"])


def test_openais_paths_are_answered_without_v1(served: Served, nano: Embedder) -> None:
    import openai as library

    with library.OpenAI(base_url=served.url, api_key="none", max_retries=0) as client:
        same(client.embeddings.create(model="nano", input=GIVEN[0]).data[0].embedding, nano.encode(GIVEN[0]))
        assert client.models.retrieve("nano").id == next(iter(client.models.list())).id == "nano"
        with pytest.raises(library.NotFoundError, match="model 'gpt' not found") as raised:
            client.embeddings.create(model="gpt", input="a")
        assert raised.value.code == "model_not_found"


ASKED: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/v2/embed": {"texts": ["a"]},
    "/api/embed": {"input": "a"},
    "/api/embeddings": {"prompt": "a"},
    "/api/show": {},
}


@pytest.mark.parametrize("path", ASKED)
def test_a_model_needs_no_name_where_there_is_one(served: Served, nano: Embedder, path: str) -> None:
    with serving_thread(nano) as url:
        answer = httpx.post(url + path, json=ASKED[path])
    assert answer.status_code == 200
    assert answer.json().get("model", "nano") == "nano"
    of_two = httpx.post(served.url + path, json=ASKED[path])
    assert of_two.status_code == 400
    assert "this server has several, so name one: nano, minilm-F16" in of_two.text


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
    "/embeddings": {"model": "nano", "input": list(LONG.values()), "truncate": "END"},
    "/v2/embed": {"model": "nano", "texts": list(LONG.values())},
    "/embed": {"inputs": list(LONG.values()), "truncate": True},
    "/api/embed": {"model": "nano", "input": list(LONG.values())},
}


@pytest.mark.parametrize("path", TRUNCATING)
def test_every_dialect_tells_which_texts_were_cut(served: Served, path: str) -> None:
    answer = httpx.post(served.url + path, json=TRUNCATING[path])
    assert answer.headers["X-Embedding-Truncated"] == "1"
    if path not in ("/embed", "/v2/embed"):  # whose bodies have no room for it
        assert answer.json()["truncated"] == [1]


@pytest.mark.parametrize("path", TRUNCATING)
def test_too_long_texts_are_refused_where_cutting_is_not_wanted(served: Served, path: str) -> None:
    for no in (False, "NONE") if path not in ("/embed", "/api/embed") else (False,):
        answer = httpx.post(served.url + path, json={**TRUNCATING[path], "truncate": no})
        assert answer.status_code == (413 if path == "/embed" else 400)
        assert "is longer than 2,048 tokens" in answer.text


@pytest.mark.parametrize("path", TRUNCATING)
def test_a_server_that_truncates_does_so_where_a_request_does_not_say(nano: Embedder, path: str) -> None:
    body = {name: value for name, value in TRUNCATING[path].items() if name != "truncate"}
    with serving_thread(nano, Limits(truncate=True)) as url:
        assert httpx.post(url + path, json=body).headers["X-Embedding-Truncated"] == "1"
        assert httpx.post(url + path, json={**body, "truncate": False}).status_code in (400, 413)
        assert httpx.get(f"{url}/info").json()["auto_truncate"] is True


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/embed"])
@pytest.mark.parametrize(("word", "reason"), [("START", "cuts only the end"), ("left", "none of END, NONE, true and")])
def test_other_ways_to_truncate_are_refused(served: Served, path: str, word: str, reason: str) -> None:
    answer = httpx.post(served.url + path, json={**TRUNCATING[path], "truncate": word})
    assert answer.status_code == 400
    assert reason in answer.text
    no_word = httpx.post(served.url + path, json={**TRUNCATING[path], "truncate": 1})
    assert (no_word.status_code, "truncate: Input should be a valid boolean" in no_word.text) == (400, True)


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
