"""The stand-in on the loopback: which request goes where, and the bytes on the wire with their faults."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub import reading, writing
from hub.call import (
    FILES,
    OPEN,
    READ,
    SIGNED,
    WRITE,
    Answer,
    Call,
    Refused,
    find_repo,
    find_user,
    json_answer,
    require_signature,
    require_writer,
)
from hub.data import Fault, Hub, Repo, Request

Route = tuple[str, str, str, Callable[..., Answer]]  # methods, path, right, handler
_NAME = r"/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"/(?P<revision>[^/]+)"
_API = f"/api/models{_NAME}"
HUB_ROUTES: list[Route] = [
    ("POST", "/api/validate-yaml", OPEN, writing.validate_yaml),
    ("POST", "/api/repos/create", WRITE, writing.create_repo),
    ("POST", f"/api/complete_multipart{_NAME}/(?P<oid>[^/]+)", SIGNED, writing.complete_multipart),
    ("GET", f"{_API}/revision{_REVISION}", READ, reading.info),
    ("GET", f"{_API}/tree{_REVISION}", READ, reading.tree),
    ("GET", f"{_API}/refs", READ, reading.refs),
    ("GET", f"{_API}/auth-check/write", WRITE, reading.auth_check),
    ("POST", f"{_API}/preupload{_REVISION}", WRITE, writing.preupload),
    ("POST", f"{_API}/commit{_REVISION}", WRITE, writing.commit),
    ("POST", f"{_API}/tag{_REVISION}", WRITE, writing.add_tag),
    ("GET HEAD", rf"{_NAME}/resolve{_REVISION}/(?P<path>.+)", FILES, reading.resolve),
    ("POST", rf"{_NAME}\.git/info/lfs/objects/batch", WRITE, writing.lfs_batch),
    ("POST", rf"{_NAME}\.git/info/lfs/objects/verify", WRITE, writing.lfs_verify),
]
STORAGE_ROUTES: list[Route] = [
    ("GET HEAD", f"{_NAME}/stored/(?P<oid>[^/]+)/(?P<path>.+)", SIGNED, reading.stored),
    ("PUT", f"{_NAME}/upload/(?P<oid>[^/]+)/(?P<number>[0-9]+)", SIGNED, writing.put_part),
]


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The Hub on a free port, and its storage on another: the client never sends a token to another origin."""
    with contextlib.ExitStack() as stack:
        hub.url = stack.enter_context(_listening(hub, HUB_ROUTES))
        hub.storage_url = stack.enter_context(_listening(hub, STORAGE_ROUTES))
        hub.stop = stack.close
        yield hub


def answer(call: Call, method: str, routes: list[Route]) -> Answer:
    """The answer of the route whose method and path fit, to a client that has the right to it."""
    path = urlsplit(call.target).path
    for methods, pattern, right, handler in routes:
        match = re.fullmatch(pattern, path)
        if match and method in methods.split():
            names = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            try:
                return handler(*_granted(call, names.pop("repo", ""), right), **names)
            except Refused as refused:
                return refused.answer
    return Refused(404, f"Sorry, we can't find the page you are looking for: {method} {path}").answer


def _granted(call: Call, name: str, right: str) -> tuple[Call] | tuple[Call, Repo]:
    if right == SIGNED:
        require_signature(call)
        return call, call.hub.repos[name]
    known = replace(call, user=find_user(call))
    if name:
        return known, find_repo(known, name, right)
    if right == WRITE:
        require_writer(known)
    return (known,)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the client downloads with 8 threads, and each request is a connection


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    routes: list[Route]

    def _serve(self) -> None:
        fault = self.hub.next_fault(self.command, unquote(self.path))
        fault.before(self.hub)
        expected = int(self.headers.get("Content-Length") or 0)
        body = self._receive(expected if fault.receive_bytes is None else min(expected, fault.receive_bytes))
        if len(body) < expected:  # the connection breaks, by a fault or because the client is gone
            self._record(0, len(body), 0)
            return
        answered = self._answer(fault, body)
        content = fault.sent(answered.body)
        sent = b"" if self.command == "HEAD" else content[: fault.send_bytes]
        self._record(answered.status, len(body), len(sent))
        with contextlib.suppress(ConnectionError):  # a client that was killed
            self.send_response(answered.status)
            for name, value in {"Content-Length": str(len(content)), **answered.headers, **fault.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - names of BaseHTTPRequestHandler

    def _receive(self, size: int) -> bytes:
        body = bytearray()
        with contextlib.suppress(ConnectionError):
            while len(body) < size and (more := self.rfile.read1(min(2**16, size - len(body)))):
                body += more
        return bytes(body)

    def _answer(self, fault: Fault, body: bytes) -> Answer:
        failed = json_answer({"error": f"a fault of {fault.status}"}, fault.status)
        if fault.status and not fault.is_late:
            return failed
        if "Transfer-Encoding" in self.headers:  # as S3 says of bodies of unknown length
            return Refused(501, "A header you provided implies functionality that is not implemented").answer
        call = Call(self.hub, self.path, self.headers, fault.received(body), fault)
        with self.hub.lock:
            answered = answer(call, self.command, self.routes)
        return failed if fault.status else answered

    def _record(self, status: int, received_bytes: int, sent_bytes: int) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, status, received_bytes, sent_bytes, self.headers.get("Range", ""))
        self.hub.requests.append(request)

    def log_message(self, *_: object) -> None:
        """Keep stderr for the tests."""


@contextlib.contextmanager
def _listening(hub: Hub, routes: list[Route]) -> Iterator[str]:
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "routes": routes})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
