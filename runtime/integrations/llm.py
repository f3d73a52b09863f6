"""A plugin of Simon Willison's `llm`: the models on this disk, for `llm embed`, `llm embed-multi` and `llm similar`.

`llm` finds it by itself. F2GGUF_MODEL names the model `f2gguf`; each file in the Hub's cache, which `f2gguf pull`
fills, is `f2gguf/org/name:VARIANT`, as `f2gguf list` shows it. Texts are documents. `llm similar` embeds a query.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator

import llm
from f2gguf.integrations.model import LazyModel
from f2gguf.runtime.hub.inventory import names_in_cache

_SIMILAR = llm.Collection.similar.__code__


class F2ggufEmbeddingModel(llm.EmbeddingModel):
    """llm's `EmbeddingModel` of a file, which is opened at the first text."""

    batch_size = 256

    def __init__(self, model_id: str, path: str) -> None:
        self.model_id = model_id
        self.model = LazyModel.of(path)

    def embed(self, item: str | bytes, *, key: str | None = None) -> list[float]:
        """The vector of a document, or of a query where `Collection.similar` asks, which calls as others do."""
        self._check(item)
        is_query = sys._getframe(1).f_code is _SIMILAR
        return self.model.embed([str(item)], query=is_query)[0].tolist()

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        """Vectors of documents."""
        yield from self.model.embed([str(item) for item in items], query=False).tolist()


@llm.hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """Tell llm of the models. No file is opened."""
    if path := os.environ.get("F2GGUF_MODEL"):
        register(F2ggufEmbeddingModel("f2gguf", path))
    for name in names_in_cache():
        register(F2ggufEmbeddingModel(f"f2gguf/{name}", name))
