"""The checkpoint's own tokenizer, as a file of f2gguf carries it.

llama.cpp's arrays hold the vocabulary, and its merges or its scores and charsmap. All else (normaliser, split pattern,
added tokens with their flags, options of the model) is JSON under one key of the header. Together they are the
tokenizer that transformers runs, by the same library, `tokenizers`. llama.cpp's own tokenizer differs: it has no NFC,
other Unicode tables, no limit of 100 letters a word, and added tokens without flags. Its Unigram takes the longest key
of a charsmap at every byte, where `tokenizers` takes the shortest one of a grapheme.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from f2gguf.runtime.errors import GGUFError, TextError
from f2gguf.runtime.gguf.header import KEY_SCORE_STEPS, Header
from f2gguf.runtime.gguf.vocabulary import KEY_CHARSMAP, KEY_SCORES, Vocabulary
from numpy.typing import NDArray

_WORD_START = "\u2581"  # llama.cpp writes WordPiece's "##ing" as "ing" and "play" as "▁play"
_LONG = 1 << 14  # characters, from which on other threads go on meanwhile: about 10 ms


def carried_json(tokenizer: Any) -> str:
    """What the header must hold of a `tokenizers.Tokenizer` besides llama.cpp's arrays."""
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"].pop("vocab")
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    spec["model"].pop("merges", None)
    for step in charsmap_steps(spec["normalizer"]):
        step["precompiled_charsmap"] = None
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


def steps_of(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: those that a Sequence has under `name`, else itself; {} for none."""
    part = part or {}
    return list(part[name]) if part.get("type") == "Sequence" else [part]


def charsmap_steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser, as tokenizer.json states it, that have a charsmap of SentencePiece's."""
    steps = steps_of(normalizer, "normalizers")
    nested = [step for step in steps if step.get("type") == "Sequence"]
    found = [step for step in steps if step.get("type") == "Precompiled"]
    return found + [step for sequence in nested for step in charsmap_steps(sequence)]


def score_steps(scores: Sequence[float]) -> NDArray[np.int64]:
    """Steps of float64 from llama.cpp's float32 scores to these: mostly 0, as SentencePiece has float32 too.

    The JSON of `tokenizers` is a step or two off, which decides between ways to split a text that are equally good.
    """
    exact = np.array(scores, dtype=np.float64)
    return exact.view(np.int64) - exact.astype(np.float32).astype(np.float64).view(np.int64)


def carried_tokenizer(header: Header) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises `GGUFError` where it does not hold together."""
    from tokenizers import AddedToken, Tokenizer

    spec = json.loads(header.tokenizer or "")  # `read_header` has checked its shape
    added = {token.pop("id"): token for token in spec["added_tokens"]}
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    try:
        for step in charsmap_steps(spec["normalizer"]):
            step["precompiled_charsmap"] = base64.b64encode(
                _numbers(header, KEY_CHARSMAP).astype(np.uint8).tobytes()
            ).decode()
        frame = {key: spec[key] for key in ("normalizer", "pre_tokenizer")}
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


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int] | None]:
    """Token ids of texts, split together on all cores. None for a long one, and for all if the library gives up on one.

    Until all are done, a token takes some 100 bytes.
    """
    short = [text for text in texts if len(text) < _LONG]
    try:
        results = iter(tokenizer.encode_batch_fast(short, add_special_tokens=False))
    except BaseException as error:
        raise_unless_rust(error)
        return [None] * len(texts)
    return [list(next(results).ids) if len(text) < _LONG else None for text in texts]


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
    if kind == "Unigram":
        scores = _numbers(header, KEY_SCORES)[: len(ids)].astype(np.float64)
        if KEY_SCORE_STEPS in header.values:
            steps = _numbers(header, KEY_SCORE_STEPS).astype(np.int64)
            if len(steps) != len(scores):
                raise ValueError(f"the header has {len(steps):,} steps for {len(scores):,} scores")
            scores = (scores.view(np.int64) + steps).view(np.float64)
        return models.Unigram([*zip([tokens[i] for i in ids], scores.tolist(), strict=True)], **options)
    vocab = {added[i] if i in added else _checkpoint_text(tokens[i], kind): i for i in ids}
    if kind == "WordPiece":
        return models.WordPiece(vocab, **options)
    merges = (merge.partition(" ") for merge in header.strings("tokenizer.ggml.merges"))
    return models.BPE(vocab, [(left, right) for left, _, right in merges], **options)


def _numbers(header: Header, key: str) -> NDArray[Any]:
    if (numbers := Vocabulary(header).numbers(key)) is None:
        raise ValueError(f"the header has no {key}")
    return numbers


def _ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 7] -> [(0, 2), (7, 7)]"""
    values = np.sort(np.fromiter(ids, dtype=np.int64))
    if not len(values):
        return []
    breaks = np.flatnonzero(np.diff(values) > 1)
    return [*zip(values[[0, *(breaks + 1)]].tolist(), values[[*breaks, -1]].tolist(), strict=True)]
