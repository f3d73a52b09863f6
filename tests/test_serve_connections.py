"""Before a dialect sees a request: the server's names, slow and endless headers, HEAD, and bodies in gzip."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
from f2gguf.runtime import Embedder
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.server import connections
from f2gguf.runtime.server.guard import is_host, is_own_host
from f2gguf.runtime.server.models import Limits
from serving import serving_thread
from test_serve_refusals import BODIES, words

BODY = json.dumps({"input": "a"}).encode()


@pytest.fixture(scope="module")
def url(nano: Embedder) -> Iterator[str]:
    limits = Limits(max_body_bytes=100_000, header_timeout_s=0.5, host_names=("models.example",))
    with serving_thread(nano, limits) as url:
        yield url


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


OWN = [
    "localhost", "LOCALHOST:8080", "localhost.", "nano.localhost:1", "127.0.0.1:8080", "127.9.9.9", "0.0.0.0:8080",
    "192.168.178.20:8080", "8.8.8.8", "[::1]:8080", "[::1]", "[fe80::1]:80", "models.example", "Models.Example.:8080",
    "",
]  # fmt: skip
OTHERS = [
    "page.example", "page.example:8080", "localhost.page.example", "127.0.0.1.page.example", "notlocalhost",
    "127.0.0.1x", "models.example.org", "sub.models.example", "localhost, page.example", "[page.example]", "*",
]  # fmt: skip


@pytest.mark.parametrize("host", OWN)
def test_addresses_and_the_servers_own_names_are_answered(url: str, host: str) -> None:
    assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", [*filter(None, OWN), "page.example", "xn--bcher-kva.example", "a_b-c"])
def test_a_name_that_a_request_can_state_may_be_allowed(host: str) -> None:
    assert is_host(host)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "bad host",
        " a",
        "a\n",
        "a,b",
        "http://a",
        "a/",
        "a:b",
        "a:",
        ":80",
        "a:8080:1",
        "user@a",
        "bücher.example",
    ],
)
def test_what_no_request_can_state_is_no_name(text: str) -> None:
    assert not is_host(text)


@pytest.mark.parametrize("host", OTHERS)
def test_other_names_are_refused_wherever_a_page_could_reach(url: str, host: str) -> None:
    """A page of page.example whose name was given this machine's address (DNS rebinding)."""
    for path in ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/api/tags"):
        assert httpx.get(url + path, headers={"Host": host}).status_code == 403
    for path, body in BODIES.items():
        answer = httpx.post(url + path, json=body, headers={"Host": host})
        assert answer.status_code == 403
        assert "--allow-host" in words(path, answer)


def test_a_second_host_header_hides_nothing(url: str) -> None:
    with connect(url) as sender:
        sender.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: page.example\r\nConnection: close\r\n\r\n")
        assert sender.makefile("rb").read().startswith(b"HTTP/1.1 403 ")


def test_every_name_is_answered_where_told() -> None:
    assert is_own_host("page.example", ("*",))
    assert not is_own_host("page.example", ())


READ = ["/", "/health", "/metrics", "/v1/models", "/v1/models/nano", "/models", "/info", "/api/tags", "/api/ps"]


