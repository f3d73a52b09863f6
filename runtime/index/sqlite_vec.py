"""sqlite-vec: a database with the tables `vectors` (vec0) and `documents` (key, id, text). It searches exactly."""

from __future__ import annotations

import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.errors import ExtraMissing
from f2gguf.runtime.index.exact import MOST_NEAREST, until_enough
from f2gguf.runtime.index.store import Errors, Keys, Rows, Store, id_of
from f2gguf.runtime.tables.texts import Id

FILE = "index.db"
_NEAREST = "SELECT rowid, distance FROM vectors WHERE embedding MATCH ? AND k = ? ORDER BY distance"


class SqliteVec:
    type = "exact"
    removes = True

    def __init__(self, path: Path) -> None:
        self._db = _connect(path)

    @classmethod
    def build(cls, store: Store, keys: Keys) -> SqliteVec:
        path = store.folder / FILE
        path.unlink(missing_ok=True)
        made = cls(path)
        width = store.facts["width"]
        made._db.execute(f"CREATE VIRTUAL TABLE vectors USING vec0(embedding float[{width}] distance_metric=cosine)")
        made._db.execute("CREATE TABLE documents (key INTEGER PRIMARY KEY, id, text TEXT NOT NULL)")
        return made

    @classmethod
    def load(cls, path: Path, *, to_add: bool = False) -> SqliteVec:
        return cls(path)

    @staticmethod
    def errors() -> Errors:
        return (_library().Error,)

    @staticmethod
    def type_for(n_vectors: int) -> str:
        return "exact"

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM vectors").fetchone()[0])

    def add(self, store: Store, keys: Keys) -> None:
        vectors = np.ascontiguousarray(store.vectors()[keys])
        for key, vector in zip(keys.tolist(), vectors, strict=True):
            self._db.execute("INSERT INTO vectors (rowid, embedding) VALUES (?, ?)", (key, vector.tobytes()))
        rows = store.db.execute(
            "SELECT key, name, text FROM documents WHERE key BETWEEN ? AND ?", (int(keys[0]), int(keys[-1]))
        )
        documents = [(key, _id(name), text) for key, name, text in rows]
        self._db.executemany("INSERT OR REPLACE INTO documents VALUES (?, ?, ?)", documents)

    def remove(self, keys: Keys) -> None:
        for table, name in (("vectors", "rowid"), ("documents", "key")):
            self._db.executemany(f"DELETE FROM {table} WHERE {name} = ?", [(key,) for key in keys.tolist()])

    def search(self, queries: Rows, top: int, without: Keys) -> tuple[Rows, Keys]:
        def ask(n_asked: int) -> tuple[Rows, Keys]:
            scores = np.full((len(queries), n_asked), -np.inf, dtype=np.float32)
            keys = np.full((len(queries), n_asked), -1, dtype=np.int64)
            for i, query in enumerate(np.ascontiguousarray(queries)):
                rows = self._db.execute(_NEAREST, (query.tobytes(), n_asked)).fetchall()
                keys[i, : len(rows)] = [row[0] for row in rows]
                scores[i, : len(rows)] = [1 - row[1] for row in rows]
            return scores, keys

        return until_enough(ask, top, min(len(self), MOST_NEAREST), without)

    def save(self, path: Path) -> None:
        self._db.commit()


def _id(name: str) -> Id | None:
    """An integer that SQLite cannot hold is a text."""
    row_id = id_of(name)
    return row_id if not isinstance(row_id, int) or -(2**63) <= row_id < 2**63 else str(row_id)


def _library() -> Any:
    """The package pysqlite3 where Python's own sqlite3 takes no extensions, which sqlite-vec is."""
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        return sqlite3
    if not find_spec("pysqlite3"):
        raise ExtraMissing(
            "this Python's sqlite3 loads no extensions, and sqlite-vec is one. Run: pip install pysqlite3-binary"
        )
    import pysqlite3

    return pysqlite3


def _connect(path: Path) -> Any:
    """A connection with sqlite-vec in it."""
    import sqlite_vec

    connection = _library().connect(path)
    connection.enable_load_extension(True)
    sqlite_vec.load(connection)
    connection.enable_load_extension(False)
    return connection
