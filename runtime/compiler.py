"""C++ that is compiled where it is first used, by the compiler that is there, and kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from f2gguf.runtime.files import cache_folder

_COMPILERS = ("c++", "g++", "clang++")  # behind $CXX
_COMMON = ("-std=c++17", "-O3", "-shared", "-fPIC")
_TIMEOUT_S = 120
_LOCK = threading.Lock()  # so that threads do not write one file


def own_is_off() -> bool:
    """Whether the user wants none of f2gguf's own C++ (F2GGUF_OWN_KERNELS=0)."""
    return os.environ.get("F2GGUF_OWN_KERNELS") == "0"


def compiled(source: Path, name: str, flags: Sequence[str], stamp: str, more: Sequence[str | Path] = ()) -> Path | None:
    """The library `name` of `source` and the headers beside it; None without a compiler or a place to write to.

    It is compiled again for other sources, `flags` or `stamp`, which says what else it depends on. `more` arguments
    name folders and libraries.
    """
    if (folder := cache_folder()) is None:
        return None
    sources = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(f"{sources} {flags} {stamp}".encode()).hexdigest()[:16]
    path = folder / f"{name}-{key}.so"
    arguments = [*_COMMON, *flags, source, *more]
    compilers = filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS)))
    with _LOCK:
        return path if path.exists() or any(_compile([compiler, *arguments], path) for compiler in compilers) else None


def _compile(command: Sequence[str | Path], path: Path) -> bool:
    part = path.with_suffix(f".{os.getpid()}.part")  # so that another process sees all of it or nothing
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [*command, "-o", part]
        if subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S).returncode == 0:
            part.replace(path)
            return True
    except (OSError, subprocess.TimeoutExpired):
        pass  # the next compiler, or none
    with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)
    return False
