"""Vectors by HTTP: keys, retries, refusals."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from endpoint import KEY, Api
from f2gguf.evals import endpoint as endpoint_module
from f2gguf.evals.endpoint import Endpoint, connected, is_url, open_endpoint
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import EndpointFailed, ExtraMissing, WrongUsage

BUSY = {"Retry-After-Ms": "1"}
BAD_URLS = ["http://[::1", "http://", "http:///v1", "http://host:99999", "http://host:x", "http://a..b/v1", "host/v1"]
BAD_URLS += [
    "http://256.1.1.1/v1",
    "http://\u2028/",
    "ftp://host/v1",
    "",
    "http://ho st/v1",
    " http://host",
    "http://h\n/v1",
]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "BASE_URL", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS", "ADMIN_KEY"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


def vectors_of(endpoint: Endpoint, texts: Sequence[str]) -> np.ndarray:
    with connected(endpoint) as ask:
        return ask(texts)


def test_base64_and_numbers_are_both_read(api: Api, nano: Embedder) -> None:
    def encoded(answer: dict[str, Any]) -> dict[str, Any]:
        for row in answer["data"]:
            row["embedding"] = base64.b64encode(np.array(row["embedding"], "<f4").tobytes()).decode()
        return answer

    changes: list[Callable[[dict[str, Any]], Any]] = [encoded, lambda answer: answer]
    for change in changes:
        api.change = change
        np.testing.assert_array_equal(vectors_of(open_endpoint(api.url), ["a", "b"]), nano.encode(["a", "b"]))


def test_a_busy_endpoint_is_asked_again_as_late_as_it_says(api: Api) -> None:
    api.answers = [(429, {"Retry-After": "1"}), (503, BUSY), (500, BUSY)]
    start = time.monotonic()
    assert vectors_of(open_endpoint(api.url), ["a"]).shape == (1, 256)
    assert time.monotonic() - start >= 1
    for status in (429, 503):
        api.requests.clear()
        api.answers = [(status, BUSY)] * 4
        with pytest.raises(EndpointFailed, match=f"/v1/embeddings: status {status}"):
            vectors_of(open_endpoint(api.url), ["a"])
        assert len(api.requests) == 4


@pytest.mark.parametrize(
    ("status", "headers", "hint"),
    [
        (401, {}, "Check --api-key-env"),
        (404, {}, "Check the URL and the model"),
        (301, {}, "status 301"),
        (307, {"Location": "http://me:pw@other/v1?x=secret"}, "It redirects to http://other/v1."),
    ],
)
def test_a_refusal_is_passed_on_with_a_hint_and_without_the_key(
    api: Api, status: int, headers: dict[str, str], hint: str
) -> None:
    api.answers = [(status, headers)]
    with pytest.raises(
        EndpointFailed, match=rf"^http://127.*/v1/embeddings: status {status}.*no, Bearer \*\*\*"
    ) as raised:
        vectors_of(Endpoint(api.url, key=KEY), ["a"])
    assert hint in str(raised.value)
    assert KEY not in str(raised.value)
    assert KEY not in repr(Endpoint(api.url, key=KEY))
    assert len(api.requests) == 1


def test_a_port_where_nobody_listens_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "N_RETRIES", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointFailed, match=r"/v1/embeddings: cannot be asked: .*refused\. Is the server up\?"):
            vectors_of(open_endpoint(url), ["a"])


@pytest.mark.parametrize("name", ["ALL_PROXY", "SSL_CERT_FILE"])
def test_an_environment_that_the_client_cannot_use_is_one_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "ftp://nowhere")
    with pytest.raises(EndpointFailed, match=r"/v1/embeddings: .*Check the proxies and certificates"):
        vectors_of(open_endpoint("https://host/v1"), ["a"])


def test_batches_of_different_widths_are_one_error(api: Api) -> None:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        wide = len(answer["data"]) > 1
        return {"data": [{**row, "embedding": [1.0] * (4 if wide else 3)} for row in answer["data"]]}

    api.change = change
    with pytest.raises(EndpointFailed, match="/v1/embeddings: gives vectors of different widths: 3, 4"):
        vectors_of(open_endpoint(api.url), ["a"] * 33)


def test_a_url_may_end_in_embeddings_and_its_query_is_sent(api: Api) -> None:
    assert vectors_of(open_endpoint(f"{api.url}/embeddings/?api-version=2"), ["a"]).shape == (1, 256)
    assert api.requests[0]["path"] == "/v1/embeddings?api-version=2"


def test_passwords_and_queries_of_a_url_are_never_shown() -> None:
    endpoint = open_endpoint("https://me:secret@host:8080/openai/v1/?api-key=secret")
    assert (endpoint.url, endpoint.query) == ("https://me:secret@host:8080/openai/v1", {"api-key": "secret"})
    assert endpoint.name == "https://host:8080/openai/v1/embeddings"
    with pytest.raises(WrongUsage) as raised:
        open_endpoint("https://me:secret@host:99999/v1?api-key=secret")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", BAD_URLS)
def test_what_is_no_url_is_wrong_usage(url: str) -> None:
    with pytest.raises(WrongUsage, match=r"is no URL of an API: .* Write it like http://localhost:8080/v1"):
        open_endpoint(url)


def test_a_url_is_known_without_its_scheme() -> None:
    assert all(
        map(is_url, ("http://host/v1", "HTTPS://host", "localhost:8080/v1", "10.0.0.1:80", "ftp://host", " http://"))
    )
    assert not any(map(is_url, ("org/name", "org/name:Q8_0", "org/name@v1", "dist/x.gguf", "./m", "x:1.gguf")))


def test_openais_key_is_sent_to_its_own_host_alone(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert open_endpoint("https://api.openai.com/v1").key == KEY
    for other in ("http://host/v1", "http://api.openai.com/v1", "https://api.openai.com.evil/v1", api.url):
        assert open_endpoint(other).key is None
    monkeypatch.setenv("OPENAI_BASE_URL", api.url)
    assert open_endpoint(f"{api.url}/embeddings").key == KEY
    assert open_endpoint("https://api.openai.com/v1").key is None  # it may be the key of that other host
    with pytest.raises(WrongUsage, match=r"^nowhere: is no URL"):
        monkeypatch.setenv("OPENAI_BASE_URL", "nowhere")
        open_endpoint(api.url)


def test_what_the_client_reads_in_the_environment_stays_here(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"API_KEY": KEY, "ADMIN_KEY": KEY, "ORG_ID": "org-1", "PROJECT_ID": "proj-1"}
    secrets["CUSTOM_HEADERS"] = f"X-Secret: {KEY}\nAuthorization: Bearer {KEY}"
    for name, value in secrets.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    vectors_of(open_endpoint(api.url), ["a"])
    sent = {name.lower(): value for name, value in api.requests[0]["headers"].items()}
    assert not sent.keys() & {"authorization", "openai-organization", "openai-project", "x-secret"}
    assert KEY not in str(sent)
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    vectors_of(open_endpoint(api.url, key_env="OTHER_KEY"), ["a"])
    assert api.requests[1]["key"] == "Bearer sk-other"
    monkeypatch.setenv("OPENAI_BASE_URL", api.url)
    vectors_of(open_endpoint(api.url), ["a"])
    sent = {name.lower(): value for name, value in api.requests[2]["headers"].items()}
    assert (sent["authorization"], sent["openai-organization"]) == (f"Bearer {KEY}", "org-1")


def test_a_key_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert open_endpoint("https://api.openai.com/v1").key is None
    for value in ("", " ", "clé", "a\nb"):
        monkeypatch.setenv("NO_SUCH_KEY", value)
        with pytest.raises(WrongUsage, match="NO_SUCH_KEY: the environment variable holds no usable key"):
            open_endpoint("http://host/v1", key_env="NO_SUCH_KEY")


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "find_spec", lambda _name: None)
    with pytest.raises(ExtraMissing, match="pip install 'f2gguf\\[endpoints\\]'"):
        open_endpoint("http://host/v1")
