"""`Embedder`: texts become vectors. Names and behaviour are those of sentence-transformers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from f2gguf.runtime.errors import Closed, F2ggufError, NoVector, TextError, TruncationWarning, UnknownName
from f2gguf.runtime.gguf.golden import golden_of
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.hub.models import open_header
from f2gguf.runtime.llama.context import ComputeSettings, Watch
from f2gguf.runtime.llama.encoder import Encoder
from f2gguf.runtime.llama.engine import unusable
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.threads import default_threads
from f2gguf.runtime.selftest import Selftest, probe_vectors, selftest
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]
log = logging.getLogger("f2gguf")
PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class Embeddings:
    """Vectors of texts, the number of tokens of each text, and whether it was cut."""

    vectors: Vectors  # (n_texts, n_dims)
    n_tokens: NDArray[np.int64]  # (n_texts,) that the model saw, special tokens and prompt included
    truncated: NDArray[np.bool_]  # (n_texts,) whether the text was longer than that


class EncodeOptions(TypedDict, total=False):
    """The options of `embed`, which `encode` and its like take too."""

    prompt_name: str | None
    prompt: str | None
    normalize_embeddings: bool | None
    truncate_dim: int | None
    precision: str
    on_progress: Callable[[int], None] | None


class Embedder:
    """An embedding model from a .gguf file, or from `org/name[:VARIANT][@revision]` on the Hugging Face Hub.

    >>> model = Embedder("dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    >>> queries = model.encode_query(["how do I compress a folder?"])     # (1, 256) float32, L2-normalised
    >>> documents = model.encode_document(["tar is an archiving program"])
    >>> model.similarity(queries, documents)                              # (1, 1)

    The file's header states everything that the Embedder must know. Where a file from elsewhere does not, `pooling`
    and `max_tokens` do. `n_threads` is the number of physical cores by default, and `n_gpu_layers` is all layers (-1).
    With `deterministic` every text is a batch of its own, so that a quantised file gives a text the same bytes whatever
    else is embedded. With `selftest` the file's golden texts are embedded first, and must give what its maker measured.
    `watch` receives tensors of llama.cpp's graph. Many threads may share one Embedder.

    A file of the Hub is downloaded once and verified. Later it comes from the cache without a request, until
    `f2gguf pull` updates it. A `Path`, or a string that is the path of a file, is never looked up on the Hub.

    Raises `NotGGUF`, `PoolingMissing`, `NotAnEmbeddingModel`, `DeviceMissing` or `GGUFError`; with `selftest` also
    `SelftestMissing` and `SelftestFailed`; for the Hub `UnknownName` or a `HubError`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        pooling: str | None = None,
        max_tokens: int | None = None,
        truncate_dim: int | None = None,
        deterministic: bool = False,
        selftest: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.header: Header = open_header(path)
        self.prompts = self.header.prompts
        self.pooling = self.header.require_pooling(pooling)
        self.header.require_width(truncate_dim)
        self.truncate_dim = truncate_dim
        self.max_seq_length = self.header.require_max_tokens(max_tokens)  # in tokens, special tokens included
        settings = ComputeSettings(
            device, n_gpu_layers, n_threads or default_threads(), self.pooling, self.max_seq_length, deterministic
        )
        self._encoder: Encoder | None = Encoder(self.header, settings, watch=watch)
        self._warned = False
        log.info("%s", self.description)
        if selftest:
            try:
                self.selftest().require_sound()
            except F2ggufError:
                self.close()
                raise

    @property
    def description(self) -> str:
        """File, device, threads and way of computing, in one line."""
        return f"{self.header.path.name}: {self.encoder.engine.description}"

    @property
    def encoder(self) -> Encoder:
        """The single steps of `embed`, for callers that batch by other rules. Raises `Closed` after `close`."""
        if self._encoder is None:
            raise Closed(f"{self.header.path}: this Embedder was closed; open the file again.")
        return self._encoder

    def default_prompt(self, kind: str) -> str | None:
        """Name of the prompt for a 'query' or 'document', None where the model has none for it."""
        return kind if kind in self.prompts else None

    def get_sentence_embedding_dimension(self) -> int:
        """Width of the vectors that `encode` gives."""
        return self.truncate_dim or self.header.n_embd

    def tokenize(self, text: str) -> Ids:
        """Token ids of one text without prompt, special tokens included, cut to the maximum length, (n_tokens,)."""
        return self.encoder.tokenize(_texts_of(text)).ids[0]

    def encode(self, sentences: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Vectors:
        """Vectors of texts: (n_texts, n_dims), or (n_dims,) for a single string. See `embed`."""
        vectors = self.embed(sentences, **options).vectors
        return vectors[0] if isinstance(sentences, str) else vectors

    def encode_query(self, sentences: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Vectors:
        """`encode` with the model's query prompt, where it has one."""
        return self.encode(sentences, **self._with_prompt("query", options))

    def encode_document(self, sentences: str | Sequence[str], **options: Unpack[EncodeOptions]) -> Vectors:
        """`encode` with the model's document prompt, where it has one."""
        return self.encode(sentences, **self._with_prompt("document", options))

    def embed(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        on_progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Vectors of texts, with the number of tokens of each and whether it was cut.

        `prompt` (or the header's prompt called `prompt_name`) is put before every text that does not begin with it.
        `truncate_dim` keeps the leading dimensions and normalises again; it must be one of the model's Matryoshka
        widths. `precision` is float32 or float16. `on_progress` receives the number of texts that a batch finished.
        Texts over the maximum length are cut but keep their EOS, with one `TruncationWarning`. Raises `TextError` for
        what is no valid text, `NoVector` (which carries all other vectors) for texts without a finite vector,
        `UnknownName` for an unknown prompt, and `UnknownDims` for a width that was not trained.
        """
        encoder = self.encoder
        width = self.header.require_width(self.truncate_dim if truncate_dim is None else truncate_dim)
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        tokens = encoder.tokenize(_texts_of(sentences), prompt if prompt is not None else self._prompt_of(prompt_name))
        if tokens.truncated.any() and not self._warned:
            self._warned = True
            words = f"{tokens.truncated.sum()} of {len(tokens.ids)} texts are longer than {self.max_seq_length} tokens"
            warnings.warn(f"{words} and were cut", TruncationWarning, stacklevel=3)
        rows = encoder.compute(tokens.ids, tokens.prompt, on_progress=on_progress)
        vectors = encoder.finish(rows, width=width, normalize=normalize_embeddings).astype(precision, copy=False)
        return self._require_vectors(Embeddings(vectors, tokens.lengths, tokens.truncated))

    @staticmethod
    def similarity(embeddings1: Vectors, embeddings2: Vectors) -> NDArray[np.float32]:
        """Cosine of every row of one with every row of the other, (n1, n2) float32."""
        left, right = (np.atleast_2d(np.asarray(e, dtype=np.float32)) for e in (embeddings1, embeddings2))
        left, right = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (left, right))
        return np.asarray(left @ right.T)

    def selftest(self) -> Selftest:
        """Compare the file's golden texts on this device with what its maker measured.

        Raises `SelftestMissing` for a file without golden texts.
        """
        return selftest(self.encoder)

    def probe_vectors(self) -> NDArray[np.float32]:
        """L2-normalised vectors of the golden texts' token ids, (n_texts, n_embd); NaN for a text without one."""
        return probe_vectors(self.encoder, golden_of(self.header))

    def close(self, *, wait: bool = True) -> None:
        """Free the model's memory, once the batches of other threads are finished. Closing twice does nothing."""
        if self._encoder:
            encoder, self._encoder = self._encoder, None
            encoder.engine.close(wait=wait)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is not KeyboardInterrupt)  # Ctrl-C does not wait for the batch that is under way

    def _with_prompt(self, kind: str, options: EncodeOptions) -> EncodeOptions:
        return options if "prompt" in options else {"prompt_name": self.default_prompt(kind), **options}

    def _prompt_of(self, prompt_name: str | None) -> str:
        if prompt_name is None:
            return ""
        if prompt_name not in self.prompts:
            hint = " Pass the text itself with prompt=... (--prompt)."
            raise UnknownName(f"prompt of {self.header.path}", prompt_name, self.prompts, hint)
        return self.prompts[prompt_name]

    def _require_vectors(self, embeddings: Embeddings) -> Embeddings:
        """`embeddings`, or `NoVector` where a vector is not finite, or zero."""
        vectors = embeddings.vectors
        bad = unusable(vectors)
        if not bad:
            return embeddings
        good = np.delete(np.arange(len(vectors)), bad)
        shown = ", ".join(str(i + 1) for i in bad[:5]) + ", ..." * (len(bad) > 5)
        raise NoVector(
            f"{self.header.path}: {len(bad)} of {len(vectors)} texts (number {shown}) have no finite vector, neither "
            "alone nor in higher precision. Take them out, or use a variant of higher precision.",
            bad,
            Embeddings(vectors[good], embeddings.n_tokens[good], embeddings.truncated[good]),
        )


def _texts_of(sentences: Any) -> list[str]:
    """The texts as a list. Raises `TextError` for what is no string, such as the NaN of an empty cell."""
    texts = [sentences] if isinstance(sentences, str) else list(sentences)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TextError(f"text {i + 1} of {len(texts)}: is no text, but {text!r:.40} of type {kind}. Pass strings.")
    return texts
