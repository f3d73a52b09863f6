"""usearch: an HNSW graph that is mapped into memory. `usearch.index.Index.restore` reads the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.index.exact import until_enough
from f2gguf.runtime.index.store import Errors, Keys, Rows, Store

FILE = "index.usearch"
_EF_CONSTRUCTION, _EF_SEARCH = 128, 128


class Usearch:
    type = "HNSW"
    removes = True

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, store: Store, keys: Keys) -> Usearch:
        from usearch.index import Index

        options = {"expansion_add": _EF_CONSTRUCTION, "expansion_search": _EF_SEARCH}
        return cls(Index(ndim=store.facts["width"], metric="ip", dtype="f32", **options))

    @classmethod
    def load(cls, path: Path, *, to_add: bool = False) -> Usearch:
        from usearch.index import Index

        index = Index.restore(str(path), view=not to_add)
        if index is None:
            raise OSError("it is no index of usearch")
        index.expansion_search = _EF_SEARCH
        return cls(index)

    @staticmethod
    def errors() -> Errors:
        return RuntimeError, ValueError

    @staticmethod
    def type_for(n_vectors: int) -> str:
        return "HNSW"

    def __len__(self) -> int:
        return len(self._index)

    def add(self, store: Store, keys: Keys) -> None:
        self._index.add(keys.astype(np.uint64), np.ascontiguousarray(store.vectors()[keys]))

    def remove(self, keys: Keys) -> None:
        if len(keys):
            self._index.remove(keys.astype(np.uint64))

    def search(self, queries: Rows, top: int, without: Keys) -> tuple[Rows, Keys]:
        def ask(n_asked: int) -> tuple[Rows, Keys]:
            found = self._index.search(queries, n_asked)
            keys = np.atleast_2d(found.keys).astype(np.int64)
            n_found = np.atleast_1d(getattr(found, "counts", len(found)))
            is_there = np.arange(keys.shape[1]) < n_found[:, None]
            return 1 - np.atleast_2d(found.distances).astype(np.float32), np.where(is_there, keys, -1)

        return until_enough(ask, top, len(self), without)

    def save(self, path: Path) -> None:
        self._index.save(str(path))
