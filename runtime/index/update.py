"""Documents become an index, or bring one up to date: only new and changed texts are embedded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from f2gguf.runtime.console import progress, say
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import F2ggufError, InputError, OutputError
from f2gguf.runtime.files import locked, require_absent
from f2gguf.runtime.index.documents import Documents, Found, find_documents, vectors_of
from f2gguf.runtime.index.kinds import cover, kind_of, measure_search
from f2gguf.runtime.index.store import DOCUMENTS, VECTORS, Store

_AT_ONCE = 2048  # documents that are embedded and written together: what a stop costs at most


@dataclass(frozen=True)
class Changes:
    """What the documents have that the index has not, by number."""

    n_new: int
    n_changed: int
    n_unchanged: int
    n_missing: int  # in the index, and no longer among the documents


def update_index(
    names: Sequence[str],
    folder: Path,
    model: Embedder,
    *,
    truncate_dim: int | None = None,
    column: str | None = None,
    prune: bool = False,
) -> Changes:
    """Make the index in `folder` of the documents in files, globs and folders, or bring it up to date.

    One folder that `embed_corpus` made is taken with the vectors that it has, if its texts were kept. Documents are
    told apart by their ids, or where they have none, by their texts. `prune` takes out those that are no longer there.
    What was embedded before a stop is kept. Raises `InputError` for a row that cannot be read, two texts of one id, an
    index of another model or width, and at the end for documents without a finite vector.
    """
    kind = kind_of(folder)
    if kind:
        kind.require()
    documents = find_documents(names, column=column, apart_from=folder)
    facts = {
        **documents.facts(model, truncate_dim),
        "model": str(model.opening["path"]),
        "pooling": model.pooling,
        "add_eos": model.adds_eos,
    }
    require_absent(folder / DOCUMENTS, force=True)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, and an index is a folder. Choose another -o.")
    if not (folder / DOCUMENTS).exists() and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: holds other files, and no index. Choose another -o.")
    with locked(folder), _or_nothing(folder), contextlib.closing(Store(folder, facts=facts)) as store:
        require_space(store, facts)
        changes = _compare(store, documents)
        failed = _embed(store, documents, model, changes.n_new + changes.n_changed)
        if prune:
            with store.transaction():
                store.remove([name for (name,) in store.db.execute(_MISSING)])
        store.compact()
        if store.n_documents:
            if kind:
                say(cover(store, kind))
            say(measure_search(store, kind))
    if failed:
        shown = ", ".join(failed[:5]) + ", ..." * (len(failed) > 5)
        raise InputError(f"{len(failed)} documents have no finite vector, and are not in the index: {shown}.")
    return changes


@contextlib.contextmanager
def _or_nothing(folder: Path) -> Iterator[None]:
    """Remove a new index that has no vector yet where the block fails."""
    is_new = not (folder / DOCUMENTS).exists()
    try:
        yield
    except F2ggufError:
        if is_new and not any(folder.glob(VECTORS)):
            (folder / DOCUMENTS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's files are there
                folder.rmdir()
        raise


def require_space(store: Store, facts: dict[str, object]) -> None:
    """Raise `InputError` unless vectors of these facts compare with those of the index; one without takes them over."""
    if not store.n_keys:
        with store.transaction():
            store.state(**facts)
    words = {"width": "dimensions", "prompt": "as the documents' prompt", "max_tokens": "tokens at most"}
    for name, what in words.items():
        if store.facts[name] != facts[name]:
            raise InputError(
                f"{store.folder}: its vectors have {store.facts[name]!r} {what}, and these {facts[name]!r}. "
                "Ask for the same, or choose another -o."
            )
    require_fingerprint(store, str(facts["fingerprint"]), str(facts["model"]))
    opening = {name: facts[name] for name in ("model", "pooling", "add_eos")}  # the file may have moved
    if any(store.facts[name] != value for name, value in opening.items()):
        with store.transaction():
            store.state(**opening)


def require_fingerprint(store: Store, fingerprint: str, model: str) -> None:
    """Raise `InputError` unless the index is of this fingerprint."""
    if store.facts["fingerprint"] != fingerprint:
        raise InputError(
            f"{store.folder}: was made with {store.facts['model']}, and {model} gives other vectors (another file, "
            "pooling or width). Use that file, or make another index."
        )


_MISSING = "SELECT name FROM documents WHERE name NOT IN (SELECT name FROM seen)"


def _compare(store: Store, documents: Documents) -> Changes:
    """Note in a temporary table what the documents are. Raises `InputError` for a bad row, or two texts of one id."""
    store.db.execute("CREATE TEMP TABLE seen (name TEXT PRIMARY KEY, sha256 BLOB NOT NULL) WITHOUT ROWID")
    store.db.execute("BEGIN")
    for document, _ in documents:
        found = store.db.execute("SELECT sha256 FROM seen WHERE name = ?", (document.name,)).fetchone()
        if found is None:
            store.db.execute("INSERT INTO seen VALUES (?, ?)", (document.name, document.sha256))
        elif found[0] != document.sha256:
            raise InputError(
                f"{documents.name}: two texts have the {document.name}. Give each document an id of its own."
            )
    store.db.execute("COMMIT")
    count = "SELECT count(*), count(d.name), coalesce(sum(d.sha256 = s.sha256), 0)"
    joined = "FROM seen s LEFT JOIN documents d ON d.name = s.name"
    n_seen, n_known, n_same = store.db.execute(f"{count} {joined}").fetchone()
    n_missing = store.n_documents - n_known
    return Changes(n_seen - n_known, n_known - n_same, n_same, n_missing)


def _embed(store: Store, documents: Documents, model: Embedder, n_texts: int) -> list[str]:
    """Keep new and changed documents with their vectors; gives the names of those that have none."""
    failed: list[str] = []
    batch: dict[str, Found] = {}
    if not n_texts:
        return failed

    def put() -> None:
        kept, vectors, without = vectors_of(list(batch.values()), model, store.facts)
        store.put(kept, vectors)
        failed.extend(without)
        advance(len(batch))
        batch.clear()

    with progress("embed", n_texts) as advance:
        for document, vector in documents:
            known = store.db.execute("SELECT sha256 FROM documents WHERE name = ?", (document.name,)).fetchone()
            if known is None or known[0] != document.sha256:
                batch[document.name] = document, vector
            if len(batch) == _AT_ONCE:
                put()
        if batch:
            put()
    return failed
