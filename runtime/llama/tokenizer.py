"""Text becomes the token ids that the checkpoint was trained on.

A file of f2gguf carries the checkpoint's own tokenizer, and the library `tokenizers` runs it, as it does for
transformers. A file from elsewhere is split by llama.cpp.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from f2gguf.runtime.errors import GGUFError, TextError
from f2gguf.runtime.gguf.header import KEY_ADD_EOS, Header
from f2gguf.runtime.llama.carried import carried_tokenizer, encode, encode_all
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids

Input = str | Sequence[int]  # a text, or the ids of its tokens

_AT_ONCE = 256  # texts that are split together: on 2 cores MiniLM's and f2llm-nano's take 0.4 of the time so
_KEY_OF_OLD_FILES = "f2gguf.tokenizer.normalizer"


class Tokenizer:
    """Token ids of texts. A text that is cut to `max_tokens` keeps its closing special token (EOS or [SEP]).

    `carried` is what `own_tokenizer` gives of the same header.
    """

    def __init__(self, model: Model, carried: Any) -> None:
        self.model = model
        self._carried = carried
        special, n_closing = model.tokenize(""), int(model.closes_texts)
        self.opening, self.closing = np.split(special, [len(special) - n_closing])

    def each(self, inputs: Sequence[Input], *, max_tokens: int | None = None) -> Iterator[tuple[Ids, bool]]:
        """What `__call__` gives of texts and `complete` of ids, one after the other."""
        for begin in range(0, len(inputs), _AT_ONCE):
            some = inputs[begin : begin + _AT_ONCE]
            split: Iterator[list[int] | None] = itertools.repeat(None)
            if self._carried is not None and len(some) > 1:
                split = iter(encode_all(self._carried, [it for it in some if isinstance(it, str)]))
            for it in some:
                if isinstance(it, str):
                    yield self(it, max_tokens=max_tokens, split=next(split))
                else:
                    yield self.complete(it, max_tokens=max_tokens)

    def __call__(self, text: str, *, max_tokens: int | None = None, split: list[int] | None = None) -> tuple[Ids, bool]:
        """Ids of `text` with special tokens, (n_tokens,) int32, and whether it was cut.

        `split` are its ids without them, where they are known. Raises `TextError` for what is no valid text, or has no
        token.
        """
        try:
            ids = self._ids(text, split)
        except UnicodeEncodeError as error:
            raise TextError(
                f"character {error.start + 1} is a lone surrogate ({text[error.start]!r}), which no text can hold. "
                "Decode the source as UTF-8 with errors='replace'."
            ) from error
        if not len(ids):
            raise TextError("the text is empty, and this model has no special token that could stand for it.")
        return self._cut(ids, max_tokens)

    def complete(self, ids: Sequence[int], *, max_tokens: int | None = None) -> tuple[Ids, bool]:
        """Ids from another tokenizer, with the special tokens that they lack, and whether they were cut.

        Raises `TextError` for no ids, or one that is not in the vocabulary.
        """
        if not ids:
            raise TextError("the list of token ids is empty.")
        n_vocab = self.model.n_vocab
        if wrong := [token for token in ids if not 0 <= token < n_vocab]:
            raise TextError(f"there is no token {wrong[0]}: this model has {n_vocab:,}, from 0.")
        whole = np.array(ids, dtype=np.int32)
        if not np.array_equal(whole[: len(self.opening)], self.opening):
            whole = np.concatenate([self.opening, whole])
        if not np.array_equal(whole[-1:], self.closing):
            whole = np.concatenate([whole, self.closing])
        return self._cut(whole, max_tokens)

    def _ids(self, text: str, split: list[int] | None) -> Ids:
        if self._carried is None:
            return self.model.tokenize(text)
        if split is None:
            text.encode("utf-8")  # the library stops at lone surrogates with a less telling error
            split = encode(self._carried, text)
        return np.concatenate([self.opening, np.array(split, dtype=np.int32), self.closing])

    def _cut(self, ids: Ids, max_tokens: int | None) -> tuple[Ids, bool]:
        if max_tokens is None or len(ids) <= max_tokens:
            return ids, False
        kept = max_tokens - len(self.closing)
        return np.concatenate([ids[:kept], ids[len(ids) - len(self.closing) :]]), True


@contextlib.contextmanager
def open_tokenizer(header: Header) -> Iterator[Tokenizer]:
    """The tokenizer of a file; only its vocabulary is loaded."""
    with Model(header.path, device="cpu", vocab_only=True, overrides=load_overrides(header)) as model:
        yield Tokenizer(model, own_tokenizer(header))


def load_overrides(header: Header) -> dict[str, bool]:
    """Header values to replace while loading: the closing token, which a header may ask for where its file does not."""
    return {KEY_ADD_EOS: True} if header.values.get(KEY_ADD_EOS) else {}


def own_tokenizer(header: Header) -> Any:
    """The checkpoint's tokenizer that a file of f2gguf carries, a `tokenizers.Tokenizer`; None for other files.

    Raises `GGUFError` where it does not hold together, or is that of an earlier f2gguf.
    """
    if header.tokenizer is not None:
        return carried_tokenizer(header)
    if _KEY_OF_OLD_FILES in header.values:
        raise GGUFError(
            f"{header.path}: an earlier f2gguf made it, which did not carry the checkpoint's whole tokenizer. "
            "Make it again with `quantize all`."
        )
    return None