@pytest.mark.parametrize("path", [*READ, "/api/version", "/openapi.json"])
def test_head_answers_as_get_without_a_body(url: str, path: str) -> None:
    head, get = httpx.head(url + path), httpx.get(url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert httpx.head(f"{url}/none").status_code == 404
    assert httpx.head(f"{url}/embed").status_code == 405


def test_head_keeps_the_connection_in_order(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            assert client.head("/health").status_code == 200
            assert client.get("/health").json()["status"] == "ok"


def seconds_until_closed(sender: socket.socket, sent: Iterator[bytes]) -> float:
    """Send until the server closes the connection."""
    begin = time.monotonic()
    sender.settimeout(0.05)
    for part in sent:
        try:
            sender.sendall(part)
            if not sender.recv(1000):
                break
        except TimeoutError:
            continue
        except OSError:  # closed
            break
    return time.monotonic() - begin


def drip(first: bytes, repeated: bytes) -> Iterator[bytes]:
    yield first
    for _ in range(200):
        yield repeated


SLOW = {
    "silence": (b"", b""),
    "a request line that stops": (b"GET /health", b""),
    "headers that go on": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X-A: b\r\n"),
    "a header that goes on": (b"GET /health HTTP/1.1\r\nX-A: ", b"b"),
    "empty lines": (b"\r\n", b"\r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_headers_that_do_not_arrive_in_time_end_the_connection(url: str, name: str) -> None:
    with connect(url) as sender:
        assert 0.3 < seconds_until_closed(sender, drip(*SLOW[name])) < 5


@pytest.mark.parametrize("name", ["headers that go on", "empty lines"])
def test_so_do_those_of_a_later_request(url: str, name: str) -> None:
    with connect(url) as sender:
        sender.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sender.recv(10_000).startswith(b"HTTP/1.1 200 ")
        assert 0.3 < seconds_until_closed(sender, drip(*SLOW[name])) < 5


def test_headers_without_end_are_refused(url: str) -> None:
    with connect(url) as sender:
        sender.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        answer = b""
        try:
            for i in range(2000):
                sender.sendall(b"X-%d: %s\r\n" % (i, b"a" * 1000))
            answer = sender.recv(1000)
        except ConnectionError:  # closed while we were sending
            pass
    assert answer[:13] in (b"", b"HTTP/1.1 431 ")
    assert httpx.get(f"{url}/health", headers={"X-A": "a" * 30_000}).status_code == 200


def test_a_body_that_goes_on_after_a_refusal_ends_the_connection(
    nano: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_GRACE_S", 0.2)
    with serving_thread(nano, Limits(api_keys=("one",), body_timeout_s=0.3)) as url, connect(url) as sender:
        head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        assert 0.3 < seconds_until_closed(sender, drip(head, b"a")) < 5


def test_a_long_computation_is_not_cut_off(nano: Embedder) -> None:
    """Nor is it by a further request that the client has begun to send."""
    may_go_on = Event()

    def slow(texts: list[Ids], _prompt: Ids | None, **_: Any) -> np.ndarray:
        may_go_on.wait(20)
        return np.ones((len(texts), 256), dtype=np.float32)

    with serving_thread(nano, Limits(header_timeout_s=0.2), compute=slow) as url, ThreadPoolExecutor(1) as clients:
        first = clients.submit(httpx.post, f"{url}/embed", json={"inputs": "a"}, timeout=30)
        with connect(url) as sender:
            request = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n"
            sender.sendall(request + b'{"inputs": "a"}' + request[:30])
            time.sleep(1)
            may_go_on.set()
            assert sender.recv(10_000).startswith(b"HTTP/1.1 200 ")
            assert seconds_until_closed(sender, drip(b"", b"")) < 3, "the further request never arrived"
        assert first.result().status_code == 200


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/embeddings", content=body, headers={"Content-Type": "application/json", **headers})


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_bodies_in_gzip_are_read(url: str, encoding: str) -> None:
    answer = post(url, gzip.compress(BODY), **{"Content-Encoding": encoding})
    assert answer.json() == post(url, BODY).json()


def test_identity_is_no_encoding(url: str) -> None:
    assert post(url, BODY, **{"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "\u00fc nonsense"])
@pytest.mark.parametrize("path", BODIES)
def test_other_encodings_are_a_415_that_names_them(url: str, path: str, encoding: str) -> None:
    headers = {"Content-Encoding": encoding.encode("latin-1")}
    answer = httpx.post(url + path, content=zlib.compress(BODY), headers=headers)
    assert (answer.status_code, answer.headers["Accept-Encoding"]) == (415, "gzip")
    assert "reads bodies as they are, or in gzip" in words(path, answer)
    assert encoding in answer.text or not encoding.isalpha()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "no gzip": lambda body: body,
    "nothing": lambda body: b"",
    "half a stream": lambda body: gzip.compress(body)[:-10],
    "a wrong checksum": lambda body: gzip.compress(body)[:-8] + bytes(8),
    "two streams": lambda body: gzip.compress(body) * 2,
    "something behind it": lambda body: gzip.compress(body) + b"x",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_gzip_is_refused(url: str, name: str) -> None:
    answer = post(url, BROKEN[name](BODY), **{"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert "gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize("size", [200_000, 200 << 20])
def test_a_body_that_unzips_beyond_the_limit_is_refused_before_it_fills_the_memory(url: str, size: int) -> None:
    packer = zlib.compressobj(9, wbits=31)
    body = b"".join(
        [*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.compress(bytes(size % (1 << 20)))]
    )
    body = (body + packer.flush())[:90_000]
    begin = time.monotonic()
    answer = post(url, body, **{"Content-Encoding": "gzip"})
    assert answer.status_code == 413
    assert "larger than 100,000 bytes once it is unzipped" in answer.text
    assert time.monotonic() - begin < 2


def test_logs_and_limits_see_the_body_as_it_was(url: str) -> None:
    text: dict[str, Any] = {"input": ["a"] * 3}
    answer = post(url, gzip.compress(json.dumps(text).encode()), **{"Content-Encoding": "gzip"})
    assert len(answer.json()["data"]) == 3
