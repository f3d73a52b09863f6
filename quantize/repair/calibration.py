"""The texts that recipes are chosen with. No evaluation text is among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.texts import EvalText, claimed_texts, load_texts, prompted
from f2gguf.quantize.repair.corpus import MIN_TEXTS, Corpus, sample_corpus
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.llama.encoder import Encoder
from f2gguf.runtime.llama.packing import Ids

PATH = Path(__file__).with_name("calibration.jsonl")
MAX_TOKENS = 64  # of a text: more of them take most of the time, and the long texts stand for what is longer
LONG_TOKENS = 256  # of a long text
N_SPLICED = 2  # texts that are made of each text that chooses
HELD_OUT = 5  # every fifth text judges what the others have chosen
_MEAN_TOKENS = 60  # of a shipped text, its share of the long ones included
N_PRODUCTS = 6e12  # weights times tokens: some minutes on two cores
_N_NUMBERS = 2.2e8  # tokens times columns of the widest matrix: 0.9 GB, and there are about seven such arrays at a time
_ROWS_A_COLUMN = 2  # least tokens for each column of the widest matrix
_FEWEST_WORDS = 4  # of a text that is halved between words; others are between characters
_SEED = 0
_DOCUMENTS_A_LONG_TEXT, _LONG_CHARS = 8, 2000


@dataclass(frozen=True)
class Calibration:
    """The texts that recipes are chosen with, and the corpus that some of them are of."""

    texts: tuple[EvalText, ...]
    corpus: Corpus | None = None


def load_calibration(path: Path | None, languages: Sequence[str], column: str | None = None) -> Calibration:
    """f2gguf's own texts in the model's `languages`, and those that `sample_corpus` takes of the file `path`.

    `column` is the key of the text there. Raises `WrongUsage` for a column without a file.
    """
    own = claimed_texts(load_texts(PATH), languages)
    if path is None:
        if column is not None:
            raise WrongUsage("--column names the text in a --calibration file, and there is none.")
        return Calibration(own)
    corpus = sample_corpus(path, column=column)
    return Calibration((*own, *corpus.texts), corpus)


def layer_shapes(tensors: Iterable[tuple[str, Any]]) -> list[tuple[int, int]]:
    """Rows and columns of the matrices of all layers; `tensors` are names and what has a shape."""
    return [tensor.shape for name, tensor in tensors if len(tensor.shape) == 2 and name.startswith("blk.")]


def token_budget(shapes: Sequence[tuple[int, int]]) -> float:
    """How many tokens a model of these `layer_shapes` runs through in minutes and a few GB, or its widest needs."""
    n_weights, widest = sum(map(math.prod, shapes)), max((n_cols for _, n_cols in shapes), default=1)
    return max(min(N_PRODUCTS / max(n_weights, 1), _N_NUMBERS / widest), _ROWS_A_COLUMN * widest)


def sampled(texts: Sequence[EvalText], budget: float) -> tuple[EvalText, ...]:
    """Evenly spread texts of about `budget` tokens."""
    return tuple(texts[:: math.ceil(len(texts) / max(MIN_TEXTS, budget / _MEAN_TOKENS))])


def fitting(texts: Sequence[EvalText]) -> list[EvalText]:
    """The texts that scales and codes are chosen with, with long ones made of them."""
    return _with_long([text for i, text in enumerate(texts) if i % HELD_OUT])


def judging(texts: Sequence[EvalText]) -> list[EvalText]:
    """The other texts, which candidates are measured on, with long ones made of them."""
    return _with_long(texts[::HELD_OUT])


def spliced(texts: Sequence[EvalText], budget: float) -> list[EvalText]:
    """More texts that codes are chosen with: half of one and half of another, and long ones made of them.

    Any text will do there, as the 16-bit file says what it is to give. There are N_SPLICED for each of `fitting`, or as
    many as the `budget` of tokens takes.
    """
    texts, generator = [text for i, text in enumerate(texts) if i % HELD_OUT], np.random.default_rng(_SEED)
    by_language: dict[str, list[EvalText]] = {}
    for text in texts:
        by_language.setdefault(text.language, []).append(text)

    def half(text: str) -> str:
        blank = " " if len(text.split(" ")) >= _FEWEST_WORDS else ""
        units = text.split(" ") if blank else list(text)
        n = -(-len(units) // 2)
        first = int(generator.integers(len(units) - n + 1))
        return blank.join(units[first : first + n])

    made = []
    for number in range(min(N_SPLICED, int(budget / (_MEAN_TOKENS * len(texts))) - 1)):
        some = []
        for text in texts:
            others = by_language[text.language]
            other = others[int(generator.integers(len(others)))]
            some.append(replace(text, id=f"{text.id}-{number}", text=f"{half(text.text)} {half(other.text)}"))
        made += _with_long(some)
    return made


def token_ids(encoder: Encoder, texts: Sequence[EvalText]) -> list[Ids]:
    """Token ids of calibration texts behind their prompts, cut."""
    prompts, limit = encoder.header.prompts, encoder.header.max_tokens
    return [encoder.tokenize([prompted(text, prompts)], max_tokens=most_tokens(text, limit)).ids[0] for text in texts]


def most_tokens(text: EvalText, limit: int) -> int:
    """How many tokens of a calibration text are kept, for a model that takes `limit`."""
    return min(LONG_TOKENS if text.kind == "long" else MAX_TOKENS, limit)


def _with_long(texts: Sequence[EvalText]) -> list[EvalText]:
    """The texts, and long ones: one for every eight documents of a language, of these and those that follow.

    Later positions excite other channels. Of the texts that judge, MiniLM's Q4_0 drifts 3.19% on long ones and 0.87% on
    average if all that choose codes are cut at 64 tokens, 0.84% and 0.75% with the long ones
    (scripts/choose-constants F16.gguf --only LONG_TOKENS).
    """
    documents: dict[str, list[EvalText]] = {}
    for text in texts:
        if text.kind == "document":
            documents.setdefault(text.language, []).append(text)
    long = []
    for language, some in documents.items():
        for first in range(0, len(some) if len(some) > 2 else 0, _DOCUMENTS_A_LONG_TEXT):
            joined = " ".join(text.text for text in some[first:] + some[:first])[:_LONG_CHARS]
            long.append(EvalText(f"{some[first].id}-long", "long", language, joined))
    return [*texts, *long]
