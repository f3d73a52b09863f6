"""The sides of `f2gguf bench`. Each is alone in a process, which answers pickled requests on stdin."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from f2gguf.evals.endpoint import BATCH_TEXTS, connected, open_endpoint
from f2gguf.runtime.errors import BenchFailed, F2ggufError

OURS, LLAMA_EMBED, LLAMA_SERVER = "f2gguf", "Llama.embed", "llama-server"
TRANSFORMERS = {f"sentence-transformers {dtype}": dtype for dtype in ("float32", "bfloat16")}
N_CONNECTIONS = 4  # to a server or URL
N_SLOTS = 8  # texts that llama-server works on at a time
START_TIMEOUT_S = 300
_TORCH_DEVICES = {"auto": None, "cpu": "cpu", "metal": "mps", "cuda": "cuda"}
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class SideSettings:
    """How a side is run. `n_ctx` has room for the longest text; the last three fields belong to a URL."""

    model: str
    pooling: str
    device: str
    n_threads: int
    n_ctx: int = 512
    checkpoint: str | None = None
    llama_server: str | None = None
    server_flags: tuple[str, ...] = ()
    url: str | None = None
    url_model: str | None = None
    api_key_env: str | None = None


@dataclass(frozen=True)
class Side:
    """A runtime that has loaded the model. `encode` turns texts and their prompt into vectors."""

    encode: Callable[[list[str], str], Any]
    setup: str  # how it is run, for the report
    pid: int | None = field(default_factory=os.getpid)  # the process whose memory counts


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Highest resident memory of a process, this one by default. None for another one where there is no /proc.

    Not by getrusage on Linux: its ru_maxrss begins at the parent's memory, which a child shares until it calls exec.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if pid not in (None, os.getpid()):
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def running_server(command: list[str], *, log: IO[bytes] | int | None = None) -> Iterator[tuple[str, int]]:
    """Start a server on a free port, and give its URL and process id once it lists its models. It ends with the block.

    Raises `BenchFailed` if it ends early, or does not answer.
    """
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    os.environ["no_proxy"] = ",".join(filter(None, (os.environ.get("no_proxy"), _HOST)))
    url, deadline = f"http://{_HOST}:{port}", time.monotonic() + START_TIMEOUT_S
    process = subprocess.Popen([*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while not _answers(f"{url}/v1/models"):
            if process.poll() is not None:
                raise BenchFailed(f"{command[0]}: ended with exit code {process.returncode}. Check the server's flags.")
            if time.monotonic() > deadline:
                raise BenchFailed(f"{command[0]}: did not load the model within {START_TIMEOUT_S} seconds.")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def server_command(settings: SideSettings, *, n_slots: int = N_SLOTS) -> list[str]:
    """llama-server, with a slot of `n_ctx` for each text at a time. The user's flags are last and win."""
    n_ctx = str(settings.n_ctx)
    flags = ["--embedding", "--pooling", settings.pooling, "-t", str(settings.n_threads)]
    flags += ["-np", str(n_slots), "-c", str(n_slots * settings.n_ctx), "-b", n_ctx, "-ub", n_ctx]
    flags += ["-ngl", "0", "--device", "none"] if settings.device == "cpu" else ["-ngl", "999"]
    return [str(settings.llama_server), "-m", settings.model, "--host", _HOST, *flags, *settings.server_flags]


def _f2gguf(settings: SideSettings) -> Iterator[Side]:
    from f2gguf.runtime.embedder import Embedder

    options: dict[str, Any] = {"device": settings.device, "n_threads": settings.n_threads, "pooling": settings.pooling}
    with Embedder(settings.model, **options) as model:
        yield Side(lambda texts, prompt: model.encode(texts, prompt=prompt), f"Embedder.encode, {model.description}")


