"""Workloads of `f2gguf bench`: texts of known lengths made of the model's own words, or the user's texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import GGUFError, UnknownName, WrongUsage
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.tokenizer import open_tokenizer
from f2gguf.runtime.tables import read_texts
from numpy.typing import NDArray

Tokenize = Callable[[str], NDArray[np.int32]]


class Kind(NamedTuple):
    """Texts of `fewest` to `most` tokens, special tokens included, behind a prompt; `n_texts` for each of --texts."""

    fewest: int
    most: int
    prompt_name: str
    n_texts: int


KINDS = {"documents": Kind(8, 256, "document", 1), "queries": Kind(4, 16, "query", 4)}
INPUT = "input"  # the texts of --input, as documents
_WORD = re.compile("[Ġ▁][a-z]{2,}")  # a token that starts a word: 'Ġ' in byte-level BPE, U+2581 in the other tokenizers
_N_WORDS = 4096  # as many of the vocabulary's first words, which are its most frequent
_FEWEST_WORDS = 100


@dataclass(frozen=True)
class Workload:
    """Different texts without their prompt. The tokens are the model's, prompt and special tokens included."""

    name: str
    texts: tuple[str, ...]
    prompt: str
    n_tokens: int
    longest: int


def require_work(work: str, *, has_input: bool) -> list[str]:
    """'documents,queries' -> the names of the workloads, with the user's own where there is an --input."""
    names = list(dict.fromkeys(name.strip() for name in work.split(",")))
    for name in names:
        if name not in (*KINDS, INPUT):
            raise UnknownName("workload", name, (*KINDS, INPUT), " Name them with --work, commas between them.")
    if INPUT in names and not has_input:
        raise WrongUsage("--work input: name its texts with --input FILE.")
    return names if INPUT in names or not has_input else [*names, INPUT]


def make_workloads(
    header: Header, names: Sequence[str], *, n_texts: int, seed: int, input_path: str | None, column: str
) -> list[Workload]:
    """The workloads called `names`, the same ones for the same `seed`."""
    own = _read_input(input_path, column) if input_path is not None else []
    workloads = []
    with open_tokenizer(header) as tokenizer:

        def tokenize(text: str) -> NDArray[np.int32]:
            return tokenizer(text)[0]

        for name in names:
            prompt = header.prompts.get(KINDS[name].prompt_name if name in KINDS else "document", "")
            most = header.max_tokens - (len(tokenize(prompt)) if prompt else 0)
            if name == INPUT:
                texts = _fitting(own, tokenize, most)
            else:
                n_made = n_texts * KINDS[name].n_texts
                texts = _made(KINDS[name], _words(tokenizer.model, tokenize), tokenize, most, n_texts=n_made, seed=seed)
            lengths = [len(tokenize(prompt + text)) for text in texts]
            workloads.append(Workload(name, texts, prompt, sum(lengths), max(lengths)))
    return workloads


def _made(
    kind: Kind, words: Sequence[str], tokenize: Tokenize, most: int, *, n_texts: int, seed: int
) -> tuple[str, ...]:
    """`n_texts` different texts of uniformly distributed lengths."""
    rng = np.random.default_rng(seed)
    most = max(min(kind.most, most), kind.fewest)
    texts: dict[str, None] = {}
    while len(texts) < n_texts:
        n_tokens = int(rng.integers(kind.fewest, most + 1))
        chosen = [words[i] for i in rng.integers(len(words), size=n_tokens)]
        while len(tokenize(" ".join(chosen))) > n_tokens:
            chosen.pop()
        texts[" ".join(chosen)] = None
    return tuple(texts)


def _words(model: Model, tokenize: Tokenize) -> list[str]:
    """Words that are one token at the start of a text and behind a space."""
    candidates = [text[1:] for text in model.token_texts() if _WORD.fullmatch(text)][:_N_WORDS]
    lengths = [len(tokenize(f"{word} {word}")) for word in candidates]
    fewest = min(lengths, default=0)
    words = [word for word, n in zip(candidates, lengths, strict=True) if n == fewest]
    if len(words) < _FEWEST_WORDS:
        raise GGUFError(
            f"{model.path}: its vocabulary holds {len(words)} whole words of ASCII letters, too few to make texts of. "
            "Give texts of your own: --work input --input FILE."
        )
    return words


def _read_input(path: str, column: str) -> tuple[str, ...]:
    texts = tuple(text for text in read_texts(path, column=column).texts if text.strip())
    if not texts:
        raise WrongUsage(f"{path}: holds no text (--input).")
    return texts


def _fitting(texts: Sequence[str], tokenize: Tokenize, most: int) -> tuple[str, ...]:
    """Texts cut at the model's limit, each once: sides cut in ways of their own, and f2gguf embeds equal texts once."""
    cut = [_cut(text, tokenize, most) for text in texts]
    different = {tokenize(text).tobytes(): text for text in cut}
    n_cut = sum(len(short) < len(text) for short, text in zip(cut, texts, strict=True))
    for n, what in (
        (n_cut, f"are longer than {most} tokens: the bench cuts them"),
        (len(texts) - len(different), "have the tokens of another one: the bench leaves them out"),
    ):
        if n:
            say(f"input: {n} of {len(texts)} texts {what}")
    return tuple(different.values())


def _cut(text: str, tokenize: Tokenize, most: int) -> str:
    while (n_tokens := len(tokenize(text))) > most:
        text = text[: len(text) * most // n_tokens]
    return text
