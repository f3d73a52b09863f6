"""The models of a server: names become models, a request's texts become vectors, whatever the dialect."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import TextError, UnknownDims
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf.golden import has_golden
from f2gguf.runtime.hub.models import open_header
from f2gguf.runtime.llama.encoder import Input, Tokens
from f2gguf.runtime.llama.engine import Rows, unusable
from f2gguf.runtime.server.answers import Answer, Asked, Refused
from f2gguf.runtime.server.batching import Batcher, Compute, QueueFull
from f2gguf.runtime.server.metrics import Metrics

KINDS = ("query", "document")  # known for every model; without such a prompt, the texts go in as they are
_INLINE_CHARS = 1000  # shorter requests are tokenised in less time than a thread takes to be asked


@dataclass(frozen=True)
class Limits:
    """What a server allows: who may ask, how much, and how long it waits."""

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    max_texts: int = 2048  # of a request; OpenAI's limit
    max_request_tokens: int = 262_144
    max_waiting_tokens: int = 524_288
    max_requests: int = 512  # in flight
    body_timeout_s: float = 30.0
    # 32 queries of a dozen tokens and their shared prompt take one step; a newcomer waits for one step at most
    step_tokens: int = 1024


class ServedModel:
    """An open file and its queue. `compute` stands in for the model's own in tests of what may go wrong."""

    def __init__(
        self,
        name: str,
        embedder: Embedder,
        limits: Limits,
        metrics: Metrics,
        *,
        selftest: str = "not run",
        compute: Compute | None = None,
    ) -> None:
        self.name = name
        self.embedder = embedder
        self.encoder = embedder.encoder
        self.header = embedder.header
        self.limits = limits
        self.selftest = selftest
        self.sha256 = sha256_file(embedder.header.path)  # now: of a large file it takes a while
        self.metrics = metrics.of(name)
        self.batcher = Batcher(
            compute or self.encoder.compute,
            step_tokens=limits.step_tokens,
            max_waiting_tokens=limits.max_waiting_tokens,
            metrics=self.metrics,
        )

    def fingerprint(self, prompt: str | None = None, dimensions: int | None = None) -> str:
        """'SPACE' or 'SPACE.PROMPT', 16 and 8 hexadecimal digits.

        Vectors compare where SPACE is equal: file, pooling and width. PROMPT tells those of queries from documents'.
        """
        width = dimensions or self.header.n_embd
        space = _digest(f"{self.sha256} {self.embedder.pooling} {width}")[:16]
        return space if prompt is None else f"{space}.{_digest(prompt)[:8]}"

    async def embed(self, asked: Asked, facts: dict[str, Any]) -> Answer:
        """Vectors of what is asked for, or `Refused`; what may be logged of it goes into `facts`."""
        begin = time.perf_counter()
        facts |= {"model": self.name, "n_texts": len(asked.inputs)}
        prompt = self._prompt_for(asked)
        width = self._width(asked.dimensions)
        tokens = await self.tokenize(asked.inputs, prompt, truncate=asked.truncate)
        n_tokens, truncated = int(tokens.lengths.sum()), np.flatnonzero(tokens.truncated).tolist()
        facts |= {"n_tokens": n_tokens, "n_truncated": len(truncated)}
        if n_tokens > self.limits.max_request_tokens:
            raise Refused("too_long", f"{n_tokens:,} tokens: a request may have {self.limits.max_request_tokens:,}.")
        self.metrics["tokenize_seconds"].observe(time.perf_counter() - begin)
        rows = self.encoder.finish(await self._queued(tokens), width=width, normalize=asked.normalize)
        self._require_vectors(rows)
        self.metrics["tokens"].inc(n_tokens)
        self.metrics["texts"].inc(len(rows))
        self.metrics["truncated"].inc(len(truncated))
        return Answer(rows, n_tokens, truncated, self.fingerprint(prompt, width))

    async def tokenize(self, inputs: Sequence[Input], prompt: str, *, truncate: bool) -> Tokens:
        """Token ids with the prompt and special tokens; in a thread where that takes a while.

        llama.cpp's tokenizer lets go of Python's lock. Raises `Refused` for what is no text, or too long to be kept.
        """
        if not inputs:
            raise Refused("empty", "no input: give at least one text.")
        if len(inputs) > self.limits.max_texts:
            raise Refused("too_many_texts", f"{len(inputs):,} texts: a request may have {self.limits.max_texts:,}.")
        if sum(map(len, inputs)) <= _INLINE_CHARS:
            return self._tokenize(inputs, prompt, truncate)
        return await asyncio.to_thread(self._tokenize, inputs, prompt, truncate)

    def prompt(self, name: str | None) -> str:
        """The text of a prompt by its name."""
        prompts = self.header.prompts
        name = "document" if name is None else name
        if name not in prompts and name not in KINDS:
            known = ", ".join(dict.fromkeys([*prompts, *KINDS]))
            raise Refused("invalid", f"{self.name} has no prompt of this name. Known: {known}.", param="prompt_name")
        return prompts.get(name, "")

    def close(self) -> None:
        self.embedder.close()

    def _prompt_for(self, asked: Asked) -> str:
        """The prompt of a request: token ids have none, since a prompt and its text are split as one."""
        if all(isinstance(given, str) for given in asked.inputs):
            return self.prompt(asked.prompt_name)
        if asked.prompt_name is None:
            return ""
        raise Refused("invalid", f"the {asked.prompt_name} prompt goes before texts, not token ids.", param="input")

    def _width(self, dimensions: int | None) -> int:
        if dimensions is None:
            return self.embedder.get_sentence_embedding_dimension()
        try:
            return self.header.require_width(dimensions)
        except UnknownDims as error:
            trained = ", ".join(map(str, self.header.dims))
            words = f"{dimensions} dimensions: {self.name} was trained for {trained}."
            raise Refused("invalid", words, param="dimensions") from error

    def _tokenize(self, inputs: Sequence[Input], prompt: str, truncate: bool) -> Tokens:
        try:
            tokens = self.encoder.tokenize(inputs, prompt, label="input {index}")
        except TextError as error:
            raise Refused("invalid", str(error), param="input") from error
        if tokens.truncated.any() and not truncate:
            which, limit = tokens.truncated.argmax(), f"{self.embedder.max_seq_length:,} tokens"
            words = f"input {which} is longer than {limit}. Shorten it, or pass truncate: true."
            raise Refused("too_long", words, param="input")
        return tokens

    async def _queued(self, tokens: Tokens) -> Rows:
        try:
            return await self.batcher(tokens.ids, tokens.prompt)
        except QueueFull as full:
            wait = {"Retry-After": str(full.retry_after_s)}
            raise Refused("overloaded", f"{self.name}: {full}.", headers=wait) from full

    def _require_vectors(self, rows: Rows) -> None:
        bad = unusable(rows)
        if not bad:
            return
        self.metrics["quarantined"].inc(len(bad))
        shown = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
        raise Refused(
            "no_vector",
            f"{len(bad)} of {len(rows)} texts (input {shown}) have no finite vector. Take them out, or use a variant "
            "of higher precision.",
            param="input",
        )


