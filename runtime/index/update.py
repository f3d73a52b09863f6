"""Documents become an index, or bring one up to date: only new and changed texts are embedded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from f2gguf.runtime.console import progress, say
from f2gguf.runtime.corpus.inputs import find_inputs, glance
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import InputError, NoVector, OutputError
from f2gguf.runtime.files import locked
from f2gguf.runtime.index.kinds import cover, kind_of, measure_recall
from f2gguf.runtime.index.store import DOCUMENTS, Document, Store
from f2gguf.runtime.llama.encoder import normalized
from f2gguf.runtime.tables.texts import iter_texts

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

    Documents are told apart by their ids, or where they have none, by their texts. `prune` takes out those that are no
    longer there. What was embedded before a stop is kept. Raises `InputError` for a row that cannot be read, two texts
    of one id, an index of another model or width, and at the end for documents without a finite vector.
    """
    kind = kind_of(folder)
    if kind:
        kind.require()
    files = find_inputs(names, apart_from=folder)
    glance(files, column)
    width = model.header.require_width(model.truncate_dim if truncate_dim is None else truncate_dim)
    facts = {
        "fingerprint": model.fingerprint(width),
        "model": str(model.opening["path"]),
        "prompt": model.header.document_prompt,
        "width": width,
        "max_tokens": model.max_seq_length,
        "pooling": model.pooling,
        "add_eos": model.adds_eos,
    }
    if not (folder / DOCUMENTS).exists() and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: holds other files, and no index. Choose another -o.")
    with locked(folder), contextlib.closing(Store(folder, facts=facts)) as store:
        require_space(store, facts)
        changes = _compare(store, files, column)
        failed = _embed(store, files, column, model, changes.n_new + changes.n_changed)
        if prune:
            with store.transaction():
                store.remove([name for (name,) in store.db.execute(_MISSING)])
        store.compact()
        if kind and store.n_documents:
            say(cover(store, kind))
            say(measure_recall(store, kind))
    if failed:
        shown = ", ".join(failed[:5]) + ", ..." * (len(failed) > 5)
        raise InputError(f"{len(failed)} documents have no finite vector, and are not in the index: {shown}.")
    return changes


def require_space(store: Store, facts: dict[str, object]) -> None:
    """Raise `InputError` unless vectors of these facts compare with those of the index."""
    words = {"width": "dimensions", "prompt": "as the documents' prompt", "max_tokens": "tokens at most"}
    for name, what in words.items():
        if store.facts[name] != facts[name]:
            raise InputError(
                f"{store.folder}: its vectors have {store.facts[name]!r} {what}, and these {facts[name]!r}. "
                "Ask for the same, or choose another -o."
            )
    require_fingerprint(store, str(facts["fingerprint"]), str(facts["model"]))


def require_fingerprint(store: Store, fingerprint: str, model: str) -> None:
    """Raise `InputError` unless the index is of this fingerprint."""
    if store.facts["fingerprint"] != fingerprint:
        raise InputError(
            f"{store.folder}: was made with {store.facts['model']}, and {model} gives other vectors (another file, "
            "pooling or width). Use that file, or make another index."
        )


_MISSING = "SELECT name FROM documents WHERE name NOT IN (SELECT name FROM seen)"


def _compare(store: Store, files: Sequence[str], column: str | None) -> Changes:
    """Note in a temporary table what the files hold. Raises `InputError` for a bad row, or two texts of one id."""
    store.db.execute("CREATE TEMP TABLE seen (name TEXT PRIMARY KEY, sha256 BLOB NOT NULL) WITHOUT ROWID")
    store.db.execute("BEGIN")
    for document in _documents(files, column):
        found = store.db.execute("SELECT sha256 FROM seen WHERE name = ?", (document.name,)).fetchone()
        if found is None:
            store.db.execute("INSERT INTO seen VALUES (?, ?)", (document.name, document.sha256))
        elif found[0] != document.sha256:
            raise InputError(
                f"{', '.join(files[:3])}: two texts have the {document.name}. Give each document an id of its own."
            )
    store.db.execute("COMMIT")
    count = "SELECT count(*), count(d.name), coalesce(sum(d.sha256 = s.sha256), 0)"
    joined = "FROM seen s LEFT JOIN documents d ON d.name = s.name"
    n_seen, n_known, n_same = store.db.execute(f"{count} {joined}").fetchone()
    n_missing = store.n_documents - n_known
    return Changes(n_seen - n_known, n_known - n_same, n_same, n_missing)


def _embed(store: Store, files: Sequence[str], column: str | None, model: Embedder, n_texts: int) -> list[str]:
    """Embed and keep new and changed documents; gives the names of those that have no vector."""
    failed: list[str] = []
    batch: dict[str, Document] = {}
    if not n_texts:
        return failed
    with progress("embed", n_texts) as advance:
        for document in _documents(files, column):
            known = store.db.execute("SELECT sha256 FROM documents WHERE name = ?", (document.name,)).fetchone()
            if known is None or known[0] != document.sha256:
                batch[document.name] = document
            if len(batch) == _AT_ONCE:
                failed += _put(store, list(batch.values()), model)
                advance(len(batch))
                batch = {}
        if batch:
            failed += _put(store, list(batch.values()), model)
            advance(len(batch))
    return failed


def _put(store: Store, documents: list[Document], model: Embedder) -> list[str]:
    failed: list[str] = []
    try:
        found = model.embed(
            [it.text for it in documents], prompt=store.facts["prompt"], truncate_dim=store.facts["width"]
        )
    except NoVector as error:
        found, failed = error.embeddings, [documents[i].name for i in error.indices]
    kept = [it for it in documents if it.name not in failed]
    store.put(kept, normalized(found.vectors))
    return failed


def _documents(files: Sequence[str], column: str | None) -> Iterator[Document]:
    for name in files:
        yield from map(Document.of, iter_texts(name, column=column))
