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
from f2gguf.runtime.tables.texts import read_texts
from numpy.typing import NDArray

Tokenize = Callable[[str], NDArray[np.int32]]


class Kind(NamedTuple):
    """Texts of `fewest` to `most` tokens, special tokens included. There are `n_texts` for each of --texts."""

    fewest: int
    most: int
    prompt_name: str
    n_texts: int


KINDS = {"documents": Kind(8, 256, "document", 1), "queries": Kind(4, 16, "query", 4)}
INPUT = "input"  # the texts of --input, as documents
_WORD = re.compile("[Ġ▁][a-z]{2,}")  # a token that starts a word: 'Ġ' in byte-level BPE, U+2581 in the other tokenizers
_N_WORDS = 4096  # the first words of the vocabulary, which are its most frequent
_FEWEST_WORDS = 100


@dataclass(frozen=True)
class Workload:
    """Different texts without their prompt. Tokens are counted with prompt and special tokens."""

    name: str
    texts: tuple[str, ...]
    prompt: str
    n_tokens: int
    longest: int


def require_work(work: str, *, has_input: bool) -> list[str]:
    """'documents,queries' -> the names of the workloads. --input adds the user's own."""
    names = list(dict.fromkeys(name.strip() for name in work.split(",")))
    for name in names:
        if name not in (*KINDS, INPUT):
            raise UnknownName("workload", name, (*KINDS, INPUT), " Name them with --work, commas between them.")
    if INPUT in names and not has_input:
        raise WrongUsage("--work input: name its texts with --input FILE.")
    return names if INPUT in names or not has_input else [*names, INPUT]


def make_workloads(
    header: Header, names: Sequence[str], *, n_texts: int, seed: int, input_path: str | None, column: str | None
) -> list[Workload]:
    """The workloads called `names`. The same `seed` gives the same texts."""
    own: tuple[str, ...] = ()
    if input_path is not None:
        own = tuple(text for text in read_texts(input_path, column=column).texts if text.strip())
        if not own:
            raise WrongUsage(f"{input_path}: holds no text (--input).")
    workloads = []
    with open_tokenizer(header) as tokenizer:

        def tokenize(text: str) -> NDArray[np.int32]:
            return tokenizer(text)[0]

        for name in names:
            kind = KINDS.get(name)
            prompt = header.prompts.get(kind.prompt_name if kind else "document", "")
            most = header.max_tokens - (len(tokenize(prompt)) if prompt else 0)
            if kind:
                kind = kind._replace(most=max(min(kind.most, most), kind.fewest), n_texts=n_texts * kind.n_texts)
                texts = _made(kind, _words(tokenizer.model, tokenize), tokenize, seed)
            else:
                texts = _fitting(own, tokenize, most)
            lengths = [len(tokenize(prompt + text)) for text in texts]
            workloads.append(Workload(name, texts, prompt, sum(lengths), max(lengths)))
    return workloads


def _made(kind: Kind, words: Sequence[str], tokenize: Tokenize, seed: int) -> tuple[str, ...]:
    """`kind.n_texts` different texts of uniformly distributed lengths."""
    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    while len(texts) < kind.n_texts:
        n_tokens = int(rng.integers(kind.fewest, kind.most + 1))
        chosen = [words[i] for i in rng.integers(len(words), size=n_tokens)]
        while len(tokenize(" ".join(chosen))) > n_tokens:
            chosen.pop()
        texts[" ".join(chosen)] = None
    return tuple(texts)


def _words(model: Model, tokenize: Tokenize) -> list[str]:
    """Words that are one token at the start of a text and behind a space."""
    candidates = [text[1:] for text in model.token_texts() if _WORD.fullmatch(text)][:_N_WORDS]
    lengths = [len(tokenize(f"{word} {word}")) for word in candidates]
    words = [word for word, n in zip(candidates, lengths, strict=True) if n == min(lengths)]
    if len(words) < _FEWEST_WORDS:
        few = f"its vocabulary holds {len(words)} whole words of ASCII letters, too few to make texts of"
        raise GGUFError(f"{model.path}: {few}. Give texts of your own: --work input --input FILE.")
    return words


def _fitting(texts: Sequence[str], tokenize: Tokenize, most: int) -> tuple[str, ...]:
    """Texts cut at the model's limit, since each side cuts in its own way; each once, since f2gguf embeds it once."""
    cut = [_cut(text, tokenize, most) for text in texts]
    different = {tokenize(text).tobytes(): text for text in cut}
    if n_cut := sum(len(short) < len(text) for short, text in zip(cut, texts, strict=True)):
        say(f"input: {n_cut} of {len(texts)} texts are longer than {most} tokens: the bench cuts them")
    if n_equal := len(texts) - len(different):
        say(f"input: {n_equal} of {len(texts)} texts have the tokens of another one: the bench leaves them out")
    return tuple(different.values())


def _cut(text: str, tokenize: Tokenize, most: int) -> str:
    while (n_tokens := len(tokenize(text))) > most:
        text = text[: len(text) * most // n_tokens]
    return text
