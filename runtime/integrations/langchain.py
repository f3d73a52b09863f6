"""LangChain: `F2ggufEmbeddings`, for vector stores, retrievers and semantic splitters."""

from __future__ import annotations

from pathlib import Path

from f2gguf.integrations.model import LazyModel
from langchain_core.embeddings import Embeddings


class F2ggufEmbeddings(Embeddings):
    """LangChain's `Embeddings` of a file; the options are those of `Embedder`, whose errors it raises.

    >>> store = InMemoryVectorStore(F2ggufEmbeddings("dist/f2llm-nano/f2llm-nano-Q8_0.gguf"))
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
        _ = self.model.embedder  # a file that cannot be used is an error here

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of documents."""
        return self.model.embed(texts, query=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Vector of a query."""
        return self.model.embed([text], query=True)[0].tolist()