def open_model(
    model: str | Path, name: str, limits: Limits, metrics: Metrics, *, selftest: bool = False, **options: Any
) -> ServedModel:
    """Load a file, and compare it with what its maker measured where the file says that; `selftest` insists on it.

    Raises what `Embedder` does, `options` are its own.
    """
    header = open_header(model)
    tested = selftest or has_golden(header)
    embedder = Embedder(header.path, selftest=tested, **options)
    return ServedModel(name, embedder, limits, metrics, selftest="passed" if tested else "file has no golden vectors")


class Models:
    """The models of a server by name. The first is meant where a request names none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.by_name: Mapping[str, ServedModel] = {model.name: model for model in models}

    def find(self, name: str | None, prompt_name: str | None = None) -> tuple[ServedModel, str | None]:
        """The model called `name` (None: the first), and the prompt, which the name may end in: 'nano:query'.

        ':latest', which Ollama's clients write, means nothing. Raises `Refused`.
        """
        if name is None:
            return next(iter(self.by_name.values())), prompt_name
        if model := self.by_name.get(name):
            return model, prompt_name
        base, _, suffix = name.rpartition(":")
        model = self.by_name.get(base)
        if model is None or suffix not in {"latest", *KINDS, *model.header.prompts}:
            raise Refused("unknown_model", _unknown(name, self.by_name), param="model")
        if suffix == "latest":
            return model, prompt_name
        if prompt_name not in (None, suffix):
            raise Refused("invalid", f"the model's name says {suffix}, the request {prompt_name}.", param="model")
        return model, suffix


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    shown = name if len(name) <= 80 else name[:77] + "..."
    return f"model {shown!r} not found. Here are: {', '.join(known)}; each may end in ':query' or ':document'."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
