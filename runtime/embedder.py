"""`Embedder`: texts become vectors, with the names and the conduct of sentence-transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime import llama
from f2gguf.runtime.errors import TextError, TruncationWarning, UnknownDims, UnknownName, WrongUsage
from f2gguf.runtime.header import Header, read_header
from f2gguf.runtime.tokenizer import Tokenizer, load_overrides
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]
PRECISIONS = ("float32", "float16")
BATCH_TOKENS = 512  # short texts are packed up to this; a longer text is a batch of its own
_CTX_STEP = 512  # contexts grow in these steps, so that a slightly longer text does not rebuild one


class Embedder:
    """An embedding model from a .gguf file.

    >>> model = Embedder("dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    >>> queries = model.encode_query(["how do I compress a folder?"])     # (1, 256) float32, L2-normalised
    >>> documents = model.encode_document(["tar is an archiving program"])
    >>> model.similarity(queries, documents)                              # (1, 1)

    Everything it must know stands in the file's header. `pooling` and `max_tokens` state what a file from elsewhere
    does not. Raises `NotGGUF`, `PoolingMissing`, `NotAnEmbeddingModel`, `DeviceMissing` or `GGUFError`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        n_threads: int | None = None,
        pooling: str | None = None,
        max_tokens: int | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        self.header: Header = read_header(path)
        self.pooling = self.header.require_pooling(pooling)
        self.truncate_dim = self._require_dim(truncate_dim)
        self._n_threads = n_threads or llama.default_threads()
        self._model = llama.Model(self.header.path, device=device, overrides=load_overrides(self.header))
        self._tokenizer = Tokenizer(self._model, self.header, max_tokens=self._require_max_tokens(max_tokens))
        self._context: llama.Context | None = None
        self._warned = False

    @property
    def max_seq_length(self) -> int:
        """Longest input in tokens, special tokens included; longer ones are cut."""
        return self._tokenizer.max_tokens

    @property
    def prompts(self) -> dict[str, str]:
        return self.header.prompts

    def get_sentence_embedding_dimension(self) -> int:
        """Width of the vectors that `encode` gives."""
        return self.truncate_dim or self.header.n_embd

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Token ids of one text without prompt, special tokens included, cut to the maximum length, (n_tokens,)."""
        return self._tokenizer(text)[0]

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        on_progress: Callable[[int], None] | None = None,
    ) -> Vectors:
        """Vectors of texts: (n_texts, n_dims), or (n_dims,) for a single string.

        `prompt` (or the header's, by `prompt_name`) is put before every text that does not begin with it already.
        `truncate_dim` keeps the leading dimensions and normalises again; it must be one of the model's Matryoshka
        widths. `on_progress` is told how many texts a batch has finished. Texts over the maximum length are cut,
        their EOS kept, with one `TruncationWarning`. Raises `TextError` for a text that has no vector, `UnknownName`
        for an unknown prompt, `UnknownDims` for an untrained width.
        """
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        width = self._require_dim(truncate_dim) or self.get_sentence_embedding_dimension()
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        prefix = prompt if prompt is not None else self._prompt_of(prompt_name)
        ids = self._tokenize_all([text if text.startswith(prefix) else prefix + text for text in texts])
        vectors = self._embed(ids, on_progress)[:, :width]
        if self.header.is_normalized if normalize_embeddings is None else normalize_embeddings:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors.astype(precision)
        return vectors[0] if isinstance(sentences, str) else vectors

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the model's query prompt, where it has one."""
        return self._encode_as("query", sentences, options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Vectors:
        """`encode` with the model's document prompt, where it has one."""
        return self._encode_as("document", sentences, options)

    @staticmethod
    def similarity(embeddings1: Vectors, embeddings2: Vectors) -> NDArray[np.float32]:
        """Cosine of every row of one with every row of the other, (n1, n2) float32."""
        left, right = (np.atleast_2d(np.asarray(e, dtype=np.float32)) for e in (embeddings1, embeddings2))
        left, right = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (left, right))
        return np.asarray(left @ right.T)

    def close(self) -> None:
        """Free the model's memory. The Embedder is of no use afterwards."""
        if self._context:
            self._context.close()
            self._context = None
        self._model.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode_as(self, kind: str, sentences: str | Sequence[str], options: dict[str, Any]) -> Vectors:
        if "prompt" not in options and "prompt_name" not in options and kind in self.prompts:
            options = {**options, "prompt_name": kind}
        return self.encode(sentences, **options)

    def _prompt_of(self, prompt_name: str | None) -> str:
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            hint = " Pass the text itself with prompt=... (--prompt)."
            raise UnknownName(f"prompt of {self.header.path}", prompt_name, self.prompts, hint)
        return self.prompts[prompt_name]

    def _require_dim(self, truncate_dim: int | None) -> int | None:
        dims = self.header.dims
        if truncate_dim is None or truncate_dim in dims or truncate_dim == self.header.n_embd:
            return truncate_dim
        trained = f"was trained for {', '.join(map(str, dims))}" if len(dims) > 1 else f"gives only {dims[0]}"
        raise UnknownDims(f"{truncate_dim} dimensions: {self.header.name} {trained} (--dims, truncate_dim).")

    def _require_max_tokens(self, max_tokens: int | None) -> int:
        limit = self.header.max_tokens
        if max_tokens is None:
            return limit
        if not 2 <= max_tokens <= self.header.n_ctx_train:
            raise WrongUsage(
                f"max_tokens is {max_tokens}: {self.header.name} takes 2 to {self.header.n_ctx_train} (--max-tokens)."
            )
        return max_tokens

    def _tokenize_all(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        ids = []
        n_truncated = 0
        for i, text in enumerate(texts):
            try:
                tokens, truncated = self._tokenizer(text)
            except TextError as error:
                raise TextError(f"text {i + 1} of {len(texts)}: {error}") from error
            ids.append(tokens)
            n_truncated += truncated
        if n_truncated and not self._warned:
            self._warned = True
            warnings.warn(
                f"{n_truncated} of {len(texts)} texts are longer than {self.max_seq_length} tokens and were cut",
                TruncationWarning,
                stacklevel=4,
            )
        return ids

    def _embed(self, ids: list[NDArray[np.int32]], on_progress: Callable[[int], None] | None) -> NDArray[np.float32]:
        vectors = np.empty((len(ids), self.header.n_embd), dtype=np.float32)
        for batch in _batches([len(tokens) for tokens in ids]):
            context = self._context_for(sum(len(ids[i]) for i in batch))
            vectors[batch] = context.embed([ids[i] for i in batch])
            if on_progress:
                on_progress(len(batch))
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
        if len(bad):
            raise TextError(
                f"{self.header.path}: no finite vector for text {bad[0] + 1} of {len(ids)} ({len(bad)} such texts). "
                "Try --device cpu, or a variant of higher precision."
            )
        return vectors

    def _context_for(self, n_tokens: int) -> llama.Context:
        if self._context is None or self._context.n_ctx < n_tokens:
            if self._context:
                self._context.close()
            self._context = llama.Context(
                self._model,
                n_ctx=max(BATCH_TOKENS, -(-n_tokens // _CTX_STEP) * _CTX_STEP),
                pooling=self.pooling,
                is_causal=self.header.is_causal,
                n_threads=self._n_threads,
            )
        return self._context


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts, longest first, packed up to BATCH_TOKENS tokens and N_SEQ_MAX texts."""
    batch: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (n_tokens + lengths[i] > BATCH_TOKENS or len(batch) == llama.N_SEQ_MAX):
            yield batch
            batch, n_tokens = [], 0
        batch.append(i)
        n_tokens += lengths[i]
    if batch:
        yield batch
