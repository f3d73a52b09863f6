"""What is refused, in the words of each dialect: malformed requests, limits, keys; and texts that have no vector."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import GGUFError
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.server.models import Limits
from serving import figure, serving_thread

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "nano", "input": "a"},
    "/v2/embed": {"model": "nano", "texts": ["a"]},
    "/embed": {"inputs": "a"},
    "/api/embed": {"model": "nano", "input": "a"},
}
KEY_OF_TEXTS = {"/v1/embeddings": "input", "/v2/embed": "texts", "/embed": "inputs", "/api/embed": "input"}
INVALID = {"/v1/embeddings": 400, "/v2/embed": 400, "/embed": 422, "/api/embed": 400}
SHAPES = {"/v2/embed": {"message"}, "/api/embed": {"error"}, "/embed": {"error", "error_type"}}


def words(path: str, answer: httpx.Response) -> str:
    """The message of an error, from the shape that the dialect has for it."""
    body = answer.json()
    if path == "/v1/embeddings":
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return body["error"]["message"]
    assert set(body) == SHAPES[path]
    return body["message" if path == "/v2/embed" else "error"]


@pytest.fixture(scope="module")
def url(nano: Embedder) -> Iterator[str]:
    limits = Limits(max_body_bytes=100_000, max_texts=50, max_request_tokens=3000, body_timeout_s=0.5)
    with serving_thread(nano, limits) as url:
        yield url


MALFORMED = {
    "no JSON": b'{"model": "nano", "input"',
    "nothing": b"",
    "a list": b"[]",
    "bad UTF-8": b'{"model": "nano", "input": "\xff", "inputs": "\xff"}',
    "a lone surrogate": rb'{"model": "nano", "input": "\ud83d", "inputs": "\ud83d"}',
    "a lone surrogate as bytes": b'{"model": "nano", "input": "\xed\xa0\xbd", "inputs": "\xed\xa0\xbd"}',
    "NaN": b'{"model": "nano", "input": NaN, "inputs": NaN}',
    "a NaN token": b'{"model": "nano", "input": [NaN], "inputs": [[NaN]]}',
    "a negative token": b'{"model": "nano", "input": [-1], "inputs": [[-1]]}',
    "a token outside of the vocabulary": b'{"model": "nano", "input": [16384], "inputs": [[16384]]}',
    "a token that no computer word holds": b'{"model": "nano", "input": [1%s], "inputs": [[1%s]]}' % ((b"0" * 50,) * 2),
    "a number without end": b'{"model": "nano", "input": [1%s], "inputs": [[1%s]]}' % ((b"0" * 5000,) * 2),
    "true": b'{"model": "nano", "input": [true], "inputs": [[true]]}',
    "null": b'{"model": "nano", "input": null, "inputs": null}',
    "texts and numbers": b'{"model": "nano", "input": ["a", 1], "inputs": ["a", 1]}',
    "an object": b'{"model": "nano", "input": {}, "inputs": {}}',
    "lists without end": b"[" * 50_000,
    "a key that is no text": rb'{"\ud800": 1}',
    "40,000 wrong things": json.dumps({"input": [0.5] * 20_000, "inputs": [0.5] * 20_000}).encode()[:99_000],
    "untrained dimensions": b'{"model": "nano", "input": "a", "inputs": "a", "dimensions": 100}',
    "no dimensions": b'{"model": "nano", "input": "a", "inputs": "a", "dimensions": 0}',
}


FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"prompt_name": "query"}, "prompt_name: this path does not follow it.*Send input_type instead"),
    ("/v1/embeddings", {"task": "retrieval.query"}, "task: this path does not follow it.*Send input_type instead"),
    ("/v1/embeddings", {"output_dimension": 64}, "output_dimension: .*Send dimensions instead"),
    ("/v1/embeddings", {"output_dtype": "int8"}, "output_dtype: .*Send encoding_format instead"),
    ("/v1/embeddings", {"truncate_prompt_tokens": 4}, "truncate_prompt_tokens: .*Send truncate instead"),
    ("/v1/embeddings", {"normalize": False}, "normalize: .*Leave it out"),
    ("/v1/embeddings", {"add_special_tokens": False}, "add_special_tokens: .*Leave it out"),
    ("/v2/embed", {"dimensions": 64}, "dimensions: .*Send output_dimension instead"),
    ("/v2/embed", {"images": ["data:image/png;base64,AAAA"]}, "images: .*Leave it out"),
    ("/v2/embed", {"max_tokens": 4}, "max_tokens: .*Send truncate instead"),
    ("/embed", {"input_type": "query"}, "input_type: .*Send prompt_name instead"),
    ("/embed", {"parameters": {"prompt_name": "query"}}, "parameters: .*Leave it out"),
    ("/embed", {"encoding_format": "base64"}, "encoding_format: .*Leave it out"),
    ("/api/embed", {"input_type": "query"}, "input_type: .*End the model's name in ':query' or ':document'"),
    ("/api/embed", {"prompt": "b"}, "prompt: .*End the model's name"),
]


@pytest.mark.parametrize(("path", "field", "message"), FOREIGN)
def test_a_field_of_another_dialect_that_asks_for_other_vectors_is_refused(
    url: str, path: str, field: dict[str, Any], message: str
) -> None:
    answer = httpx.post(url + path, json=BODIES[path] | field)
    assert answer.status_code == INVALID[path]
    assert re.match(message, words(path, answer))


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_ask_for_nothing_are_ignored(url: str, path: str) -> None:
    plain = {"encoding_format": "float", "task": None, "images": [], "add_special_tokens": True, "metadata": {"a": 1}}
    asked, plainly = (httpx.post(url + path, json=body) for body in (BODIES[path] | plain, BODIES[path]))
    assert asked.status_code == 200
    assert asked.headers["X-Embedding-Fingerprint"] == plainly.headers["X-Embedding-Fingerprint"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_in_the_dialects_words(url: str, path: str, name: str) -> None:
    body = MALFORMED[name].replace(b'"inputs"', b'"texts"') if path == "/v2/embed" else MALFORMED[name]
    answer = httpx.post(url + path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == INVALID[path]
    assert words(path, answer)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/embed", "/embed"])
@pytest.mark.parametrize("empty", [[], "", ["a", ""]])
def test_nothing_to_embed_is_refused(url: str, path: str, empty: Any) -> None:
    answer = httpx.post(url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: empty})
    assert answer.status_code in (400, 422)
    assert words(path, answer)


def test_curl_needs_no_content_type_but_a_page_of_a_browser_does(url: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    body = json.dumps(BODIES["/api/embed"])
    assert httpx.post(f"{url}/api/embed", content=body, headers=form).status_code == 200
    assert httpx.post(f"{url}/api/embed", content=body, headers={**form, "Origin": "http://x"}).status_code == 400


@pytest.mark.parametrize("path", BODIES)
def test_large_bodies_are_refused_with_and_without_a_stated_length(url: str, path: str) -> None:
    body = json.dumps(BODIES[path] | {"user": "x" * 200_000}).encode()
    chunked = httpx.post(url + path, content=iter([body[:50_000], body[50_000:]]))
    stated = httpx.post(url + path, content=body)
    for answer in (stated, chunked):
        assert answer.status_code == 413
        assert "larger than 100,000 bytes" in words(path, answer)


@pytest.mark.parametrize("path", BODIES)
def test_too_many_texts_or_tokens_are_refused(url: str, path: str) -> None:
    status = 413 if path == "/embed" else 400
    many = httpx.post(url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: ["a"] * 51})
    assert (many.status_code, words(path, many)) == (status, "51 texts: a request may have 50.")
    long = httpx.post(url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: ["word " * 1000] * 4})
    assert long.status_code == status
    assert "a request may have 3,000" in words(path, long)


def test_a_slow_sender_is_told_so(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as sender:
        sender.sendall(b'POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40\r\n\r\n{"model"')
        answer = sender.makefile("rb").read()  # until the server closes the connection
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.5 s" in answer


@pytest.mark.parametrize("path", BODIES)
def test_unknown_models_prompts_and_paths_are_named(url: str, path: str) -> None:
    unknown = httpx.post(url + path, json=BODIES[path] | {"model": "gpt"})
    assert (unknown.status_code, words(path, unknown)[:21]) == (404, "model 'gpt' not found")
    for name in ("nano:nonsense", "", ":query"):
        assert httpx.post(url + path, json=BODIES[path] | {"model": name}).status_code == 404
    there_is_none = httpx.post(f"{url}{path}_sparse", json={})
    assert there_is_none.status_code == 404
    assert "/openapi.json" in there_is_none.text
    assert httpx.put(url + path, json={}).status_code == 405


def test_a_prompt_that_contradicts_the_models_name_is_refused(url: str) -> None:
    body = BODIES["/v1/embeddings"] | {"model": "nano:query", "input_type": "document"}
    answer = httpx.post(f"{url}/v1/embeddings", json=body)
    assert answer.status_code == 400
    assert "the model's name says query, the request document" in answer.text


ADVICE = "pass check_embedding_ctx_length=False to OpenAIEmbeddings"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/embed", "/"])
@pytest.mark.parametrize("ids", [[15339, 1917], [[15339, 1917]], [[5], [6]], [999_999]])
def test_token_ids_are_refused_unless_the_operator_allows_them(url: str, path: str, ids: Any) -> None:
    """LangChain sends those of tiktoken."""
    answer = httpx.post(url + path, json={"input": ids, "inputs": ids})
    assert answer.status_code == (400 if "embeddings" in path else 422)
    for words_of_it in ("token ids are refused", ADVICE, "start f2gguf serve with --allow-token-ids"):
        assert words_of_it in answer.text


def test_allowed_token_ids_must_be_of_the_models_tokenizer_and_have_no_prompt(nano: Embedder) -> None:
    with serving_thread(nano, Limits(allow_token_ids=True)) as url:
        unknown = httpx.post(f"{url}/v1/embeddings", json={"input": [[5], [16384]]})
        assert unknown.status_code == 400
        assert "input 1: there is no token 16384: this model has 16,384, from 0." in unknown.text
        assert ADVICE in unknown.text
        prompted = httpx.post(f"{url}/v1/embeddings", json={"model": "nano:query", "input": [5, 6]})
        assert prompted.status_code == 400
        assert "before texts, not token ids" in prompted.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("error", [GGUFError("the tokenizer gave up"), MemoryError(), RuntimeError("regex")])
def test_a_text_on_which_the_tokenizer_fails_fails_alone(
    nano: Embedder, monkeypatch: pytest.MonkeyPatch, path: str, error: Exception
) -> None:
    tokenize = nano.encoder.tokenize

    def faulty(inputs: Any, *arguments: Any, **options: Any) -> Any:
        if any("kill" in one for one in inputs):
            raise error
        return tokenize(inputs, *arguments, **options)

    monkeypatch.setattr(nano.encoder, "tokenize", faulty)
    with serving_thread(nano) as url, ThreadPoolExecutor(8) as clients:
        texts = ["kill" * 2000 if i % 4 == 0 else f"text {i}" for i in range(16)]
        asked = [
            clients.submit(httpx.post, url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: [text]}, timeout=30)
            for text in texts
        ]
        answers = [request.result() for request in asked]
    assert [answer.status_code for answer in answers] == [500 if "kill" in text else 200 for text in texts]
    assert answers[0].headers["X-Request-Id"] in words(path, answers[0])


@pytest.mark.parametrize("header", [{"Authorization": "Bearer two"}, {"X-API-Key": "one"}])
def test_any_of_the_keys_lets_in(nano: Embedder, header: dict[str, str]) -> None:
    with serving_thread(nano, Limits(api_keys=("one", "two"))) as url:
        assert httpx.get(f"{url}/v1/models", headers=header).status_code == 200


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer on"}, {"X-API-Key": ""}, {"Authorization": "one"}])
def test_nobody_comes_in_without_a_key(nano: Embedder, header: dict[str, str]) -> None:
    with serving_thread(nano, Limits(api_keys=("one", "two"))) as url:
        for path, body in BODIES.items():
            answer = httpx.post(url + path, json=body, headers=header)
            assert answer.status_code == 401
            assert "no valid API key" in words(path, answer)
        assert httpx.get(f"{url}/metrics", headers=header).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


def test_pages_of_other_origins_are_let_in_only_where_told(nano: Embedder, url: str) -> None:
    asking = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(f"{url}/embed", headers=asking).headers
    with serving_thread(nano, Limits(cors_origins=("http://page",), api_keys=("one",))) as told:
        assert httpx.options(f"{told}/embed", headers=asking).headers["access-control-allow-origin"] == "http://page"
        refused = httpx.options(f"{told}/embed", headers={**asking, "Origin": "http://other"})
        assert "access-control-allow-origin" not in refused.headers


def test_openais_client_may_ask_from_a_page_that_is_let_in(nano: Embedder) -> None:
    """What Chromium asks before `new OpenAI({dangerouslyAllowBrowser: true})` sends its headers."""
    sent = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    sent += "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
    asking = {"Origin": "http://page", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": sent}
    with serving_thread(nano, Limits(cors_origins=("http://page",))) as url:
        allowed = httpx.options(f"{url}/v1/embeddings", headers=asking)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://page"
        allowed_headers = allowed.headers["access-control-allow-headers"].replace(" ", "")
        assert set(sent.split(",")) <= set(allowed_headers.split(","))
        near = httpx.options(f"{url}/embed", headers={**asking, "Access-Control-Request-Private-Network": "true"})
        assert near.headers["access-control-allow-private-network"] == "true"
        assert httpx.options(f"{url}/embed", headers={**asking, "Origin": "http://other"}).status_code == 400


UNSERVED = {
    "/embed_all": "vectors of single tokens are not served",
    "/embed_sparse": "sparse vectors are not served",
    "/rerank": "score none",
    "/predict": "score none",
    "/v1/chat/completions": "write none",
    "/v1/embed": "only /v2/embed is served",
    "/v2/rerank": "score none",
    "/api/generate": "write none",
    "/api/pull": "f2gguf serve -m MODEL",
    "/v2/none": "nothing at this path; /openapi.json",
}
DIALECT_OF = {"/v1/": "/v1/embeddings", "/v2/": "/v2/embed", "/api/": "/api/embed"}


@pytest.mark.parametrize("path", UNSERVED)
def test_what_a_dialect_has_and_this_server_has_not_is_named(url: str, path: str) -> None:
    answer = httpx.post(url + path, json={"inputs": ["a"]})
    assert answer.status_code == 404
    dialect = next((dialect for prefix, dialect in DIALECT_OF.items() if path.startswith(prefix)), "/embed")
    assert UNSERVED[path] in words(dialect, answer)
    assert "/openapi.json" in answer.text


class Slow:
    """Takes no step until told."""

    def __init__(self) -> None:
        self.may_go_on = Event()

    def __call__(self, texts: list[Ids], _prompt: Ids | None, **_: Any) -> np.ndarray:
        self.may_go_on.wait(20)
        return np.ones((len(texts), 256), dtype=np.float32)


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.may_go_on.set()


def wait_for(url: str, name: str, value: float) -> None:
    for _ in range(500):
        if figure(url, name) == value:
            return
        time.sleep(0.01)
    raise AssertionError(f"{name} is {figure(url, name)}, not {value}")


@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue_is_a_429_that_says_when_to_come_again(nano: Embedder, slow: Slow, path: str) -> None:
    with serving_thread(nano, Limits(max_waiting_tokens=10), compute=slow) as url, ThreadPoolExecutor(2) as clients:
        first = clients.submit(httpx.post, url + path, json=BODIES[path], timeout=30)
        wait_for(url, 'f2gguf_queue_seconds_count{model="nano"}', 1)
        second = clients.submit(httpx.post, url + path, json=BODIES[path], timeout=30)
        wait_for(url, 'f2gguf_queue_requests{model="nano"}', 1)
        third = httpx.post(url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: ["many words, too many for ten"]})
        assert third.status_code == 429
        assert int(third.headers["Retry-After"]) >= 1
        assert "queue is full" in words(path, third)
        slow.may_go_on.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_more_requests_than_are_allowed_are_a_429(nano: Embedder, slow: Slow) -> None:
    with serving_thread(nano, Limits(max_requests=1), compute=slow) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(httpx.post, f"{url}/embed", json=BODIES["/embed"], timeout=30)
        wait_for(url, 'f2gguf_queue_seconds_count{model="nano"}', 1)
        refused = httpx.post(f"{url}/embed", json=BODIES["/embed"])
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        slow.may_go_on.set()
        assert first.result().status_code == 200


def test_a_client_that_leaves_takes_its_texts_out_of_the_queue(nano: Embedder, slow: Slow) -> None:
    with serving_thread(nano, compute=slow) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(httpx.post, f"{url}/embed", json=BODIES["/embed"], timeout=30)
        wait_for(url, 'f2gguf_queue_seconds_count{model="nano"}', 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/embed", json={"inputs": ["a"] * 100}, timeout=0.3)
        wait_for(url, 'f2gguf_queue_tokens{model="nano"}', 0)
        wait_for(url, 'f2gguf_requests_total{path="/embed",status="499"}', 1)
        slow.may_go_on.set()
        assert first.result().status_code == 200


POISONED = {"/v1/embeddings": 422, "/v2/embed": 422, "/embed": 424, "/api/embed": 422}


@pytest.mark.parametrize("path", BODIES)
def test_a_text_without_a_vector_fails_alone_and_is_counted(nano: Embedder, path: str) -> None:
    """In the same step as texts of others, which get their vectors."""
    poison = nano.tokenize(" zebra")[0]
    began, may_go_on = Event(), Event()

    def faulty(texts: list[Ids], prompt: Ids | None, **_: Any) -> np.ndarray:
        began.set()
        may_go_on.wait(20)
        rows = nano.encoder.compute(texts, prompt)
        rows[[poison in ids for ids in texts]] = np.nan
        return rows

    def post(*texts: str) -> httpx.Response:
        return httpx.post(url + path, json=BODIES[path] | {KEY_OF_TEXTS[path]: list(texts)}, timeout=30)

    with serving_thread(nano, compute=faulty) as url, ThreadPoolExecutor(4) as clients:
        first = clients.submit(post, "busy")
        began.wait(10)
        others = [clients.submit(post, "one", "two"), clients.submit(post, "three")]
        poisoned = clients.submit(post, "fine", "a zebra")
        wait_for(url, 'f2gguf_queue_requests{model="nano"}', 3)
        may_go_on.set()
        assert [other.result().status_code for other in (first, *others)] == [200, 200, 200]
        assert poisoned.result().status_code == POISONED[path]
        assert "1 of 2 texts (input 1) have no finite vector" in words(path, poisoned.result())
        assert figure(url, 'f2gguf_quarantined_texts_total{model="nano"}') == 1
        assert figure(url, 'f2gguf_batch_fill_count{model="nano"}') == 2, "all of them in one step"
        assert post("after it").status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_breaks_is_a_500_in_the_dialects_words(nano: Embedder, path: str) -> None:
    def broken(_texts: list[Ids], _prompt: Ids | None, **_: Any) -> np.ndarray:
        raise RuntimeError("secret")

    with serving_thread(nano, compute=broken) as url:
        answer = httpx.post(url + path, json=BODIES[path])
        assert answer.status_code == 500
        assert answer.headers["X-Request-Id"] in words(path, answer)
        assert "secret" not in answer.text
