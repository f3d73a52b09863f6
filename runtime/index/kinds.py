"""The kinds of index, by how their names end, and how one is brought up to date with its documents.

An index of these kinds covers the keys below `n_covered`. Those above are searched exactly, and so are all where its
file is missing, damaged, or not of so many vectors, as after a stop.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import ExtraMissing, OutputError, UnknownName
from f2gguf.runtime.files import writing
from f2gguf.runtime.index.exact import MOST_NEAREST, merged, nearest
from f2gguf.runtime.index.store import Errors, Keys, Rows, Store

RECALL_AT = 10
_N_PROBED = 200  # documents that the recall is measured with
_N_TIMED = 10  # exact searches
_ADDED_AT_ONCE = 65_536


class Cover(Protocol):
    """An index over the vectors of a store."""

    removes: bool  # whether `remove` takes vectors out

    @property
    def type(self) -> str:
        """How it searches: 'flat', 'exact', 'HNSW' or 'IVF'."""

    @staticmethod
    def errors() -> Errors:
        """What the library raises for a file that is damaged or cannot be written, besides `OSError`."""

    @staticmethod
    def type_for(n_vectors: int) -> str:
        """The type that suits so many vectors."""

    def __len__(self) -> int: ...
    def add(self, store: Store, keys: Keys) -> None: ...
    def remove(self, keys: Keys) -> None: ...
    def save(self, path: Path) -> None: ...

    def search(self, queries: Rows, top: int, without: Keys) -> tuple[Rows, Keys]:
        """Scores and keys of the nearest, (n_queries, n) each; -inf and -1 where there are fewer."""


@dataclass(frozen=True)
class Kind:
    """A row for each ending: the package, the extra that installs it, the module here, and its class."""

    package: str
    extra: str
    module: str
    cover: str
    is_file: bool = True  # that is written whole, and renamed

    def require(self) -> None:
        """Raise `ExtraMissing` unless its package is installed."""
        if not find_spec(self.package):
            raise ExtraMissing(f"{self.package} is not installed. Run: pip install 'f2gguf[{self.extra}]'")
        self._class.errors()

    @property
    def _module(self) -> Any:
        return import_module(f"f2gguf.runtime.index.{self.module}")

    @property
    def _class(self) -> Any:
        return getattr(self._module, self.cover)

    def path(self, store: Store) -> Path:
        return store.folder / str(self._module.FILE)

    def build(self, store: Store, keys: Keys) -> Cover:
        cover: Cover = self._class.build(store, keys)
        return cover

    @contextlib.contextmanager
    def writing(self, store: Store) -> Iterator[None]:
        """Raise `OutputError` where the library cannot write its file."""
        try:
            yield
        except (OSError, *self._class.errors()) as error:
            raise OutputError(
                f"{self.path(store)}: cannot be written: {_reason(error)}. The documents and their vectors are kept: "
                "make room, or remove what is there, and run the same command again."
            ) from error

    def load(self, store: Store, *, to_add: bool = False) -> Cover | None:
        """The index that is there; None where it does not hold what the store says."""
        self.require()
        path = self.path(store)
        if not store.facts["n_covered"] or not path.exists():
            return None
        try:
            cover: Cover = self._class.load(path, to_add=to_add)
            return cover if len(cover) == store.facts["n_held"] else None
        except (OSError, *self._class.errors()) as error:
            say(f"{path}: cannot be used ({_reason(error)})")
            return None


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


KINDS = {
    ".faiss": Kind("faiss", "faiss", "faiss", "Faiss"),
    ".usearch": Kind("usearch", "usearch", "usearch", "Usearch"),
    ".db": Kind("sqlite_vec", "sqlite-vec", "sqlite_vec", "SqliteVec", is_file=False),
    ".chroma": Kind("chromadb", "chroma", "chroma", "Chroma", is_file=False),
}


def kind_of(folder: Path) -> Kind | None:
    """The kind that the name's ending asks for; None, which is exact search, for a name without one."""
    if folder.suffix in ("", ".index"):
        return None
    if folder.suffix not in KINDS:
        raise UnknownName("kind of index", folder.suffix, ["a name without an ending", *KINDS], " (-o)")
    return KINDS[folder.suffix]


