"""Queries and the documents of an index that are nearest to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import InputError
from f2gguf.runtime.index.kinds import kind_of, searcher
from f2gguf.runtime.index.store import Store
from f2gguf.runtime.index.update import require_fingerprint
from f2gguf.runtime.llama.encoder import normalized
from f2gguf.runtime.tables.texts import Id


def search_index(
    store: Store, model: Embedder, queries: Sequence[str], *, top: int
) -> list[list[tuple[float, Id | None, str]]]:
    """Cosine, id and text of the `top` nearest documents of every query, the best first.

    Queries get the model's query prompt. Raises `InputError` for an index without documents, and for a
    model that gives other vectors than the index has.
    """
    if not store.n_documents:
        raise InputError(f"{store.folder}: holds no documents. Add some: f2gguf index DOCS -o {store.folder}")
    width = store.facts["width"]
    fingerprint = model.fingerprint(width) if width in model.header.dims else "of another width"
    require_fingerprint(store, fingerprint, model.header.path.name)
    vectors = normalized(model.encode_query(list(queries), truncate_dim=width))
    scores, keys = searcher(store, kind_of(store.folder))(vectors, top)
    found = []
    for row_scores, row_keys in zip(scores, keys, strict=True):
        documents = store.documents_of(row_keys[np.isfinite(row_scores)].tolist())
        hits = zip(row_scores.tolist(), row_keys.tolist(), strict=True)
        found.append([(score, *documents[key]) for score, key in hits if key in documents])
    return found
