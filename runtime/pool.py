"""Several processes that hold a model each, for `encode(pool=...)`, as sentence-transformers has it."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from f2gguf.runtime.calls import described
from f2gguf.runtime.errors import PoolBroken, TextError, WrongUsage

MOST_TEXTS = 5000  # of a chunk, as in sentence-transformers

Compute = Callable[..., Any]  # of texts


class Pool:
    """Processes that each call `opened` once, and what that gives with chunks of texts. `close()` ends them.

    They are started anew (`spawn`), so that a script must start its work under `if __name__ == "__main__":`.
    """

    def __init__(self, opened: Callable[[], Compute], n_processes: int, *, of: object) -> None:
        self.n_processes, self.of = n_processes, of  # of: what is equal for pools of the same model
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(n_processes, context, initializer=_open, initargs=(opened,))

    def map(
        self, texts: Sequence[str], *, chunk_size: int | None, on_progress: Callable[[int], None] | None, **options: Any
    ) -> list[Any]:
        """What comes of each chunk, in the order of the texts. Raises what the computing does, and `PoolBroken`."""
        size = chunk_size or max(1, min(math.ceil(len(texts) / self.n_processes / 10), MOST_TEXTS))
        chunks = {start: texts[start : start + size] for start in range(0, len(texts), size)} or {0: texts}
        futures: dict[Future[Any], int] = {}
        try:
            for start, chunk in chunks.items():
                futures[self._submit(chunk, start, options)] = len(chunk)
            for future in as_completed(futures):
                future.result()
                if on_progress:
                    on_progress(futures[future])
        except BaseException as error:  # a callback's or Ctrl-C too: the pool stays open for other texts
            for future in futures:
                future.cancel()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise PoolBroken(
                "a process of the pool ended before its work was done: it was killed, or could not open the file (see "
                "stderr). In a script, start the work under `if __name__ == '__main__':`."
            ) from error
        return [future.result() for future in futures]

    def _submit(self, texts: Sequence[str], start: int, options: dict[str, Any]) -> Future[Any]:
        try:
            return self._executor.submit(_compute, texts, start, options)
        except BrokenProcessPool:
            raise
        except RuntimeError as error:  # it was closed
            raise PoolBroken(f"the pool takes no texts: {error}. Start a new one.") from error

    def close(self) -> None:
        """End the processes. Closing twice does nothing."""
        self._executor.shutdown(cancel_futures=True)


def require_pool(pool: Any, *, of: object = None, chunk_size: Any = None) -> None:
    """Raise `WrongUsage` unless both are None, or a pool of f2gguf (of the same model) and a positive number."""
    if pool is not None and not isinstance(pool, Pool):
        raise WrongUsage(
            f"pool is {described(pool)}: an Embedder has pools of its own. Start one: "
            "pool = model.start_multi_process_pool(['cpu', 'cpu'])."
        )
    if pool is not None and of is not None and pool.of != of:
        raise WrongUsage("pool: another model started it, whose vectors it gives. Start one of this model.")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise WrongUsage(f"chunk_size is {chunk_size!r}: it is a number of texts, and must be positive.")


_of_this_process: list[Compute] = []  # which is one of a pool


def end_with_parent() -> None:
    """Let this process end when its parent is killed, where it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _open(opened: Callable[[], Compute]) -> None:
    end_with_parent()
    _of_this_process.append(opened())


def _compute(texts: Sequence[str], start: int, options: dict[str, Any]) -> Any:
    try:
        return _of_this_process[0](texts, **options)
    except TextError as error:
        raise TextError(f"behind the first {start:,} texts, {error}") from error
