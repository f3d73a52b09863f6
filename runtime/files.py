"""Files that are complete or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import OutputError

PART_SUFFIX = ".part"
_NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # NFS, FUSE: work without one
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)  # the error of `write` names no file
_NUMPY_FULL_DISK = re.compile(r"\d+ requested and \d+ written")  # the error of numpy's `tofile` has no number either
_REMEMBERED_BYTES = 1 << 20  # smaller files are hashed faster than looked up
_MIN_AGE_NS = 100_000_000  # a file system's clock may tick 100 times a second: two changes within a tick look like one


def cache_folder() -> Path | None:
    """The folder of what f2gguf remembers between runs: $F2GGUF_CACHE. It can be removed at any time.

    None where nothing names one: no HOME, and a user whom the system does not know, as in some containers.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "f2gguf")
    try:
        return Path(os.environ.get("F2GGUF_CACHE") or default).expanduser().absolute()
    except RuntimeError:
        return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give an empty temporary file beside `path`; rename it to `path` when the block ends well, remove it otherwise.

    A process that is killed leaves at most a `.part` file, which the next run overwrites. A symbolic link stays, and
    its target is replaced. Raises `OutputError` with the reason of the operating system (full disk, no permission), for
    a path that is no regular file, and at once where another process writes it; other errors of the block pass.
    """
    with _output_errors(path, held="another process is writing it. Wait until that has ended, or name another file."):
        target = path.resolve()
        if not target.name or (target.exists() and not target.is_file()):
            raise OutputError(f"{path}: is no regular file. Name another one.")
        part = target.with_name(target.name + PART_SUFFIX)
        part.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(part, os.O_RDWR | os.O_CREAT)
    try:
        with _output_errors(path, only_of=part):
            os.ftruncate(descriptor, 0)
            yield part
        with _output_errors(path):
            os.fsync(descriptor)
            part.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is missing. Raises `OutputError` if another run has it.

    No lock file stays: the lock is on the folder itself, and ends with the process.
    """
    with _output_errors(folder, held="another run is at work there. Wait for its end, or choose another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(folder, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)


def open_locked(path: Path, flags: int, *, wait: bool = False) -> int:
    """A descriptor of `path` that holds the only lock on it until it is closed.

    Raises `BlockingIOError` where another process holds it, unless `wait`.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # the process that had the lock may have renamed or removed the file since it was opened here
            is_there = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except OSError as error:
            is_there = error.errno in _NO_LOCKS
            if not is_there and not isinstance(error, FileNotFoundError):
                os.close(descriptor)
                raise
        if is_there:
            return descriptor
        os.close(descriptor)


def require_absent(path: Path, *, force: bool) -> None:
    """Raise `OutputError` if `path` exists and may not be overwritten. Call it before the work."""
    with _output_errors(path):
        exists = path.exists()
    if exists and not force:
        raise OutputError(f"{path}: exists already. Pass --force to overwrite it, or another -o.")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, or raise `OutputError` and leave the file as it was."""
    with writing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def require_free_space(folder: Path, size_bytes: int, what: str, *, choose_with: str = "--out") -> None:
    """Raise `OutputError` unless the disk of `folder` can take `size_bytes` more for `what`."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size_bytes:
        raise OutputError(
            f"{folder}: {what} needs {format_size(size_bytes)} and the disk has {format_size(free)} left. "
            f"Free some space, or choose another disk with {choose_with}."
        )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits; remembered until the file changes."""
    stamp = _stamp(path)
    record = f"hashes/{stamp[0]:x}-{stamp[1]:x}"
    known, digest = recall(record) or (None, "")
    if known == stamp:
        return str(digest)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_at_rest = stamp == _stamp(path) and time.time_ns() - max(stamp[3:]) > _MIN_AGE_NS
    if stamp[2] >= _REMEMBERED_BYTES and is_at_rest:
        remember(record, [stamp, digest])
    return digest


def remember(name: str, value: Any) -> None:
    """Keep a JSON value in the cache folder. If there is none to write to, later runs only take longer."""
    text = json.dumps(value)
    if folder := cache_folder():
        with contextlib.suppress(OutputError):
            write_text(folder / f"{name}.json", f"{sha256_text(text)}\n{text}\n")


def recall(name: str) -> Any:
    """The value that `remember` kept, None if there is none or its file is damaged."""
    if (folder := cache_folder()) is None:
        return None
    try:
        checksum, _, text = (folder / f"{name}.json").read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    text = text.removesuffix("\n")
    return json.loads(text) if checksum == sha256_text(text) else None


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Values of which one changes when a file's content does."""
    it = path.stat()
    return [it.st_dev, it.st_ino, it.st_size, it.st_mtime_ns, it.st_ctime_ns]


def format_size(size_bytes: float) -> str:
    """1_234_567 -> '1.2 MB' (decimal units, as the Hub shows them)."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} GB"


def format_bound(fraction: float) -> str:
    """0.02 -> '2%', 0.0001 -> '0.01%'."""
    return f"{100 * fraction:.4g}%"


@contextlib.contextmanager
def _output_errors(path: Path, *, only_of: Path | None = None, held: str = "") -> Iterator[None]:
    """Turn an `OSError` into "`path` cannot be written". With `only_of`, only an error of that file or its disk.

    `held` is the message for a lock of another process.
    """
    try:
        yield
    except OSError as error:
        if only_of and not _is_of(only_of, error):
            raise
        if held and isinstance(error, BlockingIOError):
            raise OutputError(f"{path}: {held}") from error
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason}. What was there before is untouched.") from error


def _is_of(part: Path, error: OSError) -> bool:
    if error.filename is not None:
        return error.filename in (part, part.parent, str(part), str(part.parent))
    return error.errno in _FULL_DISK or (error.errno is None and _NUMPY_FULL_DISK.fullmatch(str(error)) is not None)
