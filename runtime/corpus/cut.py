"""A corpus is cut into shards by its rows alone, so that every run of it, on any machine, makes the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from f2gguf.runtime.corpus.inputs import InputFile
from f2gguf.runtime.errors import InputError
from f2gguf.runtime.tables.texts import Id, Row, iter_rows

CHARACTERS_A_ROW = 256  # on average, that fill a shard before its number of rows does
_MOST_INT64 = 2**63


class Position(NamedTuple):
    """Where a shard begins or ends: before a row of a file. `n_rows` were before it in all files, bad ones included."""

    file: int = 0
    row: int = 0
    n_rows: int = 0


@dataclass
class Shard:
    """Consecutive rows: those that can be embedded, and why the others cannot."""

    number: int
    begin: Position
    end: Position
    n_bytes_before: int = 0  # of all input files, as they were read, before it
    n_bytes: int = 0  # up to its end
    ids: list[Id | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # ("x.csv, line 3")
    rejects: list[dict[str, Any]] = field(default_factory=list)  # in the order of rows: where, reason
    broken: list[str] = field(default_factory=list)  # files whose rest could not be read

    def reject(self, where: str, reason: str) -> None:
        self.rejects.append({"where": where, "reason": reason.removeprefix(where).lstrip(": ")})


class _Place(NamedTuple):
    """A row, and what is before and behind it."""

    where: str
    row: Row | InputError
    end: Position
    n_bytes: int
    is_rest: bool = False  # the rest of the file cannot be read


def cut(
    inputs: Sequence[InputFile],
    *,
    column: str | None,
    ids: str,
    shard_rows: int,
    done: Mapping[int, Position],
) -> Iterator[Shard]:
    """The shards of a corpus without those in `done`, which says where they end and are not read again.

    `ids` is what `glance` gave: a row whose id is none of these is rejected. A shard ends behind `shard_rows` rows, or
    `CHARACTERS_A_ROW` times as many characters. Raises `InputError` where a disk fails; a file that is damaged is cut
    short, and `broken` of its shard names it.
    """
    number, begin, n_bytes = 0, Position(), 0
    places = _places(inputs, column, begin)
    while True:
        while number in done:
            begin, number = done[number], number + 1
            if number not in done:
                places = _places(inputs, column, begin)
                n_bytes = -1  # known with the first row
        shard = Shard(number, begin, begin, n_bytes)
        n_characters = 0
        for place in places:
            row, end = place.row, place.end
            shard.end, shard.n_bytes = end, place.n_bytes
            if shard.n_bytes_before < 0:
                shard.n_bytes_before = place.n_bytes
            if isinstance(row, Row):
                row_id = end.n_rows - 1 if ids == "position" and row.id is None else row.id
                row = _flaw(row.id, ids, place.where) or row._replace(id=row_id)
            if isinstance(row, InputError):
                shard.reject(place.where, str(row))
                shard.broken += [inputs[end.file - 1].name] * place.is_rest
            else:
                shard.ids.append(str(row.id) if ids == "string" and row.id is not None else row.id)
                shard.texts.append(row.text)
                shard.places.append(place.where)
                n_characters += len(row.text)
            if end.n_rows - begin.n_rows >= shard_rows or n_characters >= shard_rows * CHARACTERS_A_ROW:
                break
        if shard.end == begin:
            return
        yield shard
        number, begin, n_bytes = number + 1, shard.end, shard.n_bytes


def _flaw(row_id: Id | None, ids: str, where: str) -> InputError | None:
    """What is wrong with a row's id, where the first rows of the corpus have ids of one kind."""
    if row_id is None or ids == "string":
        return None
    if ids == "position":
        return InputError(f"{where}: has an id ({row_id!r}), and the first rows of the corpus have none.")
    if not isinstance(row_id, int) or not -_MOST_INT64 <= row_id < _MOST_INT64:
        return InputError(f"{where}: its id is {row_id!r}, and the first rows have integers of 64 bits.")
    return None


def _places(inputs: Sequence[InputFile], column: str | None, begin: Position) -> Iterator[_Place]:
    """Every row from `begin` on."""
    n_before = sum(file.size_bytes for file in inputs[: begin.file])
    n_rows = begin.n_rows
    for number, file in enumerate(inputs[begin.file :], start=begin.file):
        raw: list[BinaryIO] = []
        row_number = begin.row if number == begin.file else 0
        try:
            for where, row in islice(iter_rows(file.name, column=column, watch=raw.append), row_number, None):
                row_number, n_rows = row_number + 1, n_rows + 1
                yield _Place(where, row, Position(number, row_number, n_rows), n_before + raw[0].tell())
        except InputError as error:
            if isinstance(cause := error.__cause__, OSError) and cause.errno:
                raise  # the disk or the network, which may give the file another time
            n_rows += 1
            end = Position(number + 1, 0, n_rows)
            yield _Place(file.name, error, end, n_before + file.size_bytes, is_rest=True)
        n_before += file.size_bytes
