"""One thread that makes all calls for some contexts, so that Ctrl-C, threads and close() never meet a call half way."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from f2gguf.runtime.errors import Closed, Forked

Result = TypeVar("Result")


class Worker:
    """Runs the calls of all threads one after the other, in the order of their arrival.

    Signals reach only the main thread, which waits in Python, so that Ctrl-C is answered while the call still runs. In
    the thread of the call, it would raise inside a callback, where ctypes swallows it. And llama.cpp's OpenMP keeps
    one team of threads, instead of one for every caller.

    A fork copies neither this thread nor those of OpenMP, and would wait for them for ever. Until the first call there
    is none, so that a server may open a file and fork its workers.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
        self._thread: int | None = None
        self._process: int | None = None  # that the calls are bound to

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Run `work` and give its result, or raise what it raised. Raises `Closed` after `close`, or `Forked`.

        A call out of another call, which a callback of llama.cpp makes, is run at once.
        """
        self.bind()
        if threading.get_ident() == self._thread:
            return work()

        def run() -> Result:
            self._thread = threading.get_ident()  # for this call alone: others may get the number of an ended thread
            try:
                return work()
            finally:
                self._thread = None

        try:
            future = self._executor.submit(run)
        except RuntimeError as error:
            raise Closed("this Embedder was closed; open the file again.") from error
        return future.result()

    def bind(self) -> None:
        """Bind the calls to this process. Raises `Forked` in a fork of the process that they are bound to."""
        self.require_here()
        self._process = os.getpid()

    def require_here(self) -> None:
        """Raise `Forked` in a fork of the process that the calls are bound to."""
        if self._is_elsewhere:
            raise Forked(
                "this Embedder was used before this process was forked, and the fork has none of its threads. Open the "
                "file again here, or start processes by multiprocessing.get_context('spawn'): they open what they get."
            )

    @property
    def _is_elsewhere(self) -> bool:
        return self._process not in (None, os.getpid())

    def close(self, last: Callable[[], None], *, wait: bool) -> None:
        """Run `last` behind every call that came before, then end the thread. Closing twice does nothing.

        In a fork there is no thread to end.
        """
        if self._is_elsewhere:
            return
        with contextlib.suppress(RuntimeError):  # closed already
            self._executor.submit(last)
        self._executor.shutdown(wait=wait)


def interruptible(work: Callable[[], Result]) -> Result:
    """Run one call into llama.cpp in a thread of its own, so that Ctrl-C is answered while the call still runs."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")
    try:
        return executor.submit(work).result()
    finally:
        executor.shutdown(wait=False)


def free_with(owner: object, free: Callable[[Any], None], pointer: Any) -> weakref.finalize[[Any], Any]:
    """Call `free(pointer)` when `owner` goes, or when the result is called; never in a fork, nor at the end of Python.

    A fork has a copy of the memory, but not the threads or the GPU that it belongs to. At the end of Python, after
    Ctrl-C, it may still be in use.
    """
    process = os.getpid()
    finalizer = weakref.finalize(owner, lambda it: free(it) if os.getpid() == process else None, pointer)
    finalizer.atexit = False
    return finalizer
