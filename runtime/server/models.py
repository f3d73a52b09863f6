"""The models of a server: a name becomes a model, a request's texts become vectors, whatever the dialect."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, InitVar, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.embedder import Embedder, space_of
from f2gguf.runtime.errors import Closed, FileWarning, TextError, UnknownDims, WrongUsage
from f2gguf.runtime.files import sha256_file, sha256_text
from f2gguf.runtime.gguf.golden import has_golden
from f2gguf.runtime.gguf.header import DOCUMENT_PROMPTS
from f2gguf.runtime.hub.models import open_header
from f2gguf.runtime.llama.encoder import Tokens
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.runner import Rows, unusable
from f2gguf.runtime.llama.tokenizer import Input
from f2gguf.runtime.precision import SCALED, require_precision
from f2gguf.runtime.selftest import SelftestInParts
from f2gguf.runtime.server.answers import Answer, Job, Refused
from f2gguf.runtime.server.batching import Batcher, Compute, QueueFull, Schedule
from f2gguf.runtime.server.metrics import Metrics

# What checkpoints call the prompts of the two kinds of texts, the usual name first. Every model knows both kinds; where
# it has no such prompt, texts stay as they are.
KINDS = {"query": ("query", "search_query"), "document": DOCUMENT_PROMPTS}
# What clients call the kinds: NVIDIA says passage, Cohere search_query, search_document, classification and clustering
WORDS = {word: kind for kind, words in KINDS.items() for word in words}
WORDS |= {"classification": "document", "clustering": "document"}
_SEND_TEXTS = (
    "Send texts. LangChain sends tiktoken's ids by default: pass check_embedding_ctx_length=False to OpenAIEmbeddings."
)
log = logging.getLogger("f2gguf.serve")
_BEGIN_S = 1.5  # of a selftest before the first request is answered
_INLINE_CHARS = 1000  # tokenising fewer takes less time than handing them to a thread


@dataclass(frozen=True)
class Limits:
    """What a server allows: who may ask, by which names, for what, how much, and how long it waits."""

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()  # besides loopback names and addresses; lower case
    allow_token_ids: bool = False
    truncate: bool = False  # what counts where a request does not say
    max_body_bytes: int = 16 << 20
    max_texts: int = 2048  # of a request; OpenAI's limit
    max_request_tokens: int = 262_144
    max_waiting_tokens: int = 524_288
    max_requests: int = 512  # in flight
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0


@dataclass(eq=False)
class ServedModel:
    """An open file and its way into the schedule. Tests of failures pass a `compute` of their own."""

    name: str
    embedder: Embedder
    limits: Limits
    all_metrics: InitVar[Metrics]
    schedule: InitVar[Schedule]  # of all models of the server
    _: KW_ONLY
    sha256: str = ""  # of the file
    selftest: str = "not run"  # the state that clients are told
    test: SelftestInParts | None = None
    compute: InitVar[Compute | None] = None

    def __post_init__(self, all_metrics: Metrics, schedule: Schedule, compute: Compute | None) -> None:
        self.encoder = self.embedder.encoder
        self.header = self.embedder.header
        path = self.header.path
        self.warnings = [line.replace(str(path), path.name) for line in self.embedder.file_warnings]
        self.sha256 = self.sha256 or sha256_file(path)
        self._fault = ""  # what the selftest found
        self.metrics = all_metrics.of(self.name)
        engine = self.encoder.engine
        self.batcher = Batcher(
            compute or self.encoder.compute,
            schedule,
            batch_tokens=engine.batch_tokens,
            n_batches=engine.n_batches,
            shares_prompts=engine.shares_prefixes,
            can_pause=not engine.model.offloaded,
            max_waiting_tokens=self.limits.max_waiting_tokens,
            metrics=self.metrics,
        )

    @cached_property
    def fits(self) -> dict[str, Any]:
        """What the file takes, and what it would do on other devices. The first time takes a second or two."""
        from f2gguf.runtime.fit.where import fits

        return fits(self.header, pooling=self.embedder.pooling)

    def finish_selftest(self) -> None:
        """Compare the probes that had no time before the first request. If it fails, the model answers no more."""
        if self.test is None or not self.test.n_left:
            return
        try:
            self.test.finish(self._probe_rows)
        except Closed:  # the server is stopping
            return
        except Exception as error:  # whatever it is, the model was not tested
            log.error("selftest failed", exc_info=error)
            self._fault = "its selftest failed after the first requests: do not use vectors that it gave before. "
            self._fault += "The server's log says what is wrong."
            self.selftest = "failed"
            return
        self.selftest = "passed"
        log.info("%s: selftest passed", self.name)

    def _probe_rows(self, texts: list[Ids]) -> Rows:
        while True:
            try:
                return self.batcher.submit(texts, None, client="selftest").done.result()
            except QueueFull as full:
                time.sleep(full.retry_after_s)

    def _require_sound(self) -> None:
        if self._fault:
            raise Refused("selftest_failed", f"{self.name}: {self._fault}", param="model")

    def fingerprint(self, prompt: str | None = None, dimensions: int | None = None) -> str:
        """'SPACE' or 'SPACE.PROMPT', 16 and 8 hexadecimal digits.

        Vectors compare where SPACE is equal: file, pooling, width, and a closing token that the file does not ask for.
        PROMPT tells queries from documents.
        """
        width = dimensions or self.header.n_embd
        space = space_of(self.sha256, self.embedder.pooling, width, adds_eos=self.embedder.adds_eos)
        return space if prompt is None else f"{space}.{sha256_text(prompt)[:8]}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a response without vectors."""
        return {"X-Embedding-Fingerprint": self.fingerprint()}

    async def embed(self, job: Job, facts: dict[str, Any]) -> Answer:
        """Vectors of a job. Raises `Refused`. Puts into `facts` what the log may hold of it."""
        self._require_sound()
        begin = time.perf_counter()
        facts |= {"model": self.name, "n_texts": len(job.inputs)}
        prompt, width = self._prompt_for(job), self._width(job.dimensions)
        ranges = self._ranges(job, width)
        truncate = self.limits.truncate if job.truncate is None else job.truncate
        tokens = await self.tokenize(job.inputs, prompt, truncate=truncate)
        n_tokens, truncated = int(tokens.lengths.sum()), np.flatnonzero(tokens.truncated).tolist()
        facts |= {"n_tokens": n_tokens, "n_truncated": len(truncated)}
        _require_at_most(self.limits.max_request_tokens, n_tokens, "tokens", "context_length_exceeded")
        self.metrics["tokenize_seconds"].observe(time.perf_counter() - begin)
        try:
            rows = await self.batcher(tokens.ids, tokens.prompt)
        except QueueFull as full:
            wait = {"Retry-After": str(full.retry_after_s)}
            raise Refused("rate_limit_exceeded", f"{self.name}: {full}.", headers=wait) from full
        self._require_sound()
        rows = self.encoder.finish(rows, width=width, normalize=job.normalize)
        if bad := unusable(rows):
            self.metrics["quarantined_texts"].inc(len(bad))
            shown = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
            words = (
                f"{len(bad)} of {len(rows)} texts (input {shown}) have no finite vector. Take them out, or use a "
                "variant of higher precision."
            )
            raise Refused("no_finite_vector", words, param="input")
        self.metrics["tokens"].inc(n_tokens)
        self.metrics["texts"].inc(len(rows))
        self.metrics["truncated_texts"].inc(len(truncated))
        return Answer(rows, n_tokens, truncated, self.fingerprint(prompt, width), ranges)

    async def tokenize(self, inputs: Sequence[Input], prompt: str, *, truncate: bool) -> Tokens:
        """Token ids with the prompt and special tokens; in a thread where that takes a while.

        llama.cpp's tokenizer releases Python's lock. Raises `Refused` for what is no text, or is too long for the model
        and may not be cut.
        """
        if not inputs:
            raise Refused("empty_input", "no input: give at least one text.")
        _require_at_most(self.limits.max_texts, len(inputs), "texts", "too_many_inputs")
        if sum(map(len, inputs)) <= _INLINE_CHARS:
            return self._tokenize(inputs, prompt, truncate)
        return await asyncio.to_thread(self._tokenize, inputs, prompt, truncate)

    def prompt(self, name: str | None) -> str:
        """The text of a prompt by its name, or by a client's word for its kind.

        None means that of documents, or else the model's default one.
        """
        if name is None:
            return self.header.document_prompt
        prompts = self.header.prompts
        if name in prompts:
            return prompts[name]
        if name not in WORDS:
            known = ", ".join(dict.fromkeys([*prompts, *WORDS]))
            words = f"{self.name} has no prompt of this name. Known: {known}."
            raise Refused("invalid_value", words, param="prompt_name")
        return next((prompts[own] for own in KINDS[WORDS[name]] if own in prompts), "")

    def _prompt_for(self, job: Job) -> str:
        """The prompt of a job. Token ids have none, because prompt and text must be tokenised as one string."""
        if all(isinstance(one, str) for one in job.inputs):
            return self.prompt(job.prompt_name)
        if not self.limits.allow_token_ids:
            words = (
                "token ids are refused, because those of another tokenizer give wrong vectors without an error. "
                f"{_SEND_TEXTS} For ids of this model's own tokenizer, start f2gguf serve with --allow-token-ids."
            )
            raise Refused("invalid_value", words, param="input")
        if job.prompt_name is None:
            return ""
        words = f"the {job.prompt_name} prompt goes before texts, not token ids."
        raise Refused("invalid_value", words, param="input")

    def _width(self, dimensions: int | None) -> int:
        try:
            return self.header.require_width(dimensions or self.embedder.truncate_dim)
        except UnknownDims as error:
            trained = ", ".join(map(str, self.header.dims))
            words = f"{dimensions} dimensions: {self.name} was trained for {trained}."
            raise Refused("invalid_value", words, param="dimensions") from error

    def _ranges(self, job: Job, width: int) -> Rows | None:
        is_normalized = self.header.is_normalized if job.normalize is None else job.normalize
        for kind in SCALED:
            if kind in job.types:
                try:
                    return require_precision(kind, self.header, width, is_normalized=is_normalized)
                except WrongUsage as error:
                    why = f"{kind}: {self.name} states no ranges for it, or its vectors are not normalised."
                    words = f"{why} Ask for float, binary or ubinary."
                    raise Refused("invalid_value", words, param="encoding_format") from error
        return None

    def _tokenize(self, inputs: Sequence[Input], prompt: str, truncate: bool) -> Tokens:
        try:
            tokens = self.encoder.tokenize(inputs, prompt, label="input {index}")
        except TextError as error:
            are_ids = not all(isinstance(one, str) for one in inputs)
            words = f"{error} Ids must be of this model's own tokenizer. {_SEND_TEXTS}" if are_ids else str(error)
            raise Refused("invalid_value", words, param="input") from error
        if tokens.truncated.any() and not truncate:
            which, limit = tokens.truncated.argmax(), f"{self.embedder.max_seq_length:,} tokens"
            words = (
                f"input {which} is longer than {limit}. Shorten it, pass truncate: true, or start f2gguf serve with "
                "--truncate."
            )
            raise Refused("context_length_exceeded", words, param="input")
        return tokens


Models = Mapping[str, ServedModel]  # by name; a request that names none means the first


def open_model(
    model: str | Path,
    name: str,
    limits: Limits,
    metrics: Metrics,
    schedule: Schedule,
    *,
    selftest: bool = False,
    **options: Any,
) -> ServedModel:
    """Load a file, and begin its selftest where it has golden vectors; `selftest` refuses a file without them.

    `options` are those of `Embedder`. It raises the errors, and `SelftestMissing` and `SelftestFailed`.
    """
    header = open_header(model)
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        sha256 = pool.submit(sha256_file, header.path)  # a large file takes a while
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FileWarning)  # they go to the log
            embedder = Embedder(header.path, **options)
        for line in embedder.file_warnings:
            log.warning("%s", line)
        test, state = None, "file has no golden vectors"
        if selftest or has_golden(header):
            test = SelftestInParts(embedder.encoder)
            test.begin(_BEGIN_S)
            n_passed = test.n_texts - test.n_left
            state = f"{n_passed} of {test.n_texts} texts passed, the others run" if test.n_left else "passed"
        return ServedModel(name, embedder, limits, metrics, schedule, sha256=sha256.result(), selftest=state, test=test)


def stated_name(models: Models, name: str | None) -> str:
    """The name of a model in a request; where there is none, that of the only model. Raises `Refused` for several."""
    if name is None and len(models) > 1:
        words = f"model: this server has several, so name one: {', '.join(models)}."
        raise Refused("invalid_value", words, param="model")
    return next(iter(models)) if name is None else name


def find_model(models: Models, name: str | None, prompt_name: str | None = None) -> tuple[ServedModel, str | None]:
    """The model called `name`, and the name of the prompt, in which the model's name may end: 'nano:query'.

    ':latest', which Ollama's clients write, means nothing. Raises `Refused`.
    """
    if name is None:
        return next(iter(models.values())), prompt_name
    if model := models.get(name):
        return model, prompt_name
    base, _, suffix = name.rpartition(":")
    model = models.get(base)
    if model is None or suffix not in {"latest", *WORDS, *model.header.prompts}:
        shown = name if len(name) <= 80 else name[:77] + "..."
        words = f"model {shown!r} not found. Here are: {', '.join(models)}; each may end in ':query' or ':document'."
        raise Refused("model_not_found", words, param="model")
    if suffix == "latest":
        return model, prompt_name
    if prompt_name is not None and model.prompt(prompt_name) != model.prompt(suffix):
        raise Refused("invalid_value", f"the model's name says {suffix}, the request {prompt_name}.", param="model")
    return model, suffix


def _require_at_most(limit: int, n: int, unit: str, code: str) -> None:
    if n > limit:
        raise Refused(code, f"{n:,} {unit}: a request may have {limit:,}.")
