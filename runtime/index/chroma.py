"""Chroma: a collection "documents" in a folder of Chroma's own. Ids are the documents' own, texts are its documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.index.exact import until_enough
from f2gguf.runtime.index.store import Errors, Keys, Rows, Store, id_of

FILE = "chroma"
_NAME = "documents"
_BATCH = 2048


class Chroma:
    type = "HNSW"
    removes = True

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    def build(cls, store: Store, keys: Keys) -> Chroma:
        found = cls(_client(store.folder / FILE))
        if _NAME in [it.name for it in found._client.list_collections()]:
            found._client.delete_collection(_NAME)
        facts = {"f2gguf:fingerprint": store.facts["fingerprint"], "f2gguf:model": store.facts["model"]}
        space = {"space": "cosine", "ef_construction": 128, "ef_search": 128}
        found._client.create_collection(_NAME, metadata=facts, configuration={"hnsw": space}, embedding_function=None)
        return found

    @classmethod
    def load(cls, path: Path, *, to_add: bool = False) -> Chroma:
        return cls(_client(path))

    @staticmethod
    def errors() -> Errors:
        from chromadb.errors import ChromaError

        return ChromaError, ValueError, AttributeError  # the last where its database is damaged, on the second try

    @staticmethod
    def type_for(n_vectors: int) -> str:
        return "HNSW"

    @property
    def _collection(self) -> Any:
        return self._client.get_collection(_NAME, embedding_function=None)

    def __len__(self) -> int:
        return int(self._collection.count())

    def add(self, store: Store, keys: Keys) -> None:
        vectors, collection = store.vectors(), self._collection
        for start in range(0, len(keys), _BATCH):
            some = keys[start : start + _BATCH].tolist()
            rows = store.db.execute(
                f"SELECT key, name, text FROM documents WHERE key IN ({', '.join(map(str, some))}) ORDER BY key"
            ).fetchall()
            collection.add(
                ids=self._new_ids([name for _, name, _ in rows]),
                embeddings=[vectors[key] for key, _, _ in rows],
                documents=[text for _, _, text in rows],
                metadatas=[{"key": key} for key, _, _ in rows],
            )

    def remove(self, keys: Keys) -> None:
        for start in range(0, len(keys), _BATCH):
            self._collection.delete(where={"key": {"$in": keys[start : start + _BATCH].tolist()}})

    def search(self, queries: Rows, top: int, without: Keys) -> tuple[Rows, Keys]:
        collection = self._collection

        def ask(n_asked: int) -> tuple[Rows, Keys]:
            found = collection.query(list(queries), n_results=n_asked, include=["metadatas", "distances"])
            keys = np.full((len(queries), n_asked), -1, dtype=np.int64)
            scores = np.full((len(queries), n_asked), -np.inf, dtype=np.float32)
            for i, (rows, distances) in enumerate(zip(found["metadatas"], found["distances"], strict=True)):
                keys[i, : len(rows)] = [row["key"] for row in rows]
                scores[i, : len(rows)] = 1 - np.array(distances, dtype=np.float32)
            return scores, keys

        return until_enough(ask, top, len(self), without)

    def _new_ids(self, names: list[str]) -> list[str]:
        """The ids of documents; a name stands for one that another has, as where both 1 and "1" are ids."""
        taken = set(self._collection.get(ids=list({_id(name) for name in names}), include=[])["ids"])
        ids: list[str] = []
        for name in names:
            ids.append(name if _id(name) in taken else _id(name))
            taken.add(ids[-1])
        return ids

    def save(self, path: Path) -> None:
        """Chroma has saved what it was given."""


def _id(name: str) -> str:
    """Chroma's ids are texts: a document's own id, or "text:" and its hash."""
    row_id = id_of(name)
    return name if row_id is None else str(row_id)


def _client(folder: Path) -> Any:
    import chromadb

    return chromadb.PersistentClient(str(folder), settings=chromadb.Settings(anonymized_telemetry=False))
