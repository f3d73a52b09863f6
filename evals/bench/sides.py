"""The sides of `f2gguf bench`, each alone in a process: requests are JSON lines on stdin, answers go to stdout."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import F2ggufError

OURS, LLAMA_EMBED, LLAMA_SERVER = "f2gguf", "Llama.embed", "llama-server"
TRANSFORMERS = {f"sentence-transformers {dtype}": dtype for dtype in ("float32", "bfloat16")}
BATCH_TEXTS = 32  # sentence-transformers' own default, and the texts of one HTTP request
_TORCH_DEVICES = {"auto": None, "cpu": "cpu", "metal": "mps", "cuda": "cuda"}


@dataclass(frozen=True)
class SideSettings:
    """What all sides are given. `n_ctx` is room for the longest text."""

    model: str
    pooling: str
    device: str
    n_threads: int
    n_ctx: int
    checkpoint: str | None = None
    llama_server: str | None = None
    server_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """A runtime with the model loaded: texts and their prompt go in, vectors come out. `setup` says how it is run."""

    encode: Callable[[list[str], str], Any]
    setup: str
    compute_seconds: Callable[[], float | None] = lambda: None  # so far, inside llama.cpp
    peak_rss_bytes: Callable[[], int | None] = lambda: peak_rss_bytes()


def peak_rss_bytes(pid: int | None = None) -> int | None:
    """Highest resident memory of a process, of this one by default; None for another one where there is no /proc.

    Not by getrusage on Linux: its ru_maxrss begins at the parent's memory, which a child shares until it calls exec.
    """
    status = Path(f"/proc/{pid or os.getpid()}/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if pid is not None:
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _f2gguf(settings: SideSettings) -> Iterator[Side]:
    from f2gguf.runtime.embedder import Embedder

    options: dict[str, Any] = {"device": settings.device, "n_threads": settings.n_threads, "pooling": settings.pooling}
    with Embedder(settings.model, **options) as model:
        yield Side(
            encode=lambda texts, prompt: model.encode(texts, prompt=prompt),
            setup=f"Embedder.encode, {model.description}",
            compute_seconds=lambda: model.compute_seconds,
        )


@contextmanager
def _llama_embed(settings: SideSettings) -> Iterator[Side]:
    import llama_cpp
    from f2gguf.runtime.gguf.header import POOLING_IDS

    llama = llama_cpp.Llama(
        settings.model,
        embedding=True,
        n_ctx=settings.n_ctx,
        n_batch=settings.n_ctx,
        n_ubatch=settings.n_ctx,
        n_threads=settings.n_threads,
        n_threads_batch=settings.n_threads,
        n_gpu_layers=0 if settings.device == "cpu" else -1,
        pooling_type=POOLING_IDS[settings.pooling],
        verbose=False,
    )
    yield Side(
        encode=lambda texts, prompt: llama.embed(with_prompt(texts, prompt), normalize=True),
        setup=f"Llama(embedding=True), n_ctx = n_batch = n_ubatch = {settings.n_ctx}, {settings.n_threads} threads",
    )
    llama.close()


@contextmanager
def _llama_server(settings: SideSettings) -> Iterator[Side]:
    from f2gguf.evals.bench.server import serving

    with serving(settings) as server:
        yield Side(
            encode=lambda texts, prompt: server.embed(with_prompt(texts, prompt)),
            setup=server.setup,
            peak_rss_bytes=lambda: peak_rss_bytes(server.process.pid),
        )


@contextmanager
def _sentence_transformers(settings: SideSettings, *, dtype: str) -> Iterator[Side]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(settings.n_threads)
    model = SentenceTransformer(
        settings.checkpoint,
        device=_TORCH_DEVICES[settings.device],
        model_kwargs={"dtype": getattr(torch, dtype)},
        local_files_only=True,
    )
    yield Side(
        encode=lambda texts, prompt: model.encode(
            texts, prompt=prompt, batch_size=BATCH_TEXTS, normalize_embeddings=True, show_progress_bar=False
        ),
        setup=f"SentenceTransformer.encode, batch_size {BATCH_TEXTS}, {model.device}, {settings.n_threads} threads",
    )


SIDES: dict[str, Callable[[SideSettings], AbstractContextManager[Side]]] = {
    OURS: _f2gguf,
    LLAMA_EMBED: _llama_embed,
    LLAMA_SERVER: _llama_server,
    **{name: functools.partial(_sentence_transformers, dtype=dtype) for name, dtype in TRANSFORMERS.items()},
}


def with_prompt(texts: Sequence[str], prompt: str) -> list[str]:
    return [prompt + text for text in texts]


def main() -> None:
    """Open the side that the first argument names, then answer requests until stdin ends."""
    name, settings = sys.argv[1], SideSettings(**json.loads(sys.argv[2]))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print must not get between the answers
        try:
            with SIDES[name](settings) as side:
                _answer(answers, setup=side.setup)
                for line in sys.stdin:
                    _answer(answers, **_run(side, **json.loads(line)))
        except F2ggufError as error:
            _answer(answers, error=str(error))


def _answer(answers: Any, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def _run(side: Side, *, texts: list[str], prompt: str, vectors_path: str | None) -> dict[str, Any]:
    """Embed the texts once, and save their vectors where the request names a path."""
    computed_before = side.compute_seconds()
    start = time.perf_counter()
    vectors = side.encode(texts, prompt)
    seconds = time.perf_counter() - start
    computed = side.compute_seconds()
    peak = side.peak_rss_bytes()
    if vectors_path:
        import numpy as np

        np.save(vectors_path, np.asarray(vectors, dtype=np.float32))
    compute_seconds = None if computed is None or computed_before is None else computed - computed_before
    return {"seconds": seconds, "compute_seconds": compute_seconds, "peak_rss_bytes": peak}


if __name__ == "__main__":
    main()
