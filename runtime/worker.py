"""One thread that makes all calls into llama.cpp, so that Ctrl-C, other threads and close() never meet one half way."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from f2gguf.runtime.errors import Closed

Result = TypeVar("Result")


class Worker:
    """Runs calls one after the other, in the order they came, whichever thread they come from.

    Signals reach only the main thread, which waits in Python: Ctrl-C is answered at once, while the call goes on
    unheard. llama.cpp's OpenMP keeps one team of threads instead of one for every caller.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._entry = threading.Lock()  # no call may queue up behind the last one
        self._is_closed = False
        threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="llama.cpp").start()
        weakref.finalize(self, self._jobs.put, None)  # the thread ends with its owner, closed or not

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Run `work` and give its result, or raise what it raised. Raises `Closed` after `close`."""
        return self._submit(work, is_last=False).wait()

    def close(self, last: Callable[[], None], *, wait: bool) -> None:
        """Run `last` behind every call that came before, then end the thread. Closing twice does nothing."""
        with contextlib.suppress(Closed):
            job = self._submit(last, is_last=True)
            if wait:
                job.wait()

    def _submit(self, work: Callable[[], Any], *, is_last: bool) -> _Job:
        job = _Job(work)
        with self._entry:
            if self._is_closed:
                raise Closed("this Embedder was closed; open the file again.")
            self._is_closed = is_last
            self._jobs.put(job)
            if is_last:
                self._jobs.put(None)
        return job


class _Job:
    """A call, and where its outcome is waited for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Any = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # handed to the thread that waits
            self._failure = error
        finally:
            self._done.set()

    def wait(self) -> Any:
        self._done.wait()
        if self._failure:
            raise self._failure
        return self._result


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while job := jobs.get():
        job.run()
        del job  # its arrays, while the next one is waited for


@contextlib.contextmanager
def _once() -> Iterator[Worker]:
    worker = Worker()
    try:
        yield worker
    finally:
        worker.close(lambda: None, wait=False)


def interruptible(work: Callable[[], Result]) -> Result:
    """Run one C call so that Ctrl-C is answered at once while the call goes on unheard.

    In the main thread the signal would raise inside the log callback, where ctypes swallows it.
    """
    with _once() as worker:
        return worker(work)
