"""An index's documents (SQLite) and vectors (a memory-mapped file): what all kinds of index are made from.

Every document has a key, the number of its row among the vectors. Keys are given once: a changed document gets a new
one, and the old one is noted as removed. A vector is on the disk before the document that has its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.errors import InputError, OutputError, parsing
from f2gguf.runtime.tables.texts import Id, Row
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Rows = NDArray[np.float32]
Vector = NDArray[Any]
Errors = tuple[type[Exception], ...]  # that a library raises

DOCUMENTS = "documents.sqlite"
VECTORS = "vectors-*.f32"  # its generation; the only one, but for a stop while it was compacted
FORMAT = 1
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE documents (key INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, sha256 BLOB NOT NULL, text TEXT NOT NULL);
CREATE TABLE removed (key INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class Document:
    """`name` is what tells it from others: its id, or without one its text."""

    name: str
    sha256: bytes  # of the text
    text: str

    @classmethod
    def of(cls, row: Row) -> Document:
        digest = hashlib.sha256(row.text.encode()).digest()
        return cls(f"text:{digest.hex()}" if row.id is None else f"id:{json.dumps(row.id)}", digest, row.text)


def id_of(name: str) -> Id | None:
    """The id in a document's name; None for one without."""
    kind, _, value = name.partition(":")
    return json.loads(value) if kind == "id" else None


class Store:
    """The documents and vectors in `folder`. Raises `InputError` where there is no index, unless it is made."""

    def __init__(self, folder: Path, *, facts: dict[str, Any] | None = None) -> None:
        self.folder = folder
        path = folder / DOCUMENTS
        if facts is None and not path.exists():
            raise InputError(f"{folder}: is no index of f2gguf (--index). Make one: f2gguf index DOCS -o {folder}")
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("PRAGMA synchronous = FULL")
            has_tables = self.db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'facts'").fetchone()[0]
            if not has_tables and facts is not None:
                with self.transaction():
                    for statement in _TABLES.strip().split(";\n"):
                        self.db.execute(statement)
                    start = {"format": FORMAT, "n_keys": 0, "generation": 0, "n_covered": 0, "n_held": 0}
                    self.state(**start, **(facts or {}))
            with parsing(path, InputError, "Make the index again."):
                self.facts: dict[str, Any] = self._facts()
                if self.facts["format"] != FORMAT:
                    raise ValueError(f"format {self.facts['format']}")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: cannot be read: {error}. Make the index again.") from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block is written, or nothing. Raises `OutputError` where the disk is full."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise OutputError(f"{self.folder}: cannot be written: {error}. What was there before stays.") from error
            raise

    def state(self, **facts: Any) -> None:
        """Note facts about the index."""
        rows = [(name, json.dumps(value)) for name, value in facts.items()]
        self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)
        self.facts = self._facts()

    def _facts(self) -> dict[str, Any]:
        return {name: json.loads(value) for name, value in self.db.execute("SELECT name, value FROM facts")}

    @property
    def n_keys(self) -> int:
        return int(self.facts["n_keys"])

    @property
    def n_documents(self) -> int:
        return int(self.db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def removed(self) -> Keys:
        """Keys that no document has any more."""
        return np.array([key for (key,) in self.db.execute("SELECT key FROM removed ORDER BY key")], dtype=np.int64)

    def vectors(self) -> Rows:
        """The vectors of all keys, removed ones too, mapped into memory, (n_keys, width)."""
        width = self.facts["width"]
        if not self.n_keys:
            return np.zeros((0, width), dtype=np.float32)
        path = self._vectors_path()
        if not path.exists() or path.stat().st_size < self.n_keys * width * 4:
            raise InputError(f"{path}: is cut short or missing. Make the index again.")
        return np.memmap(path, dtype="<f4", mode="r", shape=(self.n_keys, width))

    def documents_of(self, keys: Sequence[int]) -> dict[int, tuple[Id | None, str]]:
        """Id and text by key."""
        wanted = json.dumps([int(it) for it in keys])  # one value, since SQLite takes a limited number of them
        rows = self.db.execute(
            "SELECT key, name, text FROM documents WHERE key IN (SELECT value FROM json_each(?))", (wanted,)
        )
        return {key: (id_of(name), text) for key, name, text in rows}

    def put(self, documents: Sequence[Document], vectors: Rows) -> None:
        """Add documents, or replace those of the same names."""
        first = self.n_keys
        self._write_vectors(first, vectors)
        with self.transaction():
            self.remove([document.name for document in documents])
            rows = [(first + i, it.name, it.sha256, it.text) for i, it in enumerate(documents)]
            self.db.executemany("INSERT INTO documents VALUES (?, ?, ?, ?)", rows)
            self.state(n_keys=first + len(documents))

    def remove(self, names: Sequence[str]) -> None:
        """Remove documents, inside a transaction."""
        named = [(name,) for name in names]
        self.db.executemany("INSERT INTO removed SELECT key FROM documents WHERE name = ?", named)
        self.db.executemany("DELETE FROM documents WHERE name = ?", named)

    def drop_cover(self) -> None:
        """Note that no index over the vectors can be relied on."""
        with self.transaction():
            self.state(n_covered=0, n_held=0)

    def compact(self) -> None:
        """Give the documents new keys without gaps, once a quarter of the keys is removed."""
        keys = [key for (key,) in self.db.execute("SELECT key FROM documents ORDER BY key")]
        if (self.n_keys - len(keys)) * 4 <= self.n_keys:
            return
        old, vectors, old_path = self.facts["generation"], self.vectors(), self._vectors_path()
        for start in range(0, len(keys), 4096):
            self._write_vectors(start, vectors[keys[start : start + 4096]], generation=old + 1)
        with self.transaction():
            self.db.executemany("UPDATE documents SET key = ? WHERE key = ?", list(enumerate(keys)))  # never upwards
            self.db.execute("DELETE FROM removed")
            self.state(n_keys=len(keys), generation=old + 1, n_covered=0)
        old_path.unlink(missing_ok=True)

    def _vectors_path(self, generation: int | None = None) -> Path:
        return self.folder / VECTORS.replace("*", str(self.facts["generation"] if generation is None else generation))

    def _write_vectors(self, first: int, vectors: Rows, *, generation: int | None = None) -> None:
        path = self._vectors_path(generation)
        data = np.ascontiguousarray(vectors, dtype="<f4")
        try:
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.seek(first * data.shape[1] * 4)
                file.write(data.data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}. What was there before stays.") from error

    def close(self) -> None:
        self.db.close()
