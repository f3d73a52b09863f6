"""The process of one side of `f2gguf bench`, seen from the parent."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from f2gguf.evals.bench.sides import SideSettings, send
from f2gguf.runtime.errors import BenchFailed

_PROGRAM = ("-P", "-c", "from f2gguf.evals.bench.sides import main; main()")
PATIENCE_S = 1.0
_N_LINES = 5  # of a side's last output, quoted in its error
_HINTS: dict[int, str] = {
    signal.SIGKILL: " The machine may have too little memory for all sides at once.",
    signal.SIGILL: " Some compilers get llama.cpp's use of AMX wrong: https://github.com/ggml-org/llama.cpp/issues/20824",
}


class SideProcess:
    """One side, alone in its process and its process group: Ctrl-C reaches the parent only, which ends the group."""

    def __init__(self, name: str, settings: SideSettings, program: Sequence[str] = _PROGRAM) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        command = [sys.executable, *program, name, json.dumps(asdict(settings))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        self.pid = self._process.pid
        self._requests: Any = self._process.stdin
        self._answers: Any = self._process.stdout

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer. Raises `BenchFailed` with the side's own reason, or with how its process ended."""
        try:
            answer: dict[str, Any] = pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            raise self._failed(f"its process ended early ({how}).{_HINTS.get(-code, '')}") from error
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        with contextlib.suppress(OSError):  # its process has ended, and `answer` says how
            send(self._requests, request)
        return self.answer()

    def close(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(OSError):  # a request that nobody reads any more
            self._requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # an idle side ends itself, and waits for its server
            self._process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where all have ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()
        self._log.close()

    def _failed(self, reason: str) -> BenchFailed:
        """The error of this side, which names it, and quotes the last lines that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()
        last = [line.rstrip() for line in lines if line.strip()][-_N_LINES:]
        return BenchFailed("\n  ".join([f"{self.name}: {reason}", *(["It said last:", *last] if last else [])]))


@contextlib.contextmanager
def started(
    sides: Mapping[str, SideSettings], *, program: Sequence[str] = _PROGRAM
) -> Iterator[dict[str, SideProcess]]:
    """Start all sides, and end them all with the block.

    `program` are Python's arguments for a program that calls `sides.serve` with the name and settings that follow them.
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C within Popen would leave a process behind
        stack.callback(signal.signal, signal.SIGINT, before)
        for name, settings in sides.items():
            processes[name] = SideProcess(name, settings, program)
            stack.callback(processes[name].close)
        signal.signal(signal.SIGINT, before)
        yield processes
