"""Texts in: .txt, .jsonl, .json, .csv, .tsv (packed as .gz, .bz2, .xz or .zst too), .parquet files, lines on stdin."""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from lzma import LZMAError
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from f2gguf.runtime.calls import described
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import ExtraMissing, InputError, UnknownName
from f2gguf.runtime.tables.decode import PACKED, Packing, decoded

Id = str | int
Fields = Mapping[str, object]
# Where a row stands ("x.csv, line 3"), and what it holds, or why that cannot be read. The next row can be all the same.
Found = tuple[str, "Fields | InputError"]

USED = ("id", "_id", "title", "kind", "language")  # what is read of a row besides its text
_BATCH_ROWS = 1024  # of a .parquet file at a time


class Row(NamedTuple):
    text: str
    id: Id | None = None
    kind: str = ""
    language: str = ""
    has_title: bool = False  # in front of the text


@dataclass(frozen=True)
class Texts:
    """Texts in input order. A text's id is the one in the file, or in a file without ids its position from 0."""

    ids: tuple[Id | None, ...]  # None where other rows of the file have one
    texts: tuple[str, ...]
    kinds: tuple[str, ...]  # what a row states under "kind", or ""
    languages: tuple[str, ...]  # what it states under "language", or ""
    has_ids: bool = False  # whether the file has any

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Texts:
        has_ids = any(row.id is not None for row in rows)
        return cls(
            tuple(row.id if has_ids else i for i, row in enumerate(rows)),
            tuple(row.text for row in rows),
            tuple(row.kind for row in rows),
            tuple(row.language for row in rows),
            has_ids,
        )

    def without(self, indices: Iterable[int]) -> Texts:
        """All texts except those at `indices`, with ids from now on: their numbers, where the file has none."""
        kept = sorted(set(range(len(self.texts))).difference(indices))
        return Texts(
            tuple(self.ids[i] for i in kept),
            tuple(self.texts[i] for i in kept),
            tuple(self.kinds[i] for i in kept),
            tuple(self.languages[i] for i in kept),
            has_ids=True,
        )


def read_texts(source: str, *, column: str | None = None) -> Texts:
    """The texts of a file, whose ending decides how it is read, or the lines of stdin for '-'.

    `column` names the key or column of the text. Without it, that is "text", behind the row's "title" where it has one,
    as in BEIR's and mteb's corpora. Rows may have an id ("id", or "_id" as in BEIR), a "kind" and a "language". Says on
    stderr what of that was done. Raises `InputError` with file and line for what does not parse.
    """
    rows = list(iter_texts(source, column=column))
    _tell("stdin" if source == "-" else source, rows)
    return Texts.of(rows)


def iter_texts(source: str, *, column: str | None = None) -> Iterator[Row]:
    """What `read_texts` reads, row by row: only a .json file is in memory as a whole. Says nothing."""
    for _, row in iter_rows(source, column=column):
        if isinstance(row, InputError):
            raise row
        yield row