def _llama_embed(settings: SideSettings) -> Iterator[Side]:
    import llama_cpp
    from f2gguf.runtime.gguf.header import POOLING_IDS

    n_ctx, n_threads = settings.n_ctx, settings.n_threads
    options: dict[str, Any] = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), n_ctx)
    options |= dict.fromkeys(("n_threads", "n_threads_batch"), n_threads)
    options |= {"n_gpu_layers": 0 if settings.device == "cpu" else -1, "pooling_type": POOLING_IDS[settings.pooling]}
    with contextlib.closing(llama_cpp.Llama(settings.model, embedding=True, verbose=False, **options)) as llama:
        yield Side(
            lambda texts, prompt: llama.embed([prompt + text for text in texts], normalize=True),
            f"Llama(embedding=True), n_ctx = n_batch = n_ubatch = {n_ctx}, {n_threads} threads",
        )


def _sentence_transformers(settings: SideSettings, dtype: str) -> Iterator[Side]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(settings.n_threads)
    loading: dict[str, Any] = {"model_kwargs": {"dtype": getattr(torch, dtype)}, "local_files_only": True}
    model = SentenceTransformer(settings.checkpoint, device=_TORCH_DEVICES[settings.device], **loading)
    options: dict[str, Any] = {"batch_size": BATCH_TEXTS, "normalize_embeddings": True, "show_progress_bar": False}
    yield Side(
        lambda texts, prompt: model.encode(texts, prompt=prompt, **options),
        f"SentenceTransformer.encode, batch_size {BATCH_TEXTS}, {model.device}, {settings.n_threads} threads",
    )


def _llama_server(settings: SideSettings) -> Iterator[Side]:
    command = server_command(settings)
    with running_server(command) as (url, pid):
        yield from _url(replace(settings, url=f"{url}/v1"), setup=shlex.join(command[5:]), pid=pid)


def _url(settings: SideSettings, *, setup: str = "", pid: int | None = None) -> Iterator[Side]:
    """An OpenAI-compatible API, asked for several lists of texts at a time."""
    endpoint = open_endpoint(str(settings.url), model=settings.url_model, key_env=settings.api_key_env)
    with connected(endpoint) as ask, ThreadPoolExecutor(N_CONNECTIONS) as pool:
        yield Side(
            lambda texts, prompt: ask([prompt + text for text in texts], run=pool.map),
            f"{setup or endpoint.name}; lists of {BATCH_TEXTS} texts over {N_CONNECTIONS} connections",
            pid,
        )


_OPENERS: dict[str, Callable[[SideSettings], Iterator[Side]]] = {
    OURS: _f2gguf,
    LLAMA_EMBED: _llama_embed,
    LLAMA_SERVER: _llama_server,
    **{name: functools.partial(_sentence_transformers, dtype=dtype) for name, dtype in TRANSFORMERS.items()},
}
_opened = contextlib.contextmanager(lambda name, settings: _OPENERS.get(name, _url)(settings))


def main() -> None:
    """Serve the side that the first argument names."""
    name, settings = sys.argv[1], SideSettings(**json.loads(sys.argv[2]))
    serve(_opened(name, settings))


def serve(opening: contextlib.AbstractContextManager[Side]) -> None:
    """Open a side, then answer requests until stdin ends."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what libraries print must not get between the answers
        try:
            with opening as side, contextlib.suppress(EOFError):
                send(answers, {"setup": side.setup})
                while True:
                    send(answers, _run(side, **pickle.load(sys.stdin.buffer)))
        except F2ggufError as error:
            send(answers, {"error": str(error)})


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    pickle.dump(message, stream)
    stream.flush()


def _run(side: Side, *, texts: list[str], prompt: str, with_vectors: bool) -> dict[str, Any]:
    """Embed the texts once: the seconds, the peak memory so far, and the vectors where they are asked for."""
    import numpy as np

    start = time.perf_counter()
    vectors = side.encode(texts, prompt)
    figures = {"seconds": time.perf_counter() - start, "peak_rss_bytes": side.pid and peak_rss_bytes(side.pid)}
    return figures | ({"vectors": np.asarray(vectors, dtype=np.float32)} if with_vectors else {})
