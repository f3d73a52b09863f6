"""One thread that makes all calls into llama.cpp, so that Ctrl-C, other threads and close() never meet one half way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from f2gguf.runtime.errors import Closed

Result = TypeVar("Result")


class Worker:
    """Runs the calls of all threads one after the other, in the order of their arrival.

    Signals reach only the main thread, which waits in Python, so that Ctrl-C is answered while the call still runs. In
    the thread of the call, it would raise inside a callback, where ctypes swallows it. And llama.cpp's OpenMP keeps
    one team of threads, instead of one for every caller.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Run `work` and give its result, or raise what it raised. Raises `Closed` after `close`."""
        try:
            future = self._executor.submit(work)
        except RuntimeError as error:
            raise Closed("this Embedder was closed; open the file again.") from error
        return future.result()

    def close(self, last: Callable[[], None], *, wait: bool) -> None:
        """Run `last` behind every call that came before, then end the thread. Closing twice does nothing."""
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
