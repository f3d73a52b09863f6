"""An OpenAI-compatible embeddings server for tests, with faults on demand."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

KEY = "sk-0123456789"


@dataclass
class Api:
    """What the server of a test does, and the requests that it got."""

    vectors: Callable[[list[str]], np.ndarray]
    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # given first, before it answers well
    change: Callable[[dict[str, Any]], Any] = lambda answer: answer
    requests: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> Any:
        rows = self.vectors(body["input"]).tolist()
        data = [{"index": i, "embedding": row} for i, row in enumerate(rows)]
        return self.change({"data": data[::-1]})  # in no order: the index counts


@contextlib.contextmanager
def serving(vectors: Callable[[list[str]], np.ndarray]) -> Iterator[Api]:
    """A server on a free port of this machine, which gives texts the vectors of a function."""
    state = Api(vectors)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sent = {"path": self.path, "key": self.headers.get("Authorization"), "headers": dict(self.headers)}
            state.requests.append({**sent, **body})
            status, headers = state.answers.pop(0) if state.answers else (200, {})
            answer = state.answer(body) if status == 200 else {"error": f"no, {self.headers.get('Authorization')}"}
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(payload)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
        server.shutdown()
