"""The checkpoint's own tokenizer, as a file of f2gguf carries it.

llama.cpp's arrays hold the vocabulary and the merges. All else (normaliser, split pattern, added tokens with their
flags, options of the model) is JSON under one key of the header. Together they are the tokenizer that transformers
runs, by the same library, `tokenizers`. llama.cpp's own tokenizer differs: it has no NFC, other Unicode tables, no
limit of 100 letters a word, and added tokens without flags.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from f2gguf.runtime.errors import GGUFError, TextError
from f2gguf.runtime.gguf.header import Header

_WORD_START = "\u2581"  # llama.cpp writes WordPiece's "##ing" as "ing" and "play" as "▁play"
_LONG = 1 << 14  # characters, from which on other threads go on meanwhile: about 10 ms


def carried_json(tokenizer: Any) -> str:
    """What the header must hold of a `tokenizers.Tokenizer` besides its tokens and merges."""
    spec = json.loads(tokenizer.to_str())
    ids = spec["model"].pop("vocab").values()
    spec["model"].pop("merges", None)
    kept = {key: spec[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return json.dumps({**kept, "ids": _ranges(ids), "split_special_tokens": tokenizer.encode_special_tokens})


def gguf_text(token: str, kind: str) -> str:
    """How llama.cpp spells a token of the model `kind`."""
    if kind != "WordPiece":
        return token
    return token[2:] if token.startswith("##") else _WORD_START + token


def _checkpoint_text(token: str, kind: str) -> str:
    if kind != "WordPiece":
        return token
    return token[1:] if token.startswith(_WORD_START) else "##" + token


def carried_tokenizer(header: Header) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises `GGUFError` where it does not hold together."""
    from tokenizers import AddedToken, Tokenizer

    spec = json.loads(header.tokenizer or "")  # `read_header` has checked its shape
    added = {token.pop("id"): token for token in spec["added_tokens"]}
    frame = {key: spec[key] for key in ("normalizer", "pre_tokenizer")}
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    try:
        tokenizer = Tokenizer.from_str(
            json.dumps({"version": "1.0", **unused, **frame, "added_tokens": [], "model": empty})
        )
        tokenizer.model = _model(header, spec, {i: token["content"] for i, token in added.items()})
        tokenizer.add_tokens([AddedToken(**added[i]) for i in sorted(added)])
    except BaseException as error:
        raise_unless_rust(error)
        again = "Download or make it again, or update f2gguf and tokenizers."
        raise GGUFError(f"{header.path}: its tokenizer does not work: {error}. {again}") from error
    tokenizer.encode_special_tokens = spec["split_special_tokens"]
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without the special tokens around it. Raises `TextError` where the library gives up."""
    try:
        if len(text) < _LONG:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
        return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)  # releases Python's lock
    except BaseException as error:
        raise_unless_rust(error)
        raise TextError(f"the library tokenizers gives up on it ({error}). Cut it, or leave it out.") from error


def raise_unless_rust(error: BaseException) -> None:
    """Raise `error` again unless the library `tokenizers` made it: bare Exceptions, and panics, which are none."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _model(header: Header, spec: dict[str, Any], added: dict[int, str]) -> Any:
    from tokenizers import models

    options = {key: value for key, value in spec["model"].items() if value is not None}
    kind = options.pop("type")
    tokens = header.strings("tokenizer.ggml.tokens")
    ids = [i for first, last in spec["ids"] for i in range(first, min(last, len(tokens)) + 1)]
    vocab = {added[i] if i in added else _checkpoint_text(tokens[i], kind): i for i in ids}
    if kind == "WordPiece":
        return models.WordPiece(vocab, **options)
    merges = (merge.partition(" ") for merge in header.strings("tokenizer.ggml.merges"))
    return models.BPE(vocab, [(left, right) for left, _, right in merges], **options)


def _ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 7] -> [(0, 2), (7, 7)]"""
    values = np.sort(np.fromiter(ids, dtype=np.int64))
    if not len(values):
        return []
    breaks = np.flatnonzero(np.diff(values) > 1)
    return [*zip(values[[0, *(breaks + 1)]].tolist(), values[[*breaks, -1]].tolist(), strict=True)]