def iter_rows(
    source: str, *, column: str | None = None, watch: Callable[[BinaryIO], None] | None = None
) -> Iterator[tuple[str, Row | InputError]]:
    """Where every row stands ("x.csv, line 3"), and the row, or what is wrong with it. The rows behind it follow.

    `watch` is shown the file, packed as it may be, so that it can tell how much was read. Raises `InputError` where the
    rest of a file cannot be read.
    """
    path, name = Path(source), "stdin" if source == "-" else source
    ending, packing = (".txt", None) if source == "-" else format_of(path)
    if not ending and not path.exists():
        raise InputError(f"{path}: there is no such file or folder (--input).")
    if ending not in READERS or (packing and ending == ".parquet"):
        raise UnknownName("input format", path.suffix or path.name, READERS, " The file's ending decides (--input).")
    try:
        with io.BytesIO(sys.stdin.buffer.read()) if source == "-" else path.open("rb") as file:
            if watch:
                watch(file)
            opened = packing.opened(file) if packing and packing.opened else file
            for where, fields in READERS[ending](name, opened, column or "text"):
                yield where, fields if isinstance(fields, InputError) else _attempt(_row, where, fields, column)
    except (OSError, EOFError, LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read: {reason}.") from error


def format_of(path: Path) -> tuple[str, Packing | None]:
    """The ending that says what a file holds, and how it is packed: x.jsonl.gz -> '.jsonl', PACKED['.gz'].

    Raises `InputError` for a packed file that must be unpacked first, and `ExtraMissing` where a package is missing.
    """
    ending = path.suffix.lower()
    packing = PACKED.get(ending)
    if packing is None:
        return ending, None
    if packing.opened is None:
        raise InputError(f"{path}: is compressed. Unpack it first: {packing.command} {path}")
    if ending == ".zst":
        require_pyarrow(path, "unpacks .zst")
    return Path(path.stem).suffix.lower(), packing


def require_pyarrow(name: object, what: str) -> None:
    """Raise `ExtraMissing` unless there is pyarrow."""
    if not find_spec("pyarrow"):
        raise ExtraMissing(f"{name}: pyarrow is not installed, which {what}. Run: pip install 'f2gguf[parquet]'")


def _attempt(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` gives, or the `InputError` that it raises."""
    try:
        return read(*arguments)
    except InputError as error:
        return error


def _row(where: str, fields: Fields, column: str | None) -> Row:
    text = _string(where, fields, column or "text", " Name the key of the text with --column.")
    has_title = column is None and fields.get("title") not in (None, "")
    if has_title:
        text = f"{_string(where, fields, 'title')} {text}".strip()
    kind, language = fields.get("kind"), fields.get("language")
    return Row(
        text,
        _id(where, fields),
        kind if isinstance(kind, str) else "",
        language if isinstance(language, str) else "",
        has_title,
    )


def _string(where: str, fields: Fields, name: str, hint: str = "") -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        found = f"but {described(value)}" if name in fields else f"only {', '.join(fields) or 'nothing'}"
        raise InputError(f"{where}: has no text under {name!r}, {found}.{hint}")
    return _valid(where, value)


def _id(where: str, fields: Fields) -> Id | None:
    value = fields.get("id")
    if value in (None, ""):
        value = fields.get("_id")
    if value in (None, ""):
        return None
    if isinstance(value, str):
        return _valid(where, value)
    if type(value) is not int:
        raise InputError(f"{where}: its id is {described(value)}; a string or an integer can be kept.")
    return value


def _valid(where: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"character {error.start + 1} is a lone surrogate ({text[error.start]!r})"
        raise InputError(f"{where}: {bad}, which no text can hold.") from error
    return text


def _tell(name: str, rows: Sequence[Row]) -> None:
    """Say what was done with titles, and where ids do not tell all rows apart."""
    if n_titles := sum(row.has_title for row in rows):
        words = "have a title, which is put before the text (with --column text it is not)"
        say(f"{name}: {n_titles} of {len(rows)} rows {words}")
    ids = [str(row.id) for row in rows if row.id is not None]
    if ids and (n_missing := len(rows) - len(ids)):
        say(f"{name}: {n_missing} of {len(rows)} rows have no id; it is null in the output")
    if repeated := [row_id for row_id, n in Counter(ids).items() if n > 1]:
        say(f"{name}: {len(repeated)} ids belong to several rows, {repeated[0]!r} for one")


def _read_lines(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    # only real line ends: str.splitlines would split at U+2028 and form feeds, which are part of a text
    for number, line in enumerate(_lines(name, file, newline=""), start=1):
        yield f"{name}, line {number}", {column: line.rstrip("\r\n")}


def _read_jsonl(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    for number, line in enumerate(_lines(name, file, newline="\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, _attempt(lambda where, line: _fields(where, _parsed(where, line), column), where, line)


def _read_json(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    rows = _parsed(name, "".join(decoded(name, file)), " If each line is an object, call the file .jsonl.")
    if not isinstance(rows, list):
        raise InputError(
            f"{name}: holds {described(rows)}, and no list of strings or objects. Leave this file out, or mend it."
        )
    for number, row in enumerate(rows, start=1):
        where = f"{name}, item {number}"
        yield where, _attempt(_fields, where, row, column)


def _lines(name: str, file: BinaryIO, *, newline: str) -> Iterator[str]:
    """Lines with their ends, which `newline` tells as `open` does: "" is any of them."""
    rest = ""
    for block in decoded(name, file):
        lines = list(io.StringIO(rest + block, newline=newline))
        rest = lines.pop()  # it may go on in the next block, or end in the first half of a line end
        yield from lines
    if rest:
        yield rest


def _parsed(where: str, text: str, hint: str = "") -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: does not parse as JSON: {error}.{hint}") from error


def _fields(where: str, row: object, column: str) -> Fields:
    """An object as it is; a string is its own text."""
    if isinstance(row, str):
        return {column: row}
    if not isinstance(row, dict):
        raise InputError(f"{where}: has no text under {column!r}, but is {described(row)}.")
    return row


def _read_csv(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    return _read_delimited(name, file, column, ",;\t|")


def _read_tsv(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    return _read_delimited(name, file, column, "\t")


def _read_delimited(name: str, file: BinaryIO, column: str, delimiters: str) -> Iterator[Found]:
    """Rows below a header row. The delimiter is the one that splits the header row into most columns."""
    csv.field_size_limit(2**31 - 1)  # the most that it takes everywhere
    headers = {delimiter: _header(name, file, delimiter) for delimiter in delimiters}
    delimiter = max(delimiters, key=lambda it: len(headers[it]))
    names = headers[delimiter]
    if not names:
        return
    _require_column(name, column, names)
    record: list[str] = []  # the lines of the current row
    rows = csv.reader(_noted(_lines(name, file, newline=""), record), delimiter=delimiter, strict=True)
    next(row for row in rows if row)  # the header row
    while True:
        record.clear()
        where = f"{name}, line {rows.line_num + 1}"
        try:
            values = next(rows, None)
        except csv.Error as error:
            quotes = "A field that holds quotes must stand in quotes, and its own be doubled."
            raise InputError(f"{where}: does not parse as CSV: {error}. {quotes}") from error
        if values is None:
            return
        if not values:  # an empty line
            continue
        if len(values) != len(names):
            numbers = f"{len(values)} instead of {len(names)}. A text that holds {delimiter!r} must stand in quotes."
            yield where, InputError(f"{where}: has another number of fields than the header row: {numbers}")
            continue
        if delimiter == "\t" and len(record) > 1 and all(line.count("\t") == len(names) - 1 > 0 for line in record):
            raise InputError(
                f"{where}: a quote makes one row of this line and the {len(record) - 1} below it, and each could be a "
                'row. Double the quotes in texts, and put such texts in quotes ("say ""hello"" twice").'
            )
        yield where, dict(zip(names, values, strict=True))


def _header(name: str, file: BinaryIO, delimiter: str) -> list[str]:
    """The names in the first row that is not empty; [] where there is none, or it does not parse."""
    rows = csv.reader(_lines(name, file, newline=""), delimiter=delimiter, strict=True)
    try:
        return [it.strip() for it in next((row for row in rows if row), [])]
    except csv.Error:
        return []


def _noted(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    for line in lines:
        record.append(line)
        yield line


def _require_column(name: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        shown = [it if len(it) <= 40 else it[:37] + "..." for it in names]
        hint = " Name one with --column. (The first row names the columns.)"
        raise UnknownName(f"column of {name}", column, shown, hint)
    if twice := [it for it in (column, *USED) if names.count(it) > 1]:
        raise InputError(f"{name}: {names.count(twice[0])} columns are called {twice[0]!r}. Rename all but one.")


def _read_parquet(name: str, file: BinaryIO, column: str) -> Iterator[Found]:
    require_pyarrow(name, "reads Parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            names = table.schema_arrow.names
            _require_column(name, column, names)
            used = [it for it in names if it in (column, *USED)]
            batches = table.iter_batches(batch_size=_BATCH_ROWS, columns=used)
            number = 0
            for batch in batches:
                for found in _rows_of(batch):
                    number += 1
                    where = f"{name}, row {number}"
                    yield where, InputError(f"{where}: {found}") if isinstance(found, str) else found
    except (ArrowException, OSError) as error:
        raise InputError(f"{name}: cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}.") from error


def _rows_of(batch: Any) -> Iterator[Fields | str]:
    """The rows of a batch; of one that Python cannot hold (other bytes than UTF-8, a date after 9999), the reason."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield f"has a value that cannot be read: {error}. Take the row out, or mend it."


# By the file's ending: each takes the file's name, the file and the name of the text's column.
READERS: dict[str, Callable[[str, BinaryIO, str], Iterator[Found]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
