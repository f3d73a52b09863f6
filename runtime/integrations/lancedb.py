"""LanceDB: `F2ggufEmbeddings`, registered as "f2gguf", whose file is part of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
from f2gguf.integrations.model import LazyModel
from lancedb.embeddings import TextEmbeddingFunction, register
from numpy.typing import NDArray


@register("f2gguf")
class F2ggufEmbeddings(TextEmbeddingFunction):
    """LanceDB's embedding function of the file `model`; the options are those of `Embedder`, whose errors it raises.

    >>> model = get_registry().get("f2gguf").create(model="dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    >>> class Note(LanceModel):
    ...     text: str = model.SourceField()
    ...     vector: Vector(model.ndims()) = model.VectorField()

    The table holds the fingerprint of the vectors. Where the file at the path is another one, opening it is an error.
    """

    model: str
    truncate_dim: int | None = None
    max_tokens: int | None = None
    device: str = "auto"
    n_threads: int | None = None
    fingerprint: str | None = None
    max_retries: int = 0  # the same text gives the same error

    @classmethod
    def create(cls, **options: Any) -> F2ggufEmbeddings:
        """Open the file. Raises `WrongUsage` where `fingerprint` is given, and is not that of its vectors."""
        function: F2ggufEmbeddings = super().create(**options)
        function.lazy.require_fingerprint(function.fingerprint, "the table")
        function._original_args = {**options, "fingerprint": function.lazy.fingerprint()}
        return function

    @property
    def lazy(self) -> LazyModel:
        """The file and its options."""
        return LazyModel.of(
            self.model,
            truncate_dim=self.truncate_dim,
            max_tokens=self.max_tokens,
            device=self.device,
            n_threads=self.n_threads,
        )

    def ndims(self) -> int:
        """Width of the vectors."""
        return self.lazy.embedder.get_embedding_dimension()

    def generate_embeddings(self, texts: Any, *_: Any, **__: Any) -> list[NDArray[np.float32]]:
        """Vectors of documents."""
        return list(self.lazy.embed(self.sanitize_input(texts), query=False))

    def compute_query_embeddings(self, query: Any, *_: Any, **__: Any) -> list[NDArray[np.float32]]:
        """Vectors of queries."""
        return list(self.lazy.embed(self.sanitize_input(query), query=True))
