"""Chroma: `F2ggufEmbeddingFunction`, whose file is part of the collection."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Space
from chromadb.utils.embedding_functions import known_embedding_functions, register_embedding_function
from f2gguf.integrations.model import LazyModel


@register_embedding_function
class F2ggufEmbeddingFunction(EmbeddingFunction[Documents]):
    """Chroma's `EmbeddingFunction` of a file; the options are those of `Embedder`, whose errors it raises.

    >>> function = F2ggufEmbeddingFunction("dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    >>> collection = client.create_collection("notes", embedding_function=function)

    Its name in the collection holds the fingerprint of the vectors, so that Chroma refuses a function of another file
    ("Embedding function conflict"). The configuration holds the path and the options.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        self.model = LazyModel.of(
            model, truncate_dim=truncate_dim, max_tokens=max_tokens, device=device, n_threads=n_threads
        )
        self.fingerprint = self.model.fingerprint()
        name = f"f2gguf-{self.fingerprint}"
        self.name = lambda: name  # type: ignore[method-assign]  # Chroma compares nothing but names
        known_embedding_functions[name] = type(self)

    def __call__(self, input: Documents) -> Embeddings:  # noqa: A002  # Chroma passes it by name
        """Vectors of documents."""
        return list(self.model.embed(input, query=False))

    def embed_query(self, input: Documents) -> Embeddings:  # noqa: A002
        """Vectors of queries."""
        return list(self.model.embed(input, query=True))

    @staticmethod
    def name() -> str:
        """The name of the class; that of a function has its fingerprint behind it."""
        return "f2gguf"

    def default_space(self) -> Space:
        """Vectors are compared by their cosine."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """What `build_from_config` takes."""
        return {**asdict(self.model), "fingerprint": self.fingerprint}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> F2ggufEmbeddingFunction:
        """The function again. Raises `WrongUsage` where the file at its path is another one by now."""
        options = dict(config)
        stated, path = options.pop("fingerprint"), options.pop("path")
        function = F2ggufEmbeddingFunction(path, **options)
        function.model.require_fingerprint(stated, "the collection")
        return function
