"""Texts in, vectors out: .txt, .jsonl and .csv files, and .npy, .jsonl and .safetensors files."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from f2gguf.runtime.errors import InputError, UnknownName
from f2gguf.runtime.files import require_absent, write_text, writing

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embeddings

Id = str | int
Row = tuple[Id | None, str, object]  # id, text, kind


@dataclass(frozen=True)
class Texts:
    """Texts in input order. A text's id is the one in the file, or its position from 0."""

    ids: tuple[Id, ...]
    texts: tuple[str, ...]
    kinds: tuple[str, ...]  # what a .jsonl or .csv states under "kind", or ""
    has_ids: bool = False  # whether the file has any

    def without(self, indices: Iterable[int]) -> Texts:
        """All texts except those at `indices`."""
        kept = sorted(set(range(len(self.texts))).difference(indices))
        ids, texts = tuple(self.ids[i] for i in kept), tuple(self.texts[i] for i in kept)
        return Texts(ids, texts, tuple(self.kinds[i] for i in kept), self.has_ids)


def read_texts(source: str, *, column: str = "text") -> Texts:
    """Read a .txt (a text a line), .jsonl (objects, or strings) or .csv (header row) file; '-' is stdin, as lines.

    `column` names the key or column of the text. "id" and "kind" are read too, if the file has them. Raises
    `InputError` with file and line for what does not parse.
    """
    path, readers = Path(source), {".txt": _read_lines, ".jsonl": _read_jsonl, ".csv": _read_csv}
    read = _read_lines if source == "-" else readers.get(path.suffix.lower())
    if read is None:
        raise UnknownName("input format", path.suffix or path.name, readers, " The file's ending decides (--input).")
    try:
        data = sys.stdin.buffer.read() if source == "-" else path.read_bytes()
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, name = data.count(b"\n", 0, error.start) + 1, "stdin" if source == "-" else source
        raise InputError(f"{name}, line {line}: is not UTF-8 ({error.reason}). Convert it to UTF-8 first.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    rows = list(read(path, content, column))
    has_ids = any(row_id is not None for row_id, _, _ in rows)
    ids = tuple(i if row_id is None else row_id for i, (row_id, _, _) in enumerate(rows))
    kinds = tuple(kind if isinstance(kind, str) else "" for _, _, kind in rows)
    return Texts(ids, tuple(text for _, text, _ in rows), kinds, has_ids)


def require_output(path: Path, *, force: bool) -> None:
    """Refuse an output of unknown format, or one that exists. Call it before the work."""
    if path.suffix not in WRITERS:
        raise UnknownName("output format", path.suffix or path.name, WRITERS, " The file's ending decides (-o).")
    require_absent(path, force=force)
    if path.suffix == ".npy":
        require_absent(_ids_path(path), force=force)


def json_rows(texts: Texts, embeddings: Embeddings) -> Iterator[str]:
    """One JSON object a text: id, number of tokens, whether it was cut, vector (with digits enough for a float32)."""
    columns = (texts.ids, embeddings.n_tokens.tolist(), embeddings.truncated.tolist(), embeddings.vectors)
    for row_id, n_tokens, truncated, vector in zip(*columns, strict=True):
        row = {"id": row_id, "n_tokens": n_tokens, "truncated": truncated}
        yield json.dumps({**row, "embedding": [float(f"{x:.9g}") for x in vector]}, ensure_ascii=False)


def _write_npy(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    with writing(path) as part:
        with part.open("wb") as file:
            np.save(file, embeddings.vectors)
        if texts.has_ids:
            rows = (json.dumps(row_id, ensure_ascii=False) + "\n" for row_id in texts.ids)
            write_text(_ids_path(path), "".join(rows))
    return [path, _ids_path(path)] if texts.has_ids else [path]


def _write_jsonl(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    with writing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(row + "\n" for row in json_rows(texts, embeddings))
    return [path]


def _write_safetensors(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    from safetensors.numpy import save

    with writing(path) as part:
        columns = {"n_tokens": embeddings.n_tokens, "truncated": embeddings.truncated}
        ids = json.dumps(texts.ids, ensure_ascii=False)
        part.write_bytes(save({"embeddings": embeddings.vectors, **columns}, metadata={"ids": ids}))
    return [path]


def _ids_path(path: Path) -> Path:
    return path.with_suffix(".ids.jsonl")


# By the file's ending: each writes vectors (n_texts, n_dims), and gives the paths of the written files. A .npy file
# holds the vectors only: ids of the input file go to NAME.ids.jsonl beside it.
WRITERS: dict[str, Callable[[Path, Texts, Embeddings], list[Path]]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".safetensors": _write_safetensors,
}


def _read_lines(_path: Path, content: str, _column: str) -> Iterator[Row]:
    # only real line ends: str.splitlines would split at U+2028 and form feeds, which are part of a text
    for line in io.StringIO(content, newline=None):
        yield None, line.rstrip("\n"), None


def _read_jsonl(path: Path, content: str, column: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: does not parse as JSON: {error}.") from error
        row = {column: row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            it_has = f"keys {', '.join(row) or 'none'}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise InputError(f"{where}: has no text under {column!r} ({it_has}). Name the key with --column.")
        yield _valid_id(where, row.get("id")), _valid_text(where, row[column]), row.get("kind")


def _read_csv(path: Path, content: str, column: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        names: Sequence[str] = rows.fieldnames or []
        if column not in names:
            raise UnknownName(f"column of {path}", column, names, " Name one with --column.")
        for row in rows:
            if row[column] is None or None in row:
                raise InputError(f"{path}, line {rows.line_num}: has another number of fields than the header row.")
            yield row.get("id"), row[column], row.get("kind")
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.reader.line_num}: does not parse as CSV: {error}.") from error


def _valid_text(where: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"character {error.start + 1} is a lone surrogate ({text[error.start]!r})"
        raise InputError(f"{where}: {bad}, which no text can hold.") from error
    return text


def _valid_id(where: str, row_id: object) -> Id | None:
    if row_id is None or isinstance(row_id, int):
        return row_id
    if not isinstance(row_id, str):
        raise InputError(f"{where}: its id is a {type(row_id).__name__}; a string or an integer can be kept.")
    return _valid_text(where, row_id)
