"""Token ids become raw vectors: in batches, which several contexts compute side by side on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from queue import LifoQueue

import numpy as np
from f2gguf.runtime.errors import GGUFError
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.context import MAX_TEXTS, ComputeSettings, Context, LastTokenContext, Pause, Watch
from f2gguf.runtime.llama.kernels.choice import choose, summary
from f2gguf.runtime.llama.library import cuda_memory
from f2gguf.runtime.llama.model import Model, runs_on_cpu
from f2gguf.runtime.llama.packing import Ids, pack
from f2gguf.runtime.llama.runner import Rows, Runner
from f2gguf.runtime.llama.tokenizer import load_overrides

# Contexts that compute side by side on a GPU, which waits for half of the time while llama.cpp prepares a batch. On an
# H200, one, two and three of them embed 188,000, 344,000 and 438,000 tokens/s (80M in Q8_0), and 59,000, 85,000 and
# 95,000 (0.6B in Q4_K_M). Their vectors are the same.
GPU_RUNNERS = 3

log = logging.getLogger("f2gguf")


class Engine:
    """A model in memory and the contexts that run it."""

    def __init__(self, header: Header, settings: ComputeSettings, *, watch: Watch | None = None) -> None:
        self.header = header
        self.settings = settings
        self._watch = watch
        self.model = _load(header, settings, settings.device)
        context_type = LastTokenContext if header.takes_last_tokens(settings.pooling) else Context
        n_runners = 1 if watch else _n_runners(self.model)
        shared = replace(settings, n_threads=max(1, settings.n_threads // n_runners))
        load_on_cpu = partial(_load, header, settings, "cpu")
        self._runners = [
            Runner(self.model, shared, context_type, load_on_cpu=load_on_cpu, watch=watch) for _ in range(n_runners)
        ]
        self._idle: LifoQueue[Runner] = LifoQueue()  # the last one used comes first: it has a context
        for runner in reversed(self._runners):
            self._idle.put(runner)

    @property
    def _context_type(self) -> type[Context]:
        return self._runners[0].context_type

    @property
    def description(self) -> str:
        """Device, threads, way of computing, and matrices that are laid out anew for faster kernels."""
        is_last_token = self._context_type is LastTokenContext
        path = "last-token path" if is_last_token else f"llama.cpp's {self.settings.pooling} pooling"
        n_threads = self.settings.n_threads
        threads = f"{n_threads} thread{'s' * (n_threads > 1)}"
        contexts = f", {self.n_batches} contexts" if self.n_batches > 1 else ""
        on_cpu = runs_on_cpu(self.settings.device, self.settings.n_gpu_layers)
        kernels = summary(self.header, self.model.placement) if on_cpu else ""
        return f"{self.model.offloaded or 'cpu'}, {threads}, {path}{kernels}{contexts}"

    @property
    def compute_seconds(self) -> float:
        """Time spent inside llama.cpp's llama_decode so far."""
        return sum(runner.compute_seconds for runner in self._runners)

    @property
    def batch_tokens(self) -> int:
        """Tokens up to which short texts are packed into one batch."""
        return self._context_type.batch_tokens(self.model)

    @property
    def n_batches(self) -> int:
        """Batches that are computed at a time."""
        return len(self._runners)

    @property
    def shares_prefixes(self) -> bool:
        """Whether leading ids that all texts of a batch share are computed once."""
        return not (self.settings.deterministic or self._watch or self._context_type is Context)

    def embed(
        self,
        texts: Sequence[Ids],
        *,
        n_shared: int,
        on_batch: Callable[[list[int]], None],
        pause: Pause | None = None,
    ) -> Rows:
        """Raw vectors, (n_texts, n_embd) float32; NaN rows for texts that have no finite vector.

        `n_shared` leading ids are the same in all texts. `on_batch` is told which texts a batch has finished. `pause`
        is called a few times in each layer. It may embed other texts, without a `pause`.
        """
        if not self.shares_prefixes:
            n_shared = 0  # a watch sees every text whole
        vectors = np.empty((len(texts), self.header.n_embd), dtype=np.float32)
        lengths = [len(ids) - n_shared for ids in texts]
        n_texts = 1 if self.settings.deterministic else MAX_TEXTS
        batches = list(pack(lengths, n_tokens=self.batch_tokens, n_texts=n_texts))

        def compute(runner: Runner, batch: list[int]) -> Rows:
            return runner([texts[i] for i in batch], n_shared, pause)

        # A longer text than fits a batch takes memory of its own, in one context alone
        n_alone = len(batches) if self.n_batches == 1 else sum(lengths[it[0]] > self.batch_tokens for it in batches)
        for batch in batches[:n_alone]:
            vectors[batch] = compute(self._runners[0], batch)
            on_batch(batch)
        for batch, rows in self._side_by_side(compute, batches[n_alone:]):
            vectors[batch] = rows
            on_batch(batch)
        return vectors

    def _side_by_side(
        self, compute: Callable[[Runner, list[int]], Rows], batches: list[list[int]]
    ) -> Iterator[tuple[list[int], Rows]]:
        """Each batch with its vectors; every runner computes one at a time, for whichever call comes first.

        Where a further one fails, as for want of memory, it is not used again, and the first one takes its batch.
        """
        first = self._runners[0]

        def run(batch: list[int]) -> Rows:
            runner, stays = self._idle.get(), True
            try:
                return compute(runner, batch)
            except GGUFError as error:
                stays = runner is first
                if stays:
                    raise
                log.warning("%s: a further context failed, and is not used again: %s", self.header.path, error)
            finally:
                if stays:
                    self._idle.put(runner)
            return compute(first, batch)

        pool = ThreadPoolExecutor(self.n_batches, thread_name_prefix="f2gguf batches")
        try:
            yield from zip(batches, pool.map(run, batches), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def renew(self) -> None:
        """Forget what earlier texts left behind, so that the next vectors are those that a new process gives."""
        for runner in self._runners:
            runner.renew()

    def require_here(self) -> None:
        """Raise `Forked` in a fork of the process that has computed."""
        self._runners[0].require_here()

    def close(self, *, wait: bool = True) -> None:
        """Free the contexts behind every call that came before; the model goes with its last user."""
        for runner in self._runners:
            runner.close(wait=wait)


def _load(header: Header, settings: ComputeSettings, device: str) -> Model:
    return Model(
        header.path,
        device=device,
        n_gpu_layers=settings.n_gpu_layers,
        overrides=load_overrides(header),
        placement=choose(header) if runs_on_cpu(device, settings.n_gpu_layers) else None,
    )


def _n_runners(model: Model) -> int:
    """Several where the whole model is on a card of CUDA with room: half of its memory. Others were not measured."""
    if not model.is_offloaded_whole:
        return 1
    free_bytes, total_bytes = cuda_memory()
    return GPU_RUNNERS if free_bytes * 2 >= total_bytes > 0 else 1
