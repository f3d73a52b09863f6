"""`EmbedBatch` for Ray Data and `datasets`: a batch of rows gets a column of vectors. It needs neither library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from f2gguf.integrations.model import LazyModel
from f2gguf.runtime.calls import described
from f2gguf.runtime.errors import InputError


class EmbedBatch:
    """A callable of plain values, which can be pickled, and opens the file where it is called first.

    >>> dataset.map_batches(  # of Ray
    ...     EmbedBatch, fn_constructor_args=["/models/f2llm-nano-Q8_0.gguf"], batch_size=1024, num_cpus=4,
    ...     compute=ray.data.ActorPoolStrategy(size=8),
    ... )
    >>> dataset.map(EmbedBatch("f2llm-nano-Q8_0.gguf"), batched=True)  # of Hugging Face

    Rows get the vector of their `column` as `output`, with the document prompt, or with `query=True` the query prompt.
    Ray gives an actor as many threads as `num_cpus`. The other options are those of `Embedder`, whose errors it raises.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        column: str = "text",
        output: str = "embedding",
        query: bool = False,
        truncate_dim: int | None = None,
        max_tokens: int | None = None,
        device: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        self.column, self.output, self.query = column, output, query
        self.model = LazyModel.of(
            model, truncate_dim=truncate_dim, max_tokens=max_tokens, device=device, n_threads=n_threads
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a batch and the vectors, (n_rows, n_dims) float32. The batch stays as it is."""
        if not isinstance(batch, Mapping):
            raise InputError(f"a batch is a dict of columns, and this is {described(batch)}. (batch_format='numpy')")
        if self.column not in batch:
            raise InputError(f"the batch has no column {self.column!r}. It has: {', '.join(batch)}. (column=...)")
        return {**batch, self.output: self.model.embed(batch[self.column], query=self.query)}
