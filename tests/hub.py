"""A stand-in for the Hugging Face Hub on 127.0.0.1, and `quantize fetch` run against it in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes]
REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The client waits 23 s in all before it gives up on a Hub that refuses connections: its retries stay, its waits go
_FETCH = "import time; time.sleep = lambda _: None; from f2gguf.quantize.cli import quantize; quantize()"
_SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Hub:
    """One repository with one commit, which `main` names too. A test changes the attributes to have it misbehave."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.stated_bytes: dict[str, int] = {}  # a file's Content-Length, where it is not the true one
        self.is_gated = False
        self.is_cut = False  # sends half of every file, then closes the connection
        self.requests: list[tuple[str, str]] = []  # (method, path), in order
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def asked_for(self, *methods: str) -> set[str]:
        """The files in requests of these methods: HEAD asks for the size, GET for the content."""
        files = [(method, path.split("/", 5)) for method, path in self.requests if "/resolve/" in path]
        return {parts[5] for method, parts in files if method in methods}

    def answer(self, path: str) -> Answer:
        """Model info, list of files, or a file, as the Hub answers; its error codes where there is none.

        Source: https://huggingface.co/docs/hub/api, and `hf_raise_for_status` of huggingface_hub for the codes.
        """
        where, found, rest = path.partition(f"/{REPO}/")
        if not found:
            return _refusal(404, "RepoNotFound", "Repository not found")
        kind, revision, *name = rest.split("/", 2)
        if revision not in (COMMIT, "main"):
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if where == "/api/models":
            return 200, {"Content-Type": "application/json"}, json.dumps(self._describe(kind)).encode()
        if self.is_gated:
            return _refusal(401, "GatedRepo", f"Access to model {REPO} is restricted.")
        if name[0] not in self.files:
            return _refusal(404, "EntryNotFound", "Entry not found")
        content = self.files[name[0]]
        size_bytes = self.stated_bytes.get(name[0], len(content))
        sent = content[: len(content) // 2] if self.is_cut else content
        return 200, {"ETag": f'"{_blob_id(content)}"', "Content-Length": str(size_bytes)}, sent

    def _describe(self, kind: str) -> object:
        if kind == "revision":
            return {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
            for name, content in self.files.items()
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        status, headers, body = self.hub.answer(path)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Keep stderr for the tests."""


def run_fetch(*arguments: str | Path, hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """Run `quantize fetch` with the real client and its cache in `home`, without the user's own settings and tokens."""
    theirs = ("hf_", "huggingface", "transformers_", "http_proxy", "https_proxy", "all_proxy")
    settings = {name: value for name, value in os.environ.items() if not name.lower().startswith(theirs)}
    settings |= _SETTINGS | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    command = [sys.executable, "-c", _FETCH, "fetch", *map(str, arguments)]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)


def _refusal(status: int, code: str, message: str) -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, b""


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()  # as git names a file
