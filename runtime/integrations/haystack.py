"""Haystack: `F2ggufTextEmbedder` for queries and `F2ggufDocumentEmbedder` for documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from f2gguf.integrations.model import LazyModel
from f2gguf.runtime.errors import TextError
from haystack import Document, component, default_from_dict, default_to_dict


class _Embedder:
    """What both have: the file is opened by `warm_up`, or by the first `run`."""

    def __init__(
        self,
        model: str,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        self._settings: dict[str, Any] = {
            "model": str(model),
            "truncate_dim": truncate_dim,
            "max_tokens": max_tokens,
            "device": device,
            "n_threads": n_threads,
        }
        options = {key: value for key, value in self._settings.items() if key != "model"}
        self._model = LazyModel.of(model, **options)

    def warm_up(self) -> None:
        """Open the file. Raises what `Embedder` does."""
        _ = self._model.embedder

    def to_dict(self) -> dict[str, Any]:
        """What stands in a pipeline's YAML."""
        return default_to_dict(self, **self._settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component again."""
        return default_from_dict(cls, data)


@component
class F2ggufTextEmbedder(_Embedder):
    """Vectors of queries, with the file's query prompt; the options are those of `Embedder`, whose errors it raises.

    >>> pipeline.add_component("text_embedder", F2ggufTextEmbedder("dist/f2llm-nano/f2llm-nano-Q8_0.gguf"))
    """

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """The vector of a query."""
        if not isinstance(text, str):
            raise TextError("F2ggufTextEmbedder takes a string. For documents there is F2ggufDocumentEmbedder.")
        return {"embedding": self._model.embed([text], query=True)[0].tolist()}


@component
class F2ggufDocumentEmbedder(_Embedder):
    """Vectors of documents, behind the values of `meta_fields_to_embed`. The options are those of `Embedder`.

    >>> pipeline.add_component("embedder", F2ggufDocumentEmbedder("dist/f2llm-nano/f2llm-nano-Q8_0.gguf"))
    """

    def __init__(
        self,
        model: str,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        n_threads: int | None = None,
        meta_fields_to_embed: Sequence[str] = (),
        embedding_separator: str = "\n",
    ) -> None:
        _Embedder.__init__(self, model, truncate_dim, max_tokens, device, n_threads)  # `component` makes another class
        self._settings |= {
            "meta_fields_to_embed": list(meta_fields_to_embed),
            "embedding_separator": embedding_separator,
        }

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """The documents with their vectors; those that were passed stay as they are."""
        if not isinstance(documents, list) or not all(isinstance(document, Document) for document in documents):
            raise TextError("F2ggufDocumentEmbedder takes a list of Documents. For a query: F2ggufTextEmbedder.")
        vectors = self._model.embed([self._text(document) for document in documents], query=False)
        return {"documents": [replace(d, embedding=v.tolist()) for d, v in zip(documents, vectors, strict=True)]}

    def _text(self, document: Document) -> str:
        values = [document.meta.get(name) for name in self._settings["meta_fields_to_embed"]]
        parts = [*(str(value) for value in values if value is not None), document.content or ""]
        return str(self._settings["embedding_separator"].join(parts))
