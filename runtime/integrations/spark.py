"""Spark: `embedding_udf`, a pandas UDF that turns a column of texts into one of vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from f2gguf.integrations.model import LazyModel

if TYPE_CHECKING:
    import pandas as pd


class EmbedSeries:
    """Series of texts become series of vectors. A worker opens the file once, where it is called first."""

    def __init__(self, model: LazyModel, *, query: bool) -> None:
        self.model, self.query = model, query

    def __call__(self, batches: Iterator[pd.Series[Any]]) -> Iterator[pd.Series[Any]]:
        """A series of vectors for each series of texts; null for null."""
        import pandas as pd

        for texts in batches:
            is_null = texts.isna()
            vectors = iter(self.model.embed(texts[~is_null], query=self.query))
            yield pd.Series([None if null else next(vectors) for null in is_null], dtype=object)


def embedding_udf(
    model: str,
    *,
    query: bool = False,
    truncate_dim: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    n_threads: int | None = None,
) -> Any:
    """A pandas UDF from texts to arrays of floats, with the document prompt, or with `query=True` the query prompt.

    >>> table.withColumn("embedding", embedding_udf("/models/f2llm-nano-Q8_0.gguf")("text"))

    Every worker must have the file at that path, or it is one of the Hub. The options are those of `Embedder`, whose
    errors it raises. Workers on one machine share its cores: `n_threads` is what each of them gets.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import ArrayType, FloatType

    options = {"truncate_dim": truncate_dim, "max_tokens": max_tokens, "device": device, "n_threads": n_threads}
    embed = EmbedSeries(LazyModel.of(model, **options), query=query)

    def vectors(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:  # type: ignore[type-arg]
        return embed(batches)

    vectors.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}  # Spark reads them
    return pandas_udf(vectors, ArrayType(FloatType()))
