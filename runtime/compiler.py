"""C++ that is compiled where it is first used, by the compiler that is there, and kept in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from f2gguf.runtime.files import cache_folder

_COMPILERS = ("c++", "g++", "clang++")  # behind $CXX
_COMMON = ("-std=c++17", "-O3", "-shared", "-fPIC")
_TIMEOUT_S = 120
_NO_EXECUTION = getattr(os, "ST_NOEXEC", 0)  # of a file system; Linux has it
_LOCK = threading.Lock()  # so that threads do not write one file


def own_is_off() -> bool:
    """Whether the user wants none of f2gguf's own C++ (F2GGUF_OWN_KERNELS=0)."""
    return os.environ.get("F2GGUF_OWN_KERNELS") == "0"


def compiled(source: Path, name: str, flags: Sequence[str], stamp: str, more: Sequence[str | Path] = ()) -> Path | None:
    """The library `name` of `source` and the headers beside it, which can be loaded; None without a compiler or a place
    to write to.

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
    with _LOCK, contextlib.suppress(OSError):  # of a folder that cannot be read, or written to
        if _can_be_loaded(path) or any(_compile([compiler, *arguments], path) for compiler in compilers):
            return path
    return None


def _compile(command: Sequence[str | Path], path: Path) -> bool:
    """Whether it made what can be loaded. Raises `OSError` where the folder of `path` cannot have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.statvfs(path.parent).f_flag & _NO_EXECUTION:
        raise OSError(errno.EACCES, "nothing in it may be executed", path.parent)
    # In a folder of this process, so that others see all of it or nothing
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}-") as name:
        part = Path(name, path.name)
        try:
            subprocess.run([*command, "-o", part], capture_output=True, timeout=_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            return False
        is_right = _can_be_loaded(part)
        if is_right:
            part.replace(path)
        return is_right


def _can_be_loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True
