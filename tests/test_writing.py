"""Files are complete or absent, one process at a time writes them, and only their own faults are called so."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from f2gguf.runtime import files
from f2gguf.runtime.errors import OutputError
from f2gguf.runtime.files import locked, write_text, writing

# Holds a path or folder until its stdin is closed, then writes half of the text more.
HOLD = """
import sys
from pathlib import Path
from f2gguf.runtime.files import locked, writing
path = Path(sys.argv[2])
with globals()[sys.argv[1]](path) as part:
    if part:
        part.write_bytes(b"half ")
    print("held", flush=True)
    sys.stdin.read()
    if part:
        part.open("ab").write(b"whole")
"""


@contextlib.contextmanager
def another_process(holder: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, holder, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process


def test_second_process_that_writes_a_path_is_refused_at_once_and_harms_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with another_process("writing", path) as process:
        with pytest.raises(OutputError, match=r"x\.gguf: another process is writing it"):
            write_text(path, "mine")
        process.communicate("")
    assert path.read_text() == "half whole"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "mine")
    assert path.read_text() == "mine"


def test_killed_writer_leaves_nothing_locked(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with another_process("writing", path) as process:
        process.kill()
        process.wait()
    assert [one.name for one in tmp_path.iterdir()] == ["x.gguf.part"]
    with writing(path) as part:
        assert part.read_bytes() == b"", "what the killed process wrote is no part of the file"
        part.write_text("mine")
    assert [one.name for one in tmp_path.iterdir()] == ["x.gguf"]


def test_lock_on_a_file_that_was_renamed_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process renames its part file between our `open` and our `flock`."""
    path, real = tmp_path / "x.gguf", files.fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(files.fcntl, "flock", real)
        (tmp_path / "x.gguf.part").replace(tmp_path / "theirs")
        real(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    write_text(path, "mine")
    assert (path.read_text(), (tmp_path / "theirs").read_text()) == ("mine", "")


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "dist" / "nano"
    folder.mkdir(parents=True)
    with (
        another_process("locked", folder) as process,
        pytest.raises(OutputError, match=r"dist/nano: another run is at work there"),
        locked(folder),
    ):
        process.kill()
    with locked(folder):
        assert list(folder.iterdir()) == []
        with pytest.raises(OutputError, match="another run"), locked(folder):
            pass


def test_folder_to_lock_is_made_or_its_fault_is_said(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "one"):
        assert (tmp_path / "new" / "one").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file: cannot be written"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path):
        write_text(tmp_path / "x", "mine")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("100 requested and 40 written"),  # as numpy says it
        PermissionError(errno.EACCES, "Permission denied", "{part}"),
        PermissionError(errno.EACCES, "Permission denied", "{folder}"),
    ],
)
def test_what_keeps_a_file_from_being_written_is_named(tmp_path: Path, error: OSError) -> None:
    path = tmp_path / "x"
    path.write_text("before")
    if error.filename:
        error.filename = error.filename.format(part=f"{path}.part", folder=tmp_path)
    with pytest.raises(OutputError, match=r"x: cannot be written: .*What was there before is untouched"), writing(path):
        raise error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "checkpoint/config.json"),
        PermissionError(errno.EACCES, "Permission denied", 5),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError("model.safetensors does not load"),
    ],
)
def test_error_of_something_else_is_not_said_of_the_file_that_is_written(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(OSError, match=error.strerror or str(error)) as caught, writing(tmp_path / "x"):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []
