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
from f2gguf.runtime.embedder import Embedder, compute
from f2gguf.runtime.errors import TextError
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf.golden import has_golden
from f2gguf.runtime.hub.models import open_header
from f2gguf.runtime.llama.engine import Rows, is_usable, normalized
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.server.answers import Answer, Asked, Input, Refused
from f2gguf.runtime.server.batching import Batcher, Compute, QueueFull
from f2gguf.runtime.server.metrics import Metrics

KINDS = ("query", "document")  # known for every model; without such a prompt, the texts go in as they are
_INLINE_CHARS = 1000  # shorter requests are tokenised in less time than a thread takes to be asked


@dataclass(frozen=True)
class Settings:
    """How a server behaves: limits, keys, and who may ask."""

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


@dataclass(frozen=True)
class Tokens:
    """Token ids of a request's texts."""

    ids: list[Ids]
    truncated: list[int]  # indices
    prompt: Ids | None


class ServedModel:
    """An open file and its queue. `compute` stands in for the model's own in tests of what may go wrong."""

    def __init__(
        self,
        name: str,
        embedder: Embedder,
        settings: Settings,
        metrics: Metrics,
        *,
        selftest: str = "not run",
        compute: Compute | None = None,
    ) -> None:
        self.name = name
        self.embedder = embedder
        self.header = embedder.header
        self.settings = settings
        self.selftest = selftest
        self.sha256 = sha256_file(embedder.header.path)  # now: of a large file it takes a while
        self.metrics = metrics.of(name)
        self.batcher = Batcher(
            compute or self._compute,
            step_tokens=settings.step_tokens,
            max_waiting_tokens=settings.max_waiting_tokens,
            metrics=self.metrics,
        )
        self._prompt_ids = {
            text: embedder.parts[1](text)[0] if text else None for text in ["", *self.header.prompts.values()]
        }

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
        n_tokens = sum(map(len, tokens.ids))
        facts |= {"n_tokens": n_tokens, "n_truncated": len(tokens.truncated)}
        if n_tokens > self.settings.max_request_tokens:
            raise Refused("too_long", f"{n_tokens:,} tokens: a request may have {self.settings.max_request_tokens:,}.")
        self.metrics["tokenize_seconds"].observe(time.perf_counter() - begin)
        rows = self._require_vectors((await self._queued(tokens))[:, :width])
        if self.header.is_normalized if asked.normalize is None else asked.normalize:
            rows = normalized(rows)
        self.metrics["tokens"].inc(n_tokens)
        self.metrics["texts"].inc(len(rows))
        self.metrics["truncated"].inc(len(tokens.truncated))
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        return Answer(rows, n_tokens, tokens.truncated, self.fingerprint(prompt, width))

    async def tokenize(self, inputs: Sequence[Input], prompt: str, *, truncate: bool) -> Tokens:
        """Token ids with the prompt and special tokens; in a thread where that takes a while.

        llama.cpp's tokenizer lets go of Python's lock. Raises `Refused` for what is no text, or too long to be kept.
        """
        if not inputs:
            raise Refused("empty", "no input: give at least one text.")
        if len(inputs) > self.settings.max_texts:
            raise Refused("too_many_texts", f"{len(inputs):,} texts: a request may have {self.settings.max_texts:,}.")
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

    def _compute(self, texts: list[Ids], prompt: Ids | None) -> Rows:
        return compute(self.embedder.parts[0], texts, prompt)

    def _width(self, dimensions: int | None) -> int:
        trained = self.header.dims
        if dimensions is None:
            return self.embedder.get_sentence_embedding_dimension()
        if dimensions not in (*trained, self.header.n_embd):
            words = f"{dimensions} dimensions: {self.name} was trained for {', '.join(map(str, trained))}."
            raise Refused("invalid", words, param="dimensions")
        return dimensions

    def _tokenize(self, inputs: Sequence[Input], prompt: str, truncate: bool) -> Tokens:
        _, tokenizer = self.embedder.parts
        ids, truncated = [], []
        for i, given in enumerate(inputs):
            try:
                if isinstance(given, str):
                    tokens, is_cut = tokenizer(given if given.startswith(prompt) else prompt + given)
                else:
                    tokens, is_cut = tokenizer.complete(given)
            except TextError as error:
                raise Refused("invalid", f"input {i}: {error}", param="input") from error
            if is_cut and not truncate:
                limit = f"{self.embedder.max_seq_length:,} tokens"
                raise Refused(
                    "too_long", f"input {i} is longer than {limit}. Shorten it, or pass truncate: true.", param="input"
                )
            ids.append(tokens)
            truncated += [i] * is_cut
        return Tokens(ids, truncated, self._prompt_ids[prompt])

    async def _queued(self, tokens: Tokens) -> Rows:
        try:
            return await self.batcher(tokens.ids, tokens.prompt)
        except QueueFull as full:
            wait = {"Retry-After": str(full.retry_after_s)}
            raise Refused("overloaded", f"{self.name}: {full}.", headers=wait) from full

    def _require_vectors(self, rows: Rows) -> Rows:
        bad = np.flatnonzero(~is_usable(rows))
        if not len(bad):
            return rows
        self.metrics["quarantined"].inc(len(bad))
        shown = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
        raise Refused(
            "no_vector",
            f"{len(bad)} of {len(rows)} texts (input {shown}) have no finite vector. Take them out, or use a variant "
            "of higher precision.",
            param="input",
        )


def open_model(
    model: str | Path, name: str, settings: Settings, metrics: Metrics, *, selftest: bool = False, **options: Any
) -> ServedModel:
    """Load a file, and compare it with what its maker measured where the file says that; `selftest` insists on it.

    Raises what `Embedder` does, `options` are its own.
    """
    header = open_header(model)
    tested = selftest or has_golden(header)
    embedder = Embedder(header.path, selftest=tested, **options)
    return ServedModel(name, embedder, settings, metrics, selftest="passed" if tested else "file has no golden vectors")


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
