"""LlamaIndex: `F2ggufEmbedding`, for `Settings.embed_model`, indexes and ingestion pipelines."""

from __future__ import annotations

import asyncio
from typing import Any

from f2gguf.integrations.model import LazyModel
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.embeddings import BaseEmbedding


class F2ggufEmbedding(BaseEmbedding):
    """LlamaIndex's `BaseEmbedding` of the file `model_name`; options and errors are those of `Embedder`.

    >>> Settings.embed_model = F2ggufEmbedding(model_name="dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    """

    truncate_dim: int | None = Field(default=None, description="Leading dimensions to keep.")
    max_tokens: int | None = Field(default=None, description="Longest input in tokens.")
    device: str = Field(default="auto", description="auto, cpu, cuda or metal.")
    n_threads: int | None = Field(default=None, description="Threads; the physical cores by default.")
    _model: LazyModel = PrivateAttr()

    def __init__(self, model_name: str, **options: Any) -> None:
        super().__init__(model_name=str(model_name), **options)
        self._model = LazyModel.of(
            self.model_name,
            truncate_dim=self.truncate_dim,
            max_tokens=self.max_tokens,
            device=self.device,
            n_threads=self.n_threads,
        )
        _ = self._model.embedder  # a file that cannot be used is an error here

    @classmethod
    def class_name(cls) -> str:
        """The name in what LlamaIndex writes down."""
        return "F2ggufEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.embed([query], query=True)[0].tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.embed([text], query=False)[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed(texts, query=False).tolist()
