"""What --input names: files, globs and folders become one list of files, and a glance at the first rows of each."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from f2gguf.runtime.console import say
from f2gguf.runtime.errors import InputError, WrongUsage
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.tables.texts import READERS, Row, format_of, iter_rows

_N_GLANCED = 20  # rows of each file


@dataclass(frozen=True)
class InputFile:
    name: str  # as --input leads to it
    size_bytes: int
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        return vars(self)


def is_plain_file(name: str) -> bool:
    """Whether `name` is one file, or stdin, and no glob and no folder."""
    return name == "-" or not (Path(name).is_dir() or (_is_glob(name) and not Path(name).exists()))


def find_inputs(names: Iterable[str], *, apart_from: Path | None = None) -> list[str]:
    """The files that paths, globs ('docs/**/*.jsonl') and folders name, each once, a folder's in the order of names.

    A folder counts with its subfolders, but without hidden files, linked folders, files of other formats, and those in
    `apart_from`.
    Raises `InputError` where a name leads to no file, and `WrongUsage` for stdin, which cannot be read twice.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "-":
            raise WrongUsage("--input -: stdin cannot be read again after a stop. Write the texts to a file first.")
        paths = [Path(name)]
        if not is_plain_file(name):
            paths = [path for path in _below(name) if not is_inside(path, apart_from)]
        if not paths:
            raise InputError(f"{name}: there is no file that can be read, of {', '.join(READERS)} (--input).")
        found |= dict.fromkeys(map(str, paths))
    return list(found)


def _below(name: str) -> Iterator[Path]:
    """Readable files of a folder, or what a glob finds and the readable files of the folders that it finds."""
    path = Path(name)
    if not path.is_dir():
        for match in sorted(glob.iglob(name, recursive=True)):  # noqa: PTH207
            yield from _below(match) if Path(match).is_dir() else [Path(match)]
        return
    entries = sorted(_visible(path))
    if n_linked := sum(entry.is_dir() for entry in entries):
        words = "1 linked folder is" if n_linked == 1 else f"{n_linked} linked folders are"
        say(f"{name}: {words} left out. Name what is wanted with --input, too.")
    visible = [file for file in entries if file.is_file()]
    readable = [file for file in visible if format_of(file)[0] in READERS]
    if n_others := len(visible) - len(readable):
        say(f"{name}: {n_others} files of other formats are left out")
    yield from readable


def _visible(folder: Path) -> Iterator[Path]:
    """What a folder and its subfolders hold, without hidden ones. Raises `InputError` for one that cannot be read."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}. Allow it, or leave this folder out.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _visible(entry)
        else:
            yield entry


def _is_glob(name: str) -> bool:
    return glob.has_magic(name)


def is_inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and folder.resolve() in path.resolve().parents


def stat_inputs(names: Sequence[str]) -> tuple[InputFile, ...]:
    """Size and hash of every file; the hashes are remembered until a file changes."""
    try:
        return tuple(InputFile(name, Path(name).stat().st_size, sha256_file(Path(name))) for name in names)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}.") from error


def glance(names: Sequence[str], column: str | None) -> str:
    """What the ids of a corpus are by the first rows of each file: 'position', 'int64' or 'string'.

    Raises, before the work, `InputError` for a file that cannot be read, or of whose first rows none can be embedded,
    `UnknownName` for a column that is not there, and `WrongUsage` where there is no row at all.
    """
    ids: list[object] = []
    n_rows = 0
    for name in names:
        rows = [row for _, row in islice(iter_rows(name, column=column), _N_GLANCED)]
        flaws = [row for row in rows if isinstance(row, InputError)]
        if flaws and len(flaws) == len(rows):
            raise InputError(f"{flaws[0]} None of the first {len(rows)} rows of this file can be embedded.")
        ids += [row.id for row in rows if isinstance(row, Row) and row.id is not None]
        n_rows += len(rows)
    if not n_rows:
        raise WrongUsage(f"{', '.join(names[:3])}: no text is in there (--input).")
    if not ids:
        return "position"
    return "int64" if all(isinstance(it, int) for it in ids) else "string"
