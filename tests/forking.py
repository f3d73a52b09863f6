"""Programs in processes of their own that need not import everything again: forks of one that has.

    process = start("print(1)", "an argument", stdout=subprocess.PIPE)  # as `python -c "print(1)" "an argument"`

The server never computes, for the threads of OpenMP and BLAS do not survive a fork. It imports packages that hold no
state, neither f2gguf nor what reads its settings from the environment (huggingface_hub): a child imports these as a
fresh Python does. All children have the server's seed of hash(). Where that or memory is tested, pass `is_real=True`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SERVER = "import sys; sys.path.insert(0, sys.argv[1]); import forkserver; exec(forkserver.serve(int(sys.argv[2])))"
READ_AT_START = (
    "BLIS",
    "GGML",
    "GOMP",
    "KMP",
    "LANG",
    "LC_",
    "LD_",
    "MALLOC",
    "MKL",
    "MPL",
    "OMP",
    "OPENBLAS",
    "PYTHON",
)
PR_SET_CHILD_SUBREAPER = 36

_lock = threading.Lock()


def start(
    code: str, *arguments: str | Path, env: dict[str, str] | None = None, is_real: bool = False, **options: Any
) -> subprocess.Popen[Any]:
    """Start `python -c code arguments`. The caller ends it."""
    environment = dict(os.environ if env is None else env)
    can_fork = not is_real and sys.platform == "linux" and _settings(environment) == _settings(_server()[1])
    kind = _Fork if can_fork else subprocess.Popen
    return kind([sys.executable, "-c", code, *map(str, arguments)], env=environment, **options)


def run(
    code: str, *arguments: str | Path, stdin: str | bytes = "", timeout_s: float = 600, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait for it: what it wrote, as text."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with start(code, *arguments, **streams, **options) as process:
        try:
            out, err = process.communicate(stdin if isinstance(stdin, bytes) else stdin.encode(), timeout=timeout_s)
        finally:
            process.kill()
    texts = (stream.decode("utf-8", errors="replace") for stream in (out, err))
    return subprocess.CompletedProcess(process.args, process.returncode, *texts)


def settings_of_this_process() -> dict[str, str]:
    """What a process must share with this one to be a fork."""
    return _settings(dict(os.environ))


class _Fork(subprocess.Popen):
    """A child of the server. It becomes ours when the one between them ends, so that all else is as with any Popen."""

    def _execute_child(self, args: list[str], executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any,
                       cwd: Any, env: Any, startupinfo: Any, creationflags: Any, shell: Any,
                       *pipes: int) -> None:  # fmt: skip
        theirs = pipes[0], pipes[3], pipes[5]
        job = pickle.dumps((args[2], args[3:], str(cwd or Path.cwd()), env, _ignored()))
        with _lock:
            connection = _server()[0]
            fds = [mine if fd == -1 else fd for mine, fd in enumerate(theirs)]
            socket.send_fds(connection, [len(job).to_bytes(8, "little")], fds)
            connection.sendall(job)
            answer = connection.recv(9, socket.MSG_WAITALL)
        assert len(answer) == 9, "the fork server has ended"
        self.pid, self._child_created = int.from_bytes(answer[:8], "little"), True
        self._close_pipe_fds(*pipes[:6])


@functools.cache
def _server() -> tuple[socket.socket, dict[str, str]]:
    """The connection to the server, and its environment. It ends when this process does."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair()
    environment = dict(os.environ)
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours, environment


def _ignored() -> list[int]:
    """The signals that this process ignores, and that its children then ignore too, as a job in the background does."""
    return [number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]


def _settings(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}