def cover(store: Store, kind: Kind) -> str:
    """Bring an index up to date; it is made anew where it is behind by too much, or damaged. Says what it is now."""
    begin = time.perf_counter()
    removed, n_keys = store.removed(), store.n_keys
    live = np.setdiff1d(np.arange(n_keys), removed, assume_unique=True)
    index = kind.load(store, to_add=True)
    with kind.writing(store):
        if index is not None and index.type == index.type_for(len(live)):
            added = live[live >= store.facts["n_covered"]]
            gone = removed
            if not kind.is_file:
                store.drop_cover()
        else:
            store.drop_cover()
            index, added, gone = kind.build(store, live), live, removed[:0]
        index.remove(gone)
        for start in range(0, len(added), _ADDED_AT_ONCE):
            index.add(store, added[start : start + _ADDED_AT_ONCE])
        _save(index, kind, store)
    with store.transaction():
        store.state(n_covered=n_keys, n_held=len(index))
    return f"{kind.package} {index.type}, {len(live):,} documents, {time.perf_counter() - begin:.1f} s"


def _save(index: Cover, kind: Kind, store: Store) -> None:
    if kind.is_file:
        with writing(kind.path(store)) as part:
            index.save(part)
            store.drop_cover()  # after a stop here, the file may hold as many keys as before, and others
    else:
        index.save(kind.path(store))


def searcher(store: Store, kind: Kind | None) -> Callable[[Rows, int], tuple[Rows, Keys]]:
    """A function that finds the `top` nearest documents of queries: unit vectors (n_queries, width).

    It gives scores and keys, (n_queries, n) each; -inf and -1 where there are fewer documents.
    """
    vectors, removed = store.vectors(), store.removed()
    index = kind.load(store) if kind else None
    if kind and index is None and store.n_keys:
        say(f"{store.folder}: its {kind.package} index is behind: all is searched exactly. Run f2gguf index again")
    n_covered = store.facts["n_covered"] if index else 0

    def search(queries: Rows, top: int) -> tuple[Rows, Keys]:
        is_asked = index is not None and top <= MOST_NEAREST
        parts = [index.search(queries, top, removed)] if index and is_asked else []
        first = n_covered if is_asked else 0
        parts.append(nearest(vectors[first:], queries, top, without=removed, first=first))
        return merged(parts, top, len(queries))

    return search


def measure_search(store: Store, kind: Kind | None) -> str:
    """How quick a search is, and for an index how many of the exact 10 nearest documents of documents it finds."""
    live = np.setdiff1d(np.arange(store.n_keys), store.removed(), assume_unique=True)
    n_probed = min(_N_PROBED if kind else _N_TIMED, len(live))
    probed = np.sort(np.random.default_rng(0).choice(live, n_probed, replace=False))
    queries = np.ascontiguousarray(store.vectors()[probed])
    search, found, times = searcher(store, kind), [], []
    for i in range(n_probed):
        begin = time.perf_counter()
        found.append(search(queries[i : i + 1], RECALL_AT + 1)[1][0])
        times.append(time.perf_counter() - begin)
    ms = f"{1000 * float(np.median(times)):.1f} ms a query"
    if not kind:
        return f"exact search, {len(live):,} documents, {ms}"
    expected = searcher(store, None)(queries, RECALL_AT + 1)[1]
    n_found = n_expected = 0
    for key, nearest_keys, keys in zip(probed, expected, found, strict=True):
        others = set(nearest_keys.tolist()) - {int(key)}
        n_found, n_expected = n_found + len(others & set(keys.tolist())), n_expected + len(others)
    return f"recall@{RECALL_AT} against exact search: {n_found / max(1, n_expected):.1%}, {ms}"
