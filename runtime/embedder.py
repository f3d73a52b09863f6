"""`Embedder`: texts become vectors. Names and behaviour are those of sentence-transformers."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from f2gguf.runtime import calls
from f2gguf.runtime import similarity as cosines
from f2gguf.runtime.calls import Texts, Vectors, texts_of
from f2gguf.runtime.errors import (
    Closed,
    F2ggufError,
    FileWarning,
    NoVector,
    TextError,
    TruncationWarning,
    UnknownName,
    WrongUsage,
)
from f2gguf.runtime.files import sha256_file, sha256_text
from f2gguf.runtime.gguf.doctor import warnings_of
from f2gguf.runtime.gguf.golden import golden_of
from f2gguf.runtime.gguf.header import KEY_ADD_EOS, Header
from f2gguf.runtime.hub.models import name_elsewhere, open_header
from f2gguf.runtime.llama.context import ComputeSettings, Watch
from f2gguf.runtime.llama.encoder import Encoder
from f2gguf.runtime.llama.library import device_in_use
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.runner import unusable
from f2gguf.runtime.llama.threads import require_threads
from f2gguf.runtime.pool import Pool, require_pool
from f2gguf.runtime.precision import quantized, require_precision
from f2gguf.runtime.selftest import Selftest, probe_vectors, selftest
from numpy.typing import NDArray

log = logging.getLogger("f2gguf")


def space_of(sha256: str, pooling: str, width: int, *, adds_eos: bool) -> str:
    """`Embedder.fingerprint` of a file whose hash is known."""
    return sha256_text(f"{sha256} {pooling} {width}{' add_eos' * adds_eos}")[:16]


@dataclass(frozen=True)
class Embeddings:
    """Vectors of texts, the number of tokens of each text, and whether it was cut."""

    vectors: Vectors  # (n_texts, n_dims)
    n_tokens: NDArray[np.int64]  # (n_texts,) that the model saw, special tokens and prompt included
    truncated: NDArray[np.bool_]  # (n_texts,) whether the text was longer than that


class EncodeOptions(TypedDict, total=False):
    """What `encode_query` and `encode_document` pass on to `encode`, besides the prompt."""

    sentences: Texts | None
    batch_size: int
    show_progress_bar: bool | None
    output_value: str | None
    precision: str | None
    convert_to_numpy: bool
    convert_to_tensor: bool
    device: Any
    normalize_embeddings: bool | None
    truncate_dim: int | None
    pool: Pool | None
    chunk_size: int | None
    on_progress: Callable[[int], None] | None


class Embedder:
    """An embedding model from a .gguf file, or from `org/name[:VARIANT][@revision]` on the Hugging Face Hub.

    >>> model = Embedder("dist/f2llm-nano/f2llm-nano-Q8_0.gguf")
    >>> queries = model.encode_query(["how do I compress a folder?"])     # (1, 256) float32, L2-normalised
    >>> documents = model.encode_document(["tar is an archiving program"])
    >>> model.similarity(queries, documents)                              # (1, 1)

    The file's header states everything that the Embedder must know. Where a file from elsewhere does not, `pooling`,
    `max_tokens` and `add_eos` (a closing token behind every text) do. What may be wrong with such a file is warned of
    (`FileWarning`, and `file_warnings`). `n_threads` is the number of physical cores by default, and `n_gpu_layers` is
    all layers (-1). With `deterministic` every text is a batch of its own, so that a quantised file gives a text the
    same bytes whatever else is embedded. With `selftest` the file's golden texts are embedded first, and must give what
    its maker measured. `watch` receives tensors of llama.cpp's graph.

    Many threads may share one Embedder. A copy, and what another process gets by pickle, opens the file again, with the
    same options. A fork of a process that has used an Embedder cannot use it: `Forked`.

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
        add_eos: bool = False,
        truncate_dim: int | None = None,
        deterministic: bool = False,
        selftest: bool = False,
        watch: Watch | None = None,
    ) -> None:
        header = open_header(path)
        self.adds_eos = add_eos and not header.values.get(KEY_ADD_EOS)  # which the file itself does not ask for
        self.header: Header = header.closing() if self.adds_eos else header
        self.prompts = self.header.prompts
        self.default_prompt_name = self.header.default_prompt  # of the prompt for `encode` without one
        self.pooling = self.header.require_pooling(pooling)
        self.file_warnings = warnings_of(self.header, self.pooling)
        self.header.require_width(truncate_dim)
        self.truncate_dim = truncate_dim
        self.max_seq_length = max_tokens
        self._opened: dict[str, Any] = {
            "path": name_elsewhere(path, self.header.path),
            "device": device,
            "n_gpu_layers": n_gpu_layers,
            "n_threads": n_threads,
            "pooling": pooling,
            "add_eos": add_eos,
            "deterministic": deterministic,
            "selftest": selftest,
            "watch": watch,
        }
        for line in self.file_warnings:
            warnings.warn(line, FileWarning, stacklevel=2)
        settings = ComputeSettings(
            device, n_gpu_layers, require_threads(n_threads), self.pooling, self.max_seq_length, deterministic
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
        """The single steps of `embed`, for callers that batch by other rules. Raises `Closed`, or `Forked`."""
        if self._encoder is None:
            raise Closed(f"{self.header.path}: this Embedder was closed; open the file again.")
        self._encoder.engine.require_here()
        return self._encoder

    @property
    def device(self) -> str:
        """Where the vectors are computed, as torch calls it: 'cpu', 'cuda' or 'mps'."""
        return device_in_use(offloaded=bool(self.encoder.engine.model.offloaded))

    @property
    def max_seq_length(self) -> int:
        """Longest input in tokens, special tokens included. It can be set; None sets what the header says."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, max_tokens: int | None) -> None:
        self._max_seq_length = self.header.require_max_tokens(max_tokens)

    def get_max_seq_length(self) -> int:
        """`max_seq_length`."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Width of the vectors that `encode` gives."""
        return self.truncate_dim or self.header.n_embd

    def get_sentence_embedding_dimension(self) -> int:
        """`get_embedding_dimension`, by its name before sentence-transformers 6."""
        return self.get_embedding_dimension()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer, a `tokenizers.Tokenizer` without special tokens at the ends of a text.

        Raises `WrongUsage` for a file that f2gguf did not make, which carries none.
        """
        if (own := self.encoder.own_tokenizer) is None:
            raise WrongUsage(f"{self.header.path}: carries no tokenizer of its own. Use tokenize(text).")
        return own

    def tokenize(self, text: str) -> Ids:
        """Token ids of one text without prompt, special tokens included, cut to the maximum length, (n_tokens,)."""
        if not isinstance(text, str):
            raise TextError(f"tokenize takes one text, and this is {calls.described(text)}.")
        return self.encoder.tokenize([text], max_tokens=self.max_seq_length).ids[0]

    def encode(  # the order and the defaults are sentence-transformers'
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool | None = False,
        truncate_dim: int | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        *,
        sentences: Texts | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Vectors:
        """Vectors of texts as a `SentenceTransformer` gives them: (n_texts, n_dims), or (n_dims,) for a single string.

        `inputs` (`sentences` before sentence-transformers 6) is a string, or strings in a list, tuple, generator, numpy
        array or column of a table.

        `prompt_name`, `prompt`: as in `embed`. Without them, the texts get the prompt of `default_prompt_name`, if any.
        `batch_size`: has no effect, because batches are packed by their tokens.
        `show_progress_bar`: True draws a bar on stderr. None and False draw none.
        `precision`: float32, float16, int8, uint8, binary or ubinary, as sentence-transformers defines them. Ranges of
        int8 and uint8 stand in the file, so that a vector does not depend on its batch. A file without them has none.
        `convert_to_tensor`: True gives one torch tensor, on the CPU. `convert_to_numpy=False` gives a list of them.
        `device`: may name the device that is in use. Another one is an error. A list, such as `["cpu"] * 4`, computes
        in as many processes, which share the threads.
        `normalize_embeddings`: True gives vectors of length 1. False gives what the model's own modules give, which is
        of length 1 as well for most models. (`embed(..., normalize=False)` gives the length before that.)
        `truncate_dim`: the number of leading dimensions to keep. They get the length 1 where the whole vectors have it.
        `pool`: processes that `start_multi_process_pool` started. They take `chunk_size` texts at a time.
        `output_value`: only the default, since there are no vectors of tokens.
        `on_progress`: a function that receives the number of texts that a batch finished.

        Raises what `embed` does, `WrongUsage` for arguments that cannot work, and `ExtraMissing` for tensors without
        torch.
        """
        calls.require_call(batch_size=batch_size, output_value=output_value)
        require_pool(pool, of=self._source, chunk_size=chunk_size)
        has_tensors = convert_to_tensor or not convert_to_numpy
        if has_tensors:
            calls.require_torch()
        inputs = sentences if inputs is None else inputs
        texts = texts_of(inputs)
        with contextlib.ExitStack() as stack:
            if pool is None and isinstance(device, list):
                pool = stack.enter_context(contextlib.closing(self.start_multi_process_pool(device)))
            elif pool is None:
                calls.require_device(device, self.device)
            if show_progress_bar:
                on_progress = stack.enter_context(calls.progress_bar(len(texts), on_progress))
            vectors = self._embed(
                texts,
                prompt_name=prompt_name,
                prompt=prompt,
                normalize=True if normalize_embeddings else None,
                truncate_dim=truncate_dim,
                precision=precision or "float32",
                on_progress=on_progress,
                compute=self.compute if pool is None else functools.partial(_compute_in, pool, chunk_size),
            ).vectors
        if has_tensors:
            vectors = calls.as_tensors(vectors, one=convert_to_tensor)
        return vectors[0] if isinstance(inputs, str) else vectors

    def encode_query(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *more: Any,
        **options: Unpack[EncodeOptions],
    ) -> Vectors:
        """`encode` with the model's query prompt, where it has one and no other is given."""
        prompt = self.prompts.get("query", "") if prompt_name is None and prompt is None else prompt
        return self.encode(inputs, prompt_name, prompt, *more, **options)

    def encode_document(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *more: Any,
        **options: Unpack[EncodeOptions],
    ) -> Vectors:
        """`encode` with the model's document prompt, where it has one and no other is given."""
        prompt = self.prompts.get("document", "") if prompt_name is None and prompt is None else prompt
        return self.encode(inputs, prompt_name, prompt, *more, **options)

    def embed(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        on_progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Vectors of texts, with the number of tokens of each and whether it was cut.

        `prompt` (or the prompt called `prompt_name`) is put before every text that does not begin with it. `normalize`
        says whether vectors have the length 1, or with False the length that the pooling left; None is what the header
        says. `truncate_dim` keeps the leading dimensions and normalises again; it must be one of the model's Matryoshka
        widths. `precision` is float32, float16, int8, uint8, binary or ubinary, as in `encode`. `on_progress` receives
        the number of texts that a batch finished. Texts over the maximum length are cut but keep their EOS, with one
        `TruncationWarning`. Raises `TextError` for what is no valid text, `NoVector` (which carries all other vectors)
        for texts without a finite vector, `UnknownName` for an unknown prompt, `UnknownDims` for a width that was not
        trained, and `WrongUsage` for int8 vectors of a file without ranges.
        """
        return self._embed(
            texts_of(inputs),
            prompt_name=prompt_name,
            prompt=prompt,
            normalize=normalize,
            truncate_dim=truncate_dim,
            precision=precision,
            on_progress=on_progress,
            compute=self.compute,
        )

    def _embed(
        self,
        texts: list[str],
        *,
        prompt_name: str | None,
        prompt: str | None,
        normalize: bool | None,
        truncate_dim: int | None,
        precision: str,
        on_progress: Callable[[int], None] | None,
        compute: Callable[..., Embeddings],
    ) -> Embeddings:
        """`embed`, by this process or by those of a pool."""
        width = self.header.require_width(self.truncate_dim if truncate_dim is None else truncate_dim)
        is_normalized = self.header.is_normalized if normalize is None else normalize
        ranges = require_precision(precision, self.header, width, is_normalized=is_normalized)
        prompt = self.prompt_of(prompt_name, prompt)
        options = {"prompt": prompt, "width": width, "max_tokens": self.max_seq_length, "normalize": normalize}
        made = compute(texts, **options, on_progress=on_progress)
        self.warn_of_cuts(made.truncated)
        try:
            made = self.require_vectors(made)
        except NoVector as error:
            rest = error.embeddings
            error.embeddings = replace(rest, vectors=quantized(rest.vectors, precision, ranges))
            raise
        return replace(made, vectors=quantized(made.vectors, precision, ranges))

    def compute(
        self,
        texts: Sequence[str],
        *,
        prompt: str,
        width: int,
        max_tokens: int,
        normalize: bool | None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Embeddings:
        """Vectors of texts behind `prompt`, NaN for a text that has no finite one. `embed` and pools call it."""
        encoder = self.encoder
        tokens = encoder.tokenize(texts, prompt, max_tokens=max_tokens)
        rows = encoder.compute(tokens.ids, tokens.prompt, on_progress=on_progress)
        vectors = encoder.finish(rows, width=width, normalize=normalize)
        return Embeddings(vectors, tokens.lengths, tokens.truncated)

    def start_multi_process_pool(self, target_devices: Sequence[Any] | None = None) -> Pool:
        """Start a process for each device, such as `["cpu"] * 4`, which is the default, for `encode(pool=...)`.

        All must name the device that is in use. Raises `WrongUsage` for another one.
        """
        devices = (["cpu"] * 4 if self.device == "cpu" else [self.device]) if target_devices is None else target_devices
        if not devices:
            raise WrongUsage("device is an empty list: name one for each process, such as ['cpu', 'cpu'].")
        for device in devices:
            calls.require_device(device, self.device)
        state = self.__getstate__()
        n_threads = max(1, self.encoder.settings.n_threads // len(devices))
        state["opening"] |= {"n_threads": n_threads, "selftest": False}
        return Pool(functools.partial(_reopened, type(self), state), len(devices), of=self._source)

    @property
    def _source(self) -> object:
        """Equal for models that give the same vectors."""
        return self._opened["path"], self.pooling, self.adds_eos

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """End the processes of a pool."""
        require_pool(pool)
        pool.close()

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Inside the block, `encode` gives vectors of that width; None is the full one."""
        self.header.require_width(truncate_dim)
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    similarity_fn_name = "cosine"
    similarity = staticmethod(cosines.similarity)
    similarity_pairwise = staticmethod(cosines.similarity_pairwise)

    def selftest(self) -> Selftest:
        """Compare the file's golden texts on this device with what its maker measured.

        Raises `SelftestMissing` for a file without golden texts.
        """
        return selftest(self.encoder)

    def probe_vectors(self) -> NDArray[np.float32]:
        """L2-normalised vectors of the golden texts' token ids, (n_texts, n_embd); NaN for a text without one."""
        return probe_vectors(self.encoder, golden_of(self.header))

    def fingerprint(self, truncate_dim: int | None = None) -> str:
        """16 hexadecimal digits, equal for vectors that compare: those of one file, pooling, width and closing token.

        The first call reads the whole file; later ones, in any process, remember its hash.
        """
        width = self.header.require_width(self.truncate_dim if truncate_dim is None else truncate_dim)
        return space_of(sha256_file(self.header.path), self.pooling, width, adds_eos=self.adds_eos)

    @property
    def opening(self) -> dict[str, Any]:
        """The arguments that open the same file in the same way, in any process. Raises `WrongUsage` for a watch."""
        if self._opened["watch"]:
            raise WrongUsage("an Embedder with watch=... cannot be copied or pickled: open the file again without it.")
        return {**self._opened, "max_tokens": self.max_seq_length, "truncate_dim": self.truncate_dim}

    def close(self, *, wait: bool = True) -> None:
        """Free the model's memory, once the batches of other threads are finished. Closing twice does nothing."""
        if self._encoder:
            encoder, self._encoder = self._encoder, None
            encoder.engine.close(wait=wait)

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is not KeyboardInterrupt)  # Ctrl-C does not wait for the batch that is under way

    def __getstate__(self) -> dict[str, Any]:
        """What opens the same file in the same way: in a copy, or where a pickle arrives."""
        if self._encoder is None:
            raise Closed(f"{self.header.path}: this Embedder was closed, and cannot be copied or pickled.")
        return {"opening": self.opening, "prompts": dict(self.prompts), "default_prompt_name": self.default_prompt_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Embedder.__init__(self, **state.pop("opening"))
        vars(self).update(state)

    def warn_of_cuts(self, truncated: NDArray[np.bool_]) -> None:
        """Say once that texts were cut."""
        if truncated.any() and not self._warned:
            self._warned = True
            words = f"{truncated.sum()} of {len(truncated)} texts are longer than {self.max_seq_length} tokens"
            warnings.warn(f"{words} and were cut", TruncationWarning, stacklevel=4)

    def prompt_of(self, prompt_name: str | None, prompt: str | None) -> str:
        """The text to put before every input: `prompt`, else the prompt of that name, else the default one."""
        for given in (prompt, prompt_name):
            if not isinstance(given, str | None):
                raise TextError(f"a prompt and its name are texts, and this is {calls.described(given)}.")
        if prompt is not None:
            if prompt_name is not None:
                log.warning("prompt and prompt_name are given: prompt_name (%r) is ignored", prompt_name)
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            hint = " Pass the text itself with prompt=... (--prompt)."
            raise UnknownName(f"prompt of {self.header.path}", name, self.prompts, hint)
        return self.prompts[name]

    def require_vectors(self, embeddings: Embeddings) -> Embeddings:
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


def _reopened(kind: type[Embedder], state: dict[str, Any]) -> Callable[..., Embeddings]:
    """`Embedder.compute` of another process's Embedder, opened here."""
    model = kind.__new__(kind)
    model.__setstate__(state)
    return model.compute


def _compute_in(pool: Pool, chunk_size: int | None, texts: Sequence[str], **options: Any) -> Embeddings:
    """`Embedder.compute` by the processes of a pool."""
    parts = pool.map(texts, chunk_size=chunk_size, **options)
    return Embeddings(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))
