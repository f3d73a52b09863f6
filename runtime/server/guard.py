"""What stands before the dialects: hosts, keys, limits, bodies, clients that leave, request ids, logs and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from f2gguf.runtime.server.answers import Refused
from f2gguf.runtime.server.batching import CLIENT
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/health")  # read without a key: the page, and what a load balancer asks
CLIENT_LEFT = 499  # nginx's status for the log; nobody receives it
_GZIP = 16 + zlib.MAX_WBITS  # zlib's number for gzip's header and trailer
_NAME = re.compile(r"[a-z0-9._-]{1,100}")  # of a host or an encoding: what may be shown
# A label of a name in a Host header (of another script in its ASCII form, xn--...). Compose's names have underscores.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT = re.compile(r"(?::[0-9]{1,5})?")

log = logging.getLogger("f2gguf.serve")


@dataclass
class Drain:
    """Whether the server is about to end, and how many requests it still has to answer."""

    has_begun: bool = False
    n_in_flight: int = 0


def host_name(host: str) -> str:
    """A Host header without its port, in lower case: 'localhost' of 'LocalHost.:8080', '::1' of '[::1]:8080'."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()


def is_host(text: str) -> bool:
    """Whether a Host header can be this.

    >>> is_host("models.example.org:8080"), is_host("[::1]:80"), is_host("a..b"), is_host("-x")
    (True, True, False, False)
    """
    name = host_name(text)
    if text.startswith("["):
        port = text.partition("]")[2]
        is_name = "]" in text and ":" in name and _is_address(name)
    else:
        port = text[len(text.partition(":")[0]) :]
        is_name = len(name) <= 253 and all(map(_LABEL.fullmatch, name.split(".")))
    return is_name and bool(_PORT.fullmatch(port)) and int(port[1:] or 0) < 65_536


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_own_host(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names this server: an address, a loopback name, or one of `names` ('*' among them: any).

    A web page could otherwise reach a local server under the page's own name, which it gives this machine's address
    (DNS rebinding). Such a page must have a name, so any address will do. So will no host, because browsers send one.

    >>> is_own_host("localhost:8080", ()), is_own_host("192.168.0.7:8080", ()), is_own_host("page.example", ())
    (True, True, False)
    """
    name = host_name(host)
    is_loopback = name == "localhost" or name.endswith(".localhost")
    return not name or is_loopback or name in names or "*" in names or _is_address(name)


@dataclass(eq=False)
class Guard:
    """ASGI middleware around the dialects. Refusals are in the dialect of the path; no user's text is ever logged.

    Endpoints put what they know of a request (model, number of texts and tokens) into `request.state.facts`.
    """

    app: ASGIApp
    limits: Limits
    metrics: Metrics
    drain: Drain
    paths: frozenset[str]
    headers: Mapping[str, str]  # of every response that does not state its own
    refuse: Callable[[Refused, str], Response]  # a refusal and its path

    def __post_init__(self) -> None:
        self._keys = [_digest(key) for key in self.limits.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        facts: dict[str, Any] = {"request_id": uuid.uuid4().hex, "method": scope["method"]}
        scope.setdefault("state", {})["facts"] = facts
        answer = _Answer(send, facts["request_id"], self.drain, self.headers)
        CLIENT.set(self._client(scope))
        self.drain.n_in_flight += 1
        self.metrics.in_flight.inc()
        try:
            await self._answer(scope, receive, answer)
        finally:
            self.metrics.in_flight.dec()
            self.drain.n_in_flight -= 1
            self._report(scope["path"], facts, answer.status, time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            headers = Headers(scope=scope)
            self._require_own_host(headers)
            self._require_welcome(scope)
            body = await self._body(headers, receive)
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # uvicorn leaves the body out
            # Read a body as JSON whatever its stated type: curl's -d calls it a form, and Ollama's users leave it so.
            # Bodies from browsers keep their type: pages could otherwise write here without asking first (CORS).
            if "origin" not in headers:
                MutableHeaders(scope=scope)["content-type"] = "application/json"
            work = self.app(scope, _replayed(body, receive), answer)
            await (_until_left(work, receive) if body else work)
        except _Left:
            answer.status = CLIENT_LEFT
        except Refused as refused:
            await self.refuse(refused, scope["path"])(scope, receive, answer)
        except Exception:
            log.exception("request failed", extra={"facts": scope["state"]["facts"]})
            words = f"the server failed on this request; its log says why, at {answer.request_id}."
            await self.refuse(Refused("internal_error", words), scope["path"])(scope, receive, answer)

    def _require_own_host(self, headers: Headers) -> None:
        for host in headers.getlist("host"):
            if not is_own_host(host, self.limits.host_names):
                name = host_name(host)
                shown = name if _NAME.fullmatch(name) else "NAME"
                words = (
                    "the request's Host header is neither an address, localhost nor a name of this server. If the name "
                    f"is right, start f2gguf serve with --allow-host {shown}."
                )
                raise Refused("host_not_allowed", words)

    def _require_welcome(self, scope: Scope) -> None:
        is_read = scope["method"] in ("GET", "HEAD")
        if is_read and scope["path"] in OPEN_PATHS:
            return
        if self.drain.has_begun:
            raise Refused("shutting_down", "the server is shutting down.", headers={"Retry-After": "1"})
        if self._keys and not self._knows_key(Headers(scope=scope)):
            words = "no valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY."
            raise Refused("invalid_api_key", words, headers={"WWW-Authenticate": "Bearer"})
        if self.drain.n_in_flight > self.limits.max_requests and not is_read:
            words = f"{self.limits.max_requests} requests are in flight."
            raise Refused("rate_limit_exceeded", words, headers={"Retry-After": "1"})

    def _client(self, scope: Scope) -> str:
        """Who takes turns with others: who has a key, or an address. It is never logged."""
        if self._keys:
            return _key(Headers(scope=scope))
        return str((scope.get("client") or [""])[0])

    def _knows_key(self, headers: Mapping[str, str]) -> bool:
        """Whether the request has one of the keys, in a time that tells nothing about them."""
        digest = _digest(_key(headers))
        equal = [hmac.compare_digest(key, digest) for key in self._keys]  # no early end, whose time could tell a key
        return any(equal)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, before anybody parses it. Raises `Refused` for a large, slow or unreadable one."""
        encoding = ", ".join(headers.getlist("content-encoding")).strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            shown = encoding if _NAME.fullmatch(encoding) else "of this kind"
            words = f"Content-Encoding {shown}: this server reads bodies as they are, or in gzip."
            raise Refused("unsupported_encoding", words, headers={"Accept-Encoding": "gzip"})
        body = await self._received(headers, receive)
        if encoding in ("", "identity"):
            return body
        return await asyncio.to_thread(_unzipped, body, self.limits.max_body_bytes)

    async def _received(self, headers: Headers, receive: Receive) -> bytes:
        """The body as it was sent."""
        limit = self.limits.max_body_bytes
        too_large = Refused("request_too_large", f"the body is larger than {limit:,} bytes.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            words = f"the body did not arrive within {self.limits.body_timeout_s:g} s."
            raise Refused("request_timeout", words) from error

    def _report(self, path: str, facts: dict[str, Any], status: int, seconds: float) -> None:
        shown = path if path in self.paths else "other"  # an unknown path may hold anything, even a user's text
        self.metrics.requests.labels(shown, str(status)).inc()
        self.metrics.request_seconds.labels(shown).observe(seconds)
        line = {**facts, "path": shown, "status": status, "ms": round(1000 * seconds, 2)}
        log.info("request", extra={"facts": line})


class _Left(Exception):
    """The client closed its connection."""


@dataclass(eq=False)
class _Answer:
    """Sends the app's response with the request's id, and remembers the status."""

    send: Send
    request_id: str
    drain: Drain
    headers: Mapping[str, str]
    status: int = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            for name, value in self.headers.items():
                headers.setdefault(name, value)
            if self.drain.has_begun or self.status in (408, 413):  # nobody will read the rest of the body
                headers["Connection"] = "close"
        await self.send(message)


async def _until_left(work: Awaitable[None], receive: Receive) -> None:
    """Do the work, but stop when the client leaves."""
    running, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise _Left
        await running
    finally:
        for task in (running, leaving):
            task.cancel()
        await asyncio.wait({running, leaving})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives once the body that was read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _unzipped(body: bytes, limit: int) -> bytes:
    """A body in gzip as it was before. Stops at the first byte over the limit: a few kB could hold gigabytes."""
    reader = zlib.decompressobj(_GZIP)
    try:
        plain = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refused("invalid_value", "the body is no gzip, though its Content-Encoding says so.") from error
    if len(plain) > limit:
        raise Refused("request_too_large", f"the body is larger than {limit:,} bytes once it is unzipped.")
    if not reader.eof or reader.unused_data:
        raise Refused("invalid_value", "the body is no whole gzip stream, or more than one.")
    return plain


def _key(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
