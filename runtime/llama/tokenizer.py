"""Text becomes the token ids that the checkpoint was trained on.

llama.cpp splits and merges as the checkpoint's tokenizer does, but it normalises differently: it leaves out Unicode
NFC for byte-level BPE, and its BERT normaliser strips marks (Unicode category Mc) and classifies separators in its own
way. So f2gguf runs the checkpoint's own normaliser first (the `tokenizers` library, from the JSON in the header) and
gives llama.cpp text on which nothing is left to normalise.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from f2gguf.runtime.errors import GGUFError, TextError
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids

Normalize = Callable[[str], str]

MAX_WORD_CHARS = 100  # WordPiece gives [UNK] for longer words; llama.cpp has no such limit
_WORD_START = "\u2581"  # llama.cpp's mark for a token that starts a word
_UNKNOWN = "[UNK]"


class Tokenizer:
    """Token ids of texts. A text that is cut to `max_tokens` keeps its closing special token (EOS or [SEP])."""

    def __init__(self, model: Model, header: Header) -> None:
        self.model = model
        self._n_closing = int(model.closes_texts)
        self._normalize = _normalizer(header, model)
        longest_first = sorted(header.special_tokens, key=len, reverse=True)
        self._specials = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def __call__(self, text: str, *, max_tokens: int | None = None) -> tuple[Ids, bool]:
        """Ids of `text` with special tokens, (n_tokens,) int32, and whether it was cut.

        Raises `TextError` for what is no valid text, or has no token.
        """
        try:
            ids = self.model.tokenize(self.normalize(text))
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
        special = self.model.tokenize("")
        opening, closing = np.split(special, [len(special) - self._n_closing])
        if not np.array_equal(whole[: len(opening)], opening):
            whole = np.concatenate([opening, whole])
        if not np.array_equal(whole[-1:], closing):
            whole = np.concatenate([whole, closing])
        return self._cut(whole, max_tokens)

    def _cut(self, ids: Ids, max_tokens: int | None) -> tuple[Ids, bool]:
        if max_tokens is None or len(ids) <= max_tokens:
            return ids, False
        kept = max_tokens - self._n_closing
        return np.concatenate([ids[:kept], ids[len(ids) - self._n_closing :]]), True

    def normalize(self, text: str) -> str:
        """`text` as the checkpoint's own normaliser leaves it; special tokens in it stay as they are."""
        text.encode("utf-8")  # the normalisers stop at lone surrogates with a less telling error
        if self._normalize is None:
            return text
        parts = self._specials.split(text) if self._specials else [text]
        return "".join(part if i % 2 else self._normalize(part) for i, part in enumerate(parts))


@contextlib.contextmanager
def open_tokenizer(header: Header) -> Iterator[Tokenizer]:
    """The tokenizer of a file; only its vocabulary is loaded."""
    with Model(header.path, device="cpu", vocab_only=True, overrides=load_overrides(header)) as model:
        yield Tokenizer(model, header)


def normalizer_spec(header: Header) -> dict[str, Any] | None:
    """The checkpoint's normaliser, as its tokenizer.json states it; None where there is none."""
    return json.loads(header.normalizer) if header.normalizer else None  # `read_header` has checked it


def load_overrides(header: Header) -> dict[str, bool]:
    """Header values to replace while loading, so that llama.cpp leaves alone what f2gguf has normalised."""
    spec = normalizer_spec(header)
    if not spec or spec["type"] != "BertNormalizer":
        return {}
    return {f"tokenizer.ggml.normalizer.{step}": False for step in ("lowercase", "strip_accents")}


def _normalizer(header: Header, model: Model) -> Normalize | None:
    spec = normalizer_spec(header)
    if spec is None:
        return None
    builders = {"NFC": _nfc, "BertNormalizer": _bert}
    if spec["type"] not in builders:
        raise GGUFError(f"{header.path}: needs the normaliser {spec['type']}, unknown to this f2gguf; update it.")
    return builders[spec["type"]]({key: value for key, value in spec.items() if key != "type"}, model)


def _nfc(_options: dict[str, Any], _model: Model) -> Normalize:
    from tokenizers.normalizers import NFC

    normalize_str = NFC().normalize_str
    return lambda text: text if text.isascii() else normalize_str(text)


def _bert(options: dict[str, Any], model: Model) -> Normalize:
    """BERT's cleaning, then its split into words and punctuation, which llama.cpp would do a little differently.

    A word with a character that no token has is unknown as a whole. It is replaced here: llama.cpp, whose Unicode
    tables are newer, could take the character for punctuation and split the word.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    try:
        normalize_str = BertNormalizer(**options).normalize_str
    except TypeError as error:
        raise GGUFError(f"{model.path}, its text normaliser: {error}. Download or make it again.") from error
    split = BertPreTokenizer().pre_tokenize_str
    known = set().union(*(text.removeprefix(_WORD_START) for text in model.token_texts()))

    def normalize(text: str) -> str:
        words = (word for word, _ in split(normalize_str(text)))
        return " ".join(word if len(word) <= MAX_WORD_CHARS and known.issuperset(word) else _UNKNOWN for word in words)

    return normalize
