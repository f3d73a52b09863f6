"""llama-server as a side of `f2gguf bench`: started on a free port, asked by HTTP as OpenAI's clients do."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from f2gguf.evals.bench.sides import BATCH_TEXTS, SideSettings
from f2gguf.runtime.errors import BenchFailed
from numpy.typing import NDArray

N_CONNECTIONS = 4
N_SLOTS = 8  # texts that it works on at a time
START_TIMEOUT_S = 300
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A running llama-server, and a thread for each connection to it."""

    process: subprocess.Popen[bytes]
    port: int
    setup: str
    pool: ThreadPoolExecutor

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors of texts, asked for in lists of BATCH_TEXTS over all connections, (n_texts, n_embd)."""
        lists = [texts[i : i + BATCH_TEXTS] for i in range(0, len(texts), BATCH_TEXTS)]
        connections: SimpleQueue[http.client.HTTPConnection] = SimpleQueue()
        for _ in range(N_CONNECTIONS):  # new ones, for it closes those that were idle for 5 seconds
            connections.put(http.client.HTTPConnection(_HOST, self.port))

        def ask(part: list[str]) -> NDArray[np.float32]:
            connection = connections.get()
            try:
                return _embeddings(connection, part)
            finally:
                connections.put(connection)

        try:
            return np.concatenate(list(self.pool.map(ask, lists)))
        except (OSError, http.client.HTTPException) as error:
            code = self.process.poll()
            how = f"{type(error).__name__}: {error}" if code is None else f"it ended with exit code {code}"
            raise BenchFailed(f"llama-server: does not answer any more ({how}).") from error
        finally:
            for _ in range(N_CONNECTIONS):
                connections.get().close()


@contextlib.contextmanager
def serving(settings: SideSettings) -> Iterator[Server]:
    """Start llama-server, wait until it has loaded the model, and end it with the block."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    flags = _flags(settings)
    command = [str(settings.llama_server), "-m", settings.model, "--host", _HOST, "--port", str(port), *flags]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    setup = f"{shlex.join(flags)}; lists of {BATCH_TEXTS} texts over {N_CONNECTIONS} connections"
    try:
        _wait_until_loaded(process, port)
        with ThreadPoolExecutor(N_CONNECTIONS) as pool:
            yield Server(process, port, setup, pool)
    finally:
        process.kill()
        process.wait()


def _flags(settings: SideSettings) -> list[str]:
    """Its flags; the user's come last, where they win."""
    n_ctx = str(settings.n_ctx)
    flags = ["--embedding", "--pooling", settings.pooling, "-t", str(settings.n_threads)]
    flags += ["-np", str(N_SLOTS), "-c", str(N_SLOTS * settings.n_ctx), "-b", n_ctx, "-ub", n_ctx]
    flags += ["-ngl", "0", "--device", "none"] if settings.device == "cpu" else ["-ngl", "999"]
    return [*flags, *settings.server_flags]


def _wait_until_loaded(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchFailed(f"llama-server: ended with exit code {process.returncode}. Give it --server-flags.")
        connection = http.client.HTTPConnection(_HOST, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == http.client.OK:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise BenchFailed(f"llama-server: did not load the model within {START_TIMEOUT_S} seconds.")


def _embeddings(connection: http.client.HTTPConnection, texts: list[str]) -> NDArray[np.float32]:
    """One request: (n_texts, n_embd) float32, sent as base64, which is what OpenAI's clients ask for."""
    body = json.dumps({"input": texts, "encoding_format": "base64"})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer: dict[str, Any] = json.loads(response.read())
    if response.status != http.client.OK:
        raise BenchFailed(f"llama-server: refuses a list of texts: {answer.get('error', answer)}. See --server-flags.")
    rows = sorted(answer["data"], key=lambda row: row["index"])
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype=np.float32) for row in rows])
