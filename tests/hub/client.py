"""Programs with the real Hub client, each in a process of its own, pointed at the stand-in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import forking

from hub.data import Hub

# The client waits 23 s in all before it gives up on a Hub that refuses connections: its retries stay, its waits shrink
_QUICK = "import time; time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))\n"
_SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_THEIRS = ("hf_", "huggingface", "transformers_", "http_proxy", "https_proxy", "all_proxy")


def start_python(
    code: str, *arguments: str | Path, hub: Hub, home: Path, token: str = "", is_offline: bool = False
) -> subprocess.Popen[str]:
    """Start a program with its cache in `home`, without the user's own settings and tokens. The caller ends it."""
    settings = {name: value for name, value in os.environ.items() if not name.lower().startswith(_THEIRS)}
    settings |= _SETTINGS | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "F2GGUF_CACHE": str(home / "f2gguf")}
    settings |= {"HF_TOKEN": token} if token else {}
    settings |= {"HF_HUB_OFFLINE": "1"} if is_offline else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return forking.start(_QUICK + code, *arguments, env=settings, text=True, **pipes)


def start_command(
    name: str, *arguments: str | Path, hub: Hub, home: Path, token: str = "", is_offline: bool = False
) -> subprocess.Popen[str]:
    """Start `quantize ...` or `f2gguf ...`."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        f"from f2gguf.quantize.cli import {name}; {name}(prog_name='{name}')"
    )
    return start_python(code, *arguments, hub=hub, home=home, token=token, is_offline=is_offline)


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Wait for a program, or end it when its time is over."""
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_python(code: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start_python` and `finish` in one."""
    return finish(start_python(code, *arguments, **options))


def run_command(name: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start_command` and `finish` in one."""
    return finish(start_command(name, *arguments, **options))


def only_error(process: subprocess.CompletedProcess[str], exit_code: int = 1) -> str:
    """The one line of a refusal; retries that the client logs may come before it."""
    assert (process.returncode, process.stdout) == (exit_code, "")
    assert "Traceback" not in process.stderr
    *before, last = process.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith("error: ")]
    return last
