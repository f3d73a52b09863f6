"""Vectors by HTTP: keys, retries, refusals."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
import pytest
from endpoint import KEY, Api
from f2gguf.evals.endpoint import Endpoint, endpoint_vectors, open_endpoint
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import EndpointFailed, WrongUsage

BUSY = {"Retry-After": "0"}


def test_base64_is_read_as_well(api: Api, nano: Embedder) -> None:
    def encoded(answer: dict[str, Any]) -> dict[str, Any]:
        for row in answer["data"]:
            row["embedding"] = base64.b64encode(np.array(row["embedding"], "<f4").tobytes()).decode()
        return answer

    api.change = encoded
    np.testing.assert_array_equal(endpoint_vectors(open_endpoint(api.url), ["a", "b"]), nano.encode(["a", "b"]))


def test_a_busy_endpoint_is_asked_again_as_late_as_it_says(api: Api) -> None:
    api.answers = [(429, {"Retry-After": "1"}), (503, BUSY), (500, BUSY)]
    start = time.monotonic()
    assert endpoint_vectors(open_endpoint(api.url), ["a"]).shape == (1, 256)
    assert 1 <= time.monotonic() - start < 10
    api.answers = [(503, BUSY)] * 4
    with pytest.raises(EndpointFailed, match="/v1/embeddings: status 503"):
        endpoint_vectors(open_endpoint(api.url), ["a"])
    assert len(api.requests) == 8


@pytest.mark.parametrize(("status", "hint"), [(401, "--api-key-env"), (404, "--endpoint-model"), (301, "status 301")])
def test_a_refusal_is_passed_on_with_a_hint_and_without_the_key(api: Api, status: int, hint: str) -> None:
    api.answers = [(status, {})]
    with pytest.raises(
        EndpointFailed, match=rf"^http://127.*/v1/embeddings: status {status}.*no, Bearer \*\*\*"
    ) as raised:
        endpoint_vectors(Endpoint(f"{api.url}/embeddings", key=KEY), ["a"])
    assert hint in str(raised.value)
    assert KEY not in str(raised.value)
    assert KEY not in repr(Endpoint(api.url, key=KEY))
    assert len(api.requests) == 1


def test_passwords_and_queries_of_a_url_are_never_shown() -> None:
    endpoint = open_endpoint("https://me:secret@host:8080/openai/v1/?api-key=secret")
    assert endpoint.url == "https://me:secret@host:8080/openai/v1/embeddings?api-key=secret"
    assert endpoint.name == "https://host:8080/openai/v1/embeddings"


def test_a_key_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert open_endpoint("http://host/v1").key is None
    with pytest.raises(WrongUsage, match="NO_SUCH_KEY: the environment variable holds no key"):
        open_endpoint("http://host/v1", key_env="NO_SUCH_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert open_endpoint("http://host/v1").key == KEY
