"""What stands before the dialects: request ids, keys, limits, slow senders, clients that leave, logs and figures."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Mapping, MutableMapping
from typing import Any

from f2gguf.runtime.errors import F2ggufError
from f2gguf.runtime.server.answers import Refused
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/health")  # without a key, to be read: the page, and what a load balancer asks
CLIENT_LEFT = 499  # nginx's status for the log; nobody receives it

log = logging.getLogger("f2gguf.serve")


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; what a record has in `facts` comes along.

    Of an error that is not ours only the kind is told, and where: its words could quote a text.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and (error := record.exc_info[1]):
            line["error"] = f"{type(error).__name__}{f': {error}' if isinstance(error, F2ggufError) else ''}"
            line["traceback"] = "".join(traceback.format_tb(error.__traceback__))
        return json.dumps(line)


class Drain:
    """Whether the server is about to end, and what it still owes."""

    def __init__(self) -> None:
        self.has_begun = False
        self.n_in_flight = 0

    async def finished(self) -> None:
        """Return once every accepted request was answered."""
        while self.n_in_flight:
            await asyncio.sleep(0.02)


class Guard:
    """ASGI middleware around the dialects. Refusals are in the dialect of the path; no user's text is ever logged.

    Endpoints put what they know of a request (model, number of texts and tokens) into `request.state.facts`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        drain: Drain,
        paths: frozenset[str],
        headers: Mapping[str, str],
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._drain = drain
        self._paths = paths
        self._headers = headers  # of every response that does not state its own
        self._keys = [_digest(key) for key in limits.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        facts: dict[str, Any] = {"request_id": uuid.uuid4().hex, "method": scope["method"]}
        scope.setdefault("state", {})["facts"] = facts
        answer = _Answer(send, facts, self._drain, self._headers)
        try:
            await self._answer(scope, receive, answer)
        finally:
            self._report(scope["path"], facts, answer.status, time.perf_counter() - begin)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Run the app, or say why not."""
        self._drain.n_in_flight += 1
        self._metrics.in_flight.inc()
        try:
            self._require_welcome(scope)
            body = await self._body(Headers(scope=scope), receive)
            _read_as_json(scope)
            await _until_left(self._app(scope, _replayed(body, receive), answer), receive, wanted=bool(body))
        except Refused as refused:
            await refused.response(scope["path"])(scope, receive, answer)
        except _Left:
            answer.status = CLIENT_LEFT
        except Exception:
            log.exception("request failed", extra={"facts": answer.facts})
            words = f"the server failed on this request; its log says why, at {answer.facts['request_id']}."
            await Refused("failed", words).response(scope["path"])(scope, receive, answer)
        finally:
            self._metrics.in_flight.dec()
            self._drain.n_in_flight -= 1

    def _require_welcome(self, scope: Scope) -> None:
        path, is_read = scope["path"], scope["method"] in ("GET", "HEAD")
        if is_read and path in OPEN_PATHS:
            return
        if self._drain.has_begun:
            raise Refused("draining", "the server is shutting down.", headers={"Retry-After": "1"})
        if self._keys and not self._knows_key(Headers(scope=scope)):
            words = "no valid API key: send Authorization: Bearer KEY, or X-API-Key: KEY."
            raise Refused("no_key", words, headers={"WWW-Authenticate": "Bearer"})
        if self._drain.n_in_flight > self._limits.max_requests and not is_read:
            raise Refused(
                "overloaded", f"{self._limits.max_requests} requests are in flight.", headers={"Retry-After": "1"}
            )

    def _knows_key(self, headers: Mapping[str, str]) -> bool:
        """Whether the request has one of the keys, in a time that tells nothing about them."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        equal = [hmac.compare_digest(key, digest) for key in self._keys]  # all of them: no early end tells anything
        return any(equal)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body, before anybody parses it. Raises `Refused` for a large or a slow one."""
        limit = self._limits.max_body_bytes
        too_large = Refused("body_too_large", f"the body is larger than {limit:,} bytes.")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            words = f"the body did not arrive within {self._limits.body_timeout_s:g} s."
            raise Refused("body_too_slow", words) from error

    def _report(self, path: str, facts: dict[str, Any], status: int, seconds: float) -> None:
        shown = path if path in self._paths else "other"  # an unknown path may hold anything, even a user's text
        self._metrics.requests.labels(shown, str(status)).inc()
        self._metrics.request_seconds.labels(shown).observe(seconds)
        line = {**facts, "path": shown, "status": status, "ms": round(1000 * seconds, 2)}
        log.info("request", extra={"facts": line})


class _Left(Exception):
    """The client closed its connection."""


class _Answer:
    """Sends what the app does, with the request's id, and remembers the status."""

    def __init__(self, send: Send, facts: MutableMapping[str, Any], drain: Drain, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = headers
        self.facts = facts
        self._drain = drain
        self.status = 500

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.facts["request_id"]
            for name, value in self._headers.items():
                headers.setdefault(name, value)
            if self._drain.has_begun or self.status in (408, 413):  # what is left of the body is not worth reading
                headers["Connection"] = "close"
        await self._send(message)


async def _until_left(work: Awaitable[None], receive: Receive, *, wanted: bool) -> None:
    """Do the work, but stop where the client leaves, who `wanted` something that takes a while."""
    if not wanted:
        await work
        return
    running = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
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
    """A `receive` that gives a body that was read already, once."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _read_as_json(scope: Scope) -> None:
    """Bodies are JSON whatever their type: curl's -d says that they are a form, and Ollama's users leave it so.

    Not those of browsers, whose pages could then write to this server without asking it first (CORS).
    """
    headers = MutableHeaders(scope=scope)
    if "origin" not in headers:
        headers["content-type"] = "application/json"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
