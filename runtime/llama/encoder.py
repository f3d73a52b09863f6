"""The one way from texts to vectors, step by step: prompt, token ids, computing, width and length, unusable rows.

`Embedder`, the server, the selftest and all measurements take these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from f2gguf.runtime.errors import TextError
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.context import ComputeSettings, Pause, Watch
from f2gguf.runtime.llama.engine import Engine
from f2gguf.runtime.llama.packing import Ids, shared_length, unique
from f2gguf.runtime.llama.runner import Rows
from f2gguf.runtime.llama.tokenizer import Input, Tokenizer, own_tokenizer
from numpy.typing import NDArray


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts as the model sees them, prompt and special tokens included."""

    ids: list[Ids]
    truncated: NDArray[np.bool_]  # (n_texts,) whether the text was longer
    prompt: Ids | None  # ids of the prompt that was put before all texts

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens, (n_texts,)."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)


def add_prompt(text: str, prompt: str) -> str:
    """`text` behind `prompt`, which is not doubled where the text begins with it already."""
    return text if text.startswith(prompt) else prompt + text


def normalized(rows: Rows) -> Rows:
    """Rows of length 1, NaN for zeros. The sum of squares is float64: large finite rows have a length too."""
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    with np.errstate(invalid="ignore"):
        return np.asarray(rows / norms[:, None], dtype=np.float32)


class Encoder:
    """An open .gguf file: its engine and its tokenizer. Many threads may share one."""

    def __init__(self, header: Header, settings: ComputeSettings, *, watch: Watch | None = None) -> None:
        self.header = header
        self.settings = settings
        with ThreadPoolExecutor(1, thread_name_prefix="f2gguf tokenizer") as pool:
            own = pool.submit(
                own_tokenizer, header
            )  # while llama.cpp loads the file: both take a second for 150,000 tokens
            self.engine = Engine(header, settings, watch=watch)
            self.own_tokenizer = own.result()  # a `tokenizers.Tokenizer`, or None
            self._tokenizer = Tokenizer(self.engine.model, self.own_tokenizer)
        self.special_ids = self._tokenizer.opening, self._tokenizer.closing  # before and behind every text
        self._kept_prompts: dict[str, Ids] = {}

    def tokenize(
        self,
        inputs: Sequence[Input],
        prompt: str = "",
        *,
        max_tokens: int | None = None,
        label: str = "text {number} of {total}",
    ) -> Tokens:
        """Ids of texts behind `prompt`, cut to `max_tokens` [that of the settings]; special tokens are added to ids.

        Raises `TextError` for an input that is no text; `label` names it, by its {number} or {index}.
        """
        most = max_tokens or self.settings.max_tokens
        ids: list[Ids] = []
        truncated = np.zeros(len(inputs), dtype=np.bool_)
        prompted = [add_prompt(it, prompt) if isinstance(it, str) else it for it in inputs]
        results = self._tokenizer.each(prompted, max_tokens=most)
        for i in range(len(inputs)):
            try:
                tokens, truncated[i] = next(results)
            except TextError as error:
                name = label.format(index=i, number=i + 1, total=len(inputs))
                raise TextError(f"{name}: {error}") from error
            ids.append(tokens)
        return Tokens(ids, truncated, self._prompt_ids(prompt) if prompt else None)

    def pieces(self, ids: Ids) -> list[tuple[int, str, bool]]:
        """Each token with its text, and whether it is a special one."""
        model = self.engine.model
        return [(i, model.piece(i).decode(errors="replace"), model.is_special(i)) for i in ids.tolist()]

    def compute(
        self,
        texts: Sequence[Ids],
        prompt: Ids | None = None,
        *,
        on_progress: Callable[[int], None] | None = None,
        pause: Pause | None = None,
    ) -> Rows:
        """Raw vectors of token ids, (n_texts, n_embd), NaN rows for texts that have no finite one.

        Equal texts are computed once, and so are the ids that all begin with: of their `prompt`, where they have one.
        `on_progress` is told how many texts a batch has finished. `pause` is called a few times in each layer, in the
        thread that computes; it must raise nothing, and may compute other texts, without a `pause`.
        """
        different, index = unique(texts)
        counts = np.bincount(index, minlength=len(different))
        return self.engine.embed(
            different,
            n_shared=shared_length(different if prompt is None else [*different, prompt]),
            on_batch=lambda batch: on_progress(int(counts[batch].sum())) if on_progress else None,
            pause=pause,
        )[index]

    def finish(self, rows: Rows, *, width: int, normalize: bool | None = None) -> Rows:
        """The leading `width` numbers of raw vectors, of length 1 if `normalize`, or if None and the file says so."""
        rows = np.ascontiguousarray(rows[:, :width])
        is_normalized = self.header.is_normalized if normalize is None else normalize
        return normalized(rows) if is_normalized else rows

    def _prompt_ids(self, prompt: str) -> Ids:
        """Ids of a prompt. Those of the file's own prompts are kept, because a server needs them for every request."""
        ids = self._kept_prompts.get(prompt)
        if ids is None:
            ids, _ = self._tokenizer(prompt, max_tokens=self.settings.max_tokens)
            if prompt in self.header.prompts.values():
                self._kept_prompts[prompt] = ids
        return ids
