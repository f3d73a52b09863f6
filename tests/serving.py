"""`f2gguf serve` for tests: in a process of its own, or in a thread where a test must reach inside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forking
import httpx
import uvicorn
from f2gguf.runtime import Embedder
from f2gguf.runtime.server.app import create_app
from f2gguf.runtime.server.batching import Compute, Schedule
from f2gguf.runtime.server.connections import ServerConfig
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits, ServedModel

COMMAND = "from f2gguf.quantize.cli import f2gguf; f2gguf(prog_name='f2gguf')"


@dataclass
class Served:
    """A running `f2gguf serve`."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)  # of its stderr

    @property
    def logs(self) -> list[dict[str, Any]]:
        """The requests that it logged."""
        records = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [record for record in records if record["message"] == "request"]

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def serving_process(*arguments: str | Path, is_real: bool = False, **environment: str) -> Iterator[Served]:
    """The command on a free port, once it answers."""
    command, env = (COMMAND, "serve", "--port", "0", *arguments), {**os.environ, **environment}
    with forking.start(*command, stderr=subprocess.PIPE, text=True, env=env, is_real=is_real) as process:
        served = Served(process)
        reader = threading.Thread(target=_read, args=(served,), daemon=True)
        reader.start()
        try:
            _await(lambda: served.url or process.poll() is not None)
            assert served.url, served.lines
            _await(lambda: _answers(served.url))
            yield served
        finally:
            process.kill()
            process.wait()
            reader.join()


@contextlib.contextmanager
def serving_thread(
    embedder: Embedder, limits: Limits | None = None, *, compute: Compute | None = None
) -> Iterator[str]:
    """The app under the name 'nano', in a thread; its URL. `compute` stands in for the model's own."""
    limits, metrics = limits or Limits(), Metrics()
    app = create_app([ServedModel("nano", embedder, limits, metrics, Schedule(), compute=compute)], limits, metrics)
    server = uvicorn.Server(ServerConfig(app, limits, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    _await(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def figure(url: str, name: str) -> float:
    """A figure of /metrics by its name and labels."""
    text = httpx.get(f"{url}/metrics").text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"{name} ")))


def _read(served: Served) -> None:
    assert served.process.stderr
    for line in served.process.stderr:
        served.lines.append(line.rstrip("\n"))
        if line.startswith("http://"):
            served.url = line.strip()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def _await(condition: Any, timeout_s: float = 60) -> None:
    """Wait until it holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)
