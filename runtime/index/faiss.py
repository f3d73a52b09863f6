"""FAISS: flat, HNSW or IVF by the number of vectors. `faiss.read_index` reads the file; its ids are the keys."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.index.store import Errors, Keys, Rows, Store

FILE = "index.faiss"
MOST_FLAT = 20_000  # vectors, up to which exact search takes a few milliseconds
MOST_HNSW = 200_000  # up to which its graph is built in minutes
_N_LINKS, _EF_CONSTRUCTION, _EF_SEARCH = 32, 80, 128
_TRAINED_A_LIST, _PROBED_SHARE = 64, 24  # vectors to train with for each list; one list of so many is searched


class Faiss:
    removes = False  # HNSW cannot

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, store: Store, keys: Keys) -> Faiss:
        """An empty index of the type that suits so many vectors, trained where it must be."""
        faiss = _faiss()
        width, metric = store.facts["width"], faiss.METRIC_INNER_PRODUCT
        type_ = cls.type_for(len(keys))
        if type_ == "flat":
            return cls(faiss.IndexIDMap2(faiss.IndexFlat(width, metric)))
        if type_ == "HNSW":
            graph = faiss.IndexHNSWFlat(width, _N_LINKS, metric)
            graph.hnsw.efConstruction = _EF_CONSTRUCTION
            return cls(faiss.IndexIDMap2(graph))
        n_lists = int(2 * np.sqrt(len(keys)))
        lists = faiss.IndexIVFFlat(faiss.IndexFlat(width, metric), width, n_lists, metric)
        chosen = np.random.default_rng(0).choice(len(keys), min(len(keys), n_lists * _TRAINED_A_LIST), replace=False)
        lists.train(np.ascontiguousarray(store.vectors()[keys[np.sort(chosen)]]))
        return cls(lists)

    @classmethod
    def load(cls, path: Path, *, to_add: bool = False) -> Faiss:
        """The lists of IVF are mapped into memory, unless it is `to_add`."""
        faiss = _faiss()
        return cls(faiss.read_index(str(path), 0 if to_add else faiss.IO_FLAG_MMAP))

    @staticmethod
    def errors() -> Errors:
        return (RuntimeError,)

    @staticmethod
    def type_for(n_vectors: int) -> str:
        return "flat" if n_vectors <= MOST_FLAT else "HNSW" if n_vectors <= MOST_HNSW else "IVF"

    @property
    def type(self) -> str:
        inner = getattr(self._index, "index", self._index)
        name = type(_faiss().downcast_index(inner)).__name__
        return {"IndexHNSWFlat": "HNSW", "IndexIVFFlat": "IVF"}.get(name, "flat")

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, store: Store, keys: Keys) -> None:
        self._index.add_with_ids(np.ascontiguousarray(store.vectors()[keys]), keys)

    def remove(self, keys: Keys) -> None:
        """Searches leave them out."""

    def search(self, queries: Rows, top: int, without: Keys) -> tuple[Rows, Keys]:
        faiss = _faiss()
        chosen = faiss.IDSelectorNot(faiss.IDSelectorBatch(without)) if len(without) else None
        options: dict[str, Any] = {
            "flat": faiss.SearchParameters,
            "HNSW": lambda sel: faiss.SearchParametersHNSW(sel=sel, efSearch=max(_EF_SEARCH, 2 * top)),
            "IVF": lambda sel: faiss.SearchParametersIVF(sel=sel, nprobe=max(8, self._index.nlist // _PROBED_SHARE)),
        }
        scores, keys = self._index.search(queries, top, params=options[self.type](sel=chosen))
        return np.where(keys < 0, -np.inf, scores), keys

    def save(self, path: Path) -> None:
        faiss = _faiss()
        faiss.write_index(self._index, str(path))


def _faiss() -> Any:
    return import_module("faiss")  # its type hints lack what is used here
