"""A fork of `forking` is what `python -c` is, as far as its program can tell."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import forking
import pytest

TELL = """
import atexit, os, signal, sys, threading
print(sys.argv, __name__, sys.path, os.getcwd(), sys.flags, sorted(os.environ.items()), repr(sys.stdin.buffer.read()))
for s in (sys.stdin, sys.stdout, sys.stderr):
    print(s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno(), s.isatty(), s.seekable(), type(s.buffer))
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)])
print([name for name in sys.modules if name.startswith(("f2gguf", "huggingface_hub", "torch", "transformers"))])
print(threading.active_count(), sorted(os.listdir("/proc/self/fd"))[:4])
atexit.register(print, "ended")
"""


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        ("", 0),
        ("sys.exit(5)", 5),
        ("sys.exit('a word')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("os._exit(130)", 130),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("threading.Thread(target=lambda: print('a thread')).start()", 0),
    ],
)
def test_a_fork_sees_and_says_what_a_process_does(end: str, exit_code: int, tmp_path: Path) -> None:
    code = f"{TELL}\nsys.stdout.flush()\n{end}"
    options = {"stdin": b"\xff\n", "cwd": tmp_path, "env": {"A": "b", **forking.settings_of_this_process()}}
    real, fork = (forking.run(code, "an", "argument ", is_real=is_real, **options) for is_real in (True, False))
    assert fork.returncode == real.returncode == exit_code
    assert fork.stdout == real.stdout
    assert fork.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_fork_ignores_what_its_starter_ignores(handler: signal.Handlers) -> None:
    code = "import signal; print(signal.getsignal(signal.SIGINT))"
    before = signal.signal(signal.SIGINT, handler)
    try:
        real, fork = (forking.run(code, is_real=is_real).stdout for is_real in (True, False))
    finally:
        signal.signal(signal.SIGINT, before)
    assert real == fork
    assert fork == f"{handler}\n"


def test_a_fork_can_be_waited_for_and_killed() -> None:
    with forking.start("import time; print(1, flush=True); time.sleep(60)", stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(2) == b"1\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        process.terminate()
        assert process.wait() == -signal.SIGTERM


def test_other_settings_of_python_make_a_process() -> None:
    env = {**forking.settings_of_this_process(), "PYTHONIOENCODING": "latin-1"}
    assert forking.run("import sys; print(sys.stdout.encoding)", env=env).stdout == "iso8859-1\n"
