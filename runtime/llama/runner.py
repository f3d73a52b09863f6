"""A thread and its contexts: a batch becomes raw vectors, and a text that has none spoils no other text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from f2gguf.runtime.llama.context import ComputeSettings, Context, Pause, TensorMissing, Watch
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.worker import Worker
from numpy.typing import NDArray

Rows = NDArray[np.float32]

CTX_STEP = 256  # contexts grow in these steps, so that a slightly longer text needs no new one

log = logging.getLogger("f2gguf")


def unusable(rows: NDArray[np.floating[Any]]) -> list[int]:
    """Indices of the rows that must not be returned: not finite, or zero."""
    return [int(i) for i in np.flatnonzero(~(np.isfinite(rows).all(axis=1) & rows.any(axis=1)))]


class Runner:
    """A worker thread, and the contexts that it alone computes with. Several runners may share a model."""

    def __init__(
        self,
        model: Model,
        settings: ComputeSettings,
        context_type: type[Context],
        *,
        load_on_cpu: Callable[[], Model],
        watch: Watch | None,
    ) -> None:
        self.context_type = context_type
        self._model = model
        self._settings = settings
        self._load_on_cpu = load_on_cpu
        self._watch = watch
        self._needs_f32 = False  # an F16 KV cache, and flash attention, were too small for a text
        # (with flash attention or without, with pauses or without) -> the context
        self._contexts: dict[tuple[bool, bool], Context] = {}
        self._past_seconds = 0.0
        self._worker = Worker()
        if model.offloaded:
            self._worker.bind()  # no GPU can be used in a fork of the process that opened it

    def __call__(self, texts: Sequence[Ids], n_shared: int, pause: Pause | None = None) -> Rows:
        """Raw vectors of a batch, (n_texts, n_embd); NaN rows for texts that have no finite vector."""
        return self._worker(partial(self._embed, texts, n_shared, pause))

    @property
    def compute_seconds(self) -> float:
        """Time spent inside llama.cpp's llama_decode so far."""
        return self._past_seconds + sum(context.compute_seconds for context in list(self._contexts.values()))

    def renew(self) -> None:
        """Forget what earlier texts left behind."""
        self._worker(self._forget)

    def require_here(self) -> None:
        """Raise `Forked` in a fork of the process that has computed."""
        self._worker.require_here()

    def close(self, *, wait: bool = True) -> None:
        """Free the contexts behind every call that came before."""
        self._worker.close(self._drop_all, wait=wait)

    def _embed(self, texts: Sequence[Ids], n_shared: int, pause: Pause | None) -> Rows:
        """Vectors of one batch. Texts without a finite vector are tried again in halves, at last each by itself."""
        rows = self._run(texts, n_shared, pause)
        bad = unusable(rows)
        if not bad:
            return rows
        self._drop_contexts(pause)  # their memory holds the NaN, and 0 * NaN is NaN for the next batch
        if len(texts) == 1:
            return self._retry(texts[0])
        for half in filter(len, np.array_split(bad, 2)):
            rows[half] = self._embed([texts[i] for i in half], 0, pause)
        return rows

    def _run(self, texts: Sequence[Ids], n_shared: int, pause: Pause | None) -> Rows:
        if self.context_type is Context:
            n_shared = 0  # also of batches that were packed before stock pooling took over
        try:
            return self._context_for(texts, n_shared, pause).embed(texts, n_shared=n_shared, pause=pause)
        except TensorMissing as missing:
            log.warning("%s: %s; llama.cpp's own pooling is used, which is slower", self._model.path, missing)
            self.context_type = Context
            self._drop_contexts(pause)
            return self._run(texts, 0, pause)
        except BaseException:
            self._drop_contexts(pause)
            raise

    def _context_for(self, texts: Sequence[Ids], n_shared: int, pause: Pause | None) -> Context:
        n_tokens = sum(len(ids) - n_shared for ids in texts)
        flash = n_tokens >= self._model.min_flash and not self._needs_f32
        key = (flash, pause is not None)
        context = self._contexts.get(key)
        if context is None or context.n_ctx < n_shared + n_tokens:
            self._drop(key)
            context = self._new_context(
                self._model, n_shared + n_tokens, flash=flash, f32=self._needs_f32, pauses=pause is not None
            )
            self._contexts[key] = context
        return context

    def _retry(self, ids: Ids) -> Rows:
        """The vector of one text in higher precision, then on the CPU; a NaN row where nothing helps, (1, n_embd)."""
        for on_cpu in ["", " on the CPU"] if self._model.offloaded else [""]:
            model = self._load_on_cpu() if on_cpu else self._model
            context = self._new_context(model, len(ids), flash=False, f32=True)  # flash attention rounds to F16
            row = context.embed([ids])
            context.close()
            if not unusable(row):
                words = "%s: a text of %d tokens has a vector only with an F32 KV cache%s"
                log.warning(words, self._model.path, len(ids), on_cpu)
                # The next text may need it as well. With `deterministic` its bytes must not depend on this text.
                self._needs_f32 = model is self._model and not self._settings.deterministic
                return row
        return np.full((1, self._model.n_embd), np.nan, dtype=np.float32)

    def _new_context(self, model: Model, n_tokens: int, *, flash: bool, f32: bool, pauses: bool = False) -> Context:
        n_ctx = -(-n_tokens // CTX_STEP) * CTX_STEP
        return self.context_type(
            model, self._settings, n_ctx=n_ctx, flash=flash, f32=f32, pauses=pauses, watch=self._watch
        )

    def _forget(self) -> None:
        self._drop_all()
        self._needs_f32 = False

    def _drop_contexts(self, pause: Pause | None) -> None:
        """Free those of texts with a `pause`, or those of texts without: the others may be half way through a batch."""
        for flash in (True, False):
            self._drop((flash, pause is not None))

    def _drop_all(self) -> None:
        for key in list(self._contexts):
            self._drop(key)

    def _drop(self, key: tuple[bool, bool]) -> None:
        if context := self._contexts.pop(key, None):
            self._past_seconds += context.compute_seconds
            context.close()
