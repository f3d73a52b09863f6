"""The vectors of one shard, computed in this process, in one of several, or on another machine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from f2gguf.runtime.embedder import Embedder, Embeddings
from f2gguf.runtime.errors import HashMismatch, NoVector, TextError, TruncationWarning


@dataclass(frozen=True)
class Options:
    """How every shard of a corpus is embedded, and with which file. It can be pickled."""

    opening: dict[str, Any]  # arguments of `Embedder`, "path" among them
    fingerprint: str
    prompt: str
    width: int
    precision: str
    normalize: bool | None


@dataclass(frozen=True)
class Embedded:
    """Vectors of the texts of a shard that have one, and why the others have none, by their index."""

    embeddings: Embeddings
    flaws: dict[int, str]


_open: dict[str, Embedder] = {}  # by what opened it: the one model of this process


def embed_texts(options: Options, texts: Sequence[str]) -> Embedded:
    """Embed a shard's texts with the model of this process, which is opened by the first call.

    The bytes depend on nothing but the texts of the shard. Raises `HashMismatch` where this machine has another file.
    """
    key = repr(options)
    if key not in _open:
        model = Embedder(**options.opening)
        if model.fingerprint(options.width) != options.fingerprint:
            raise HashMismatch(f"{model.header.path}: is another file here than where the job was started. Copy it.")
        _open.clear()
        _open[key] = model
    return embed_with(_open[key], options, texts)


def embed_with(model: Embedder, options: Options, texts: Sequence[str]) -> Embedded:
    """`embed_texts` with an open model."""
    model.encoder.engine.renew()
    try:
        return _embed(model, options, texts, {})
    except TextError:  # such as an empty text, where a model has no token to stand for it
        return _embed(model, options, texts, _without_tokens(model, options.prompt, texts))


def _embed(model: Embedder, options: Options, texts: Sequence[str], flaws: dict[int, str]) -> Embedded:
    kept = [i for i in range(len(texts)) if i not in flaws]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # a column says which were cut
        try:
            embeddings = model.embed(
                [texts[i] for i in kept],
                prompt=options.prompt,
                normalize=options.normalize,
                truncate_dim=options.width,
                precision=options.precision,
            )
        except NoVector as error:
            embeddings = error.embeddings
            flaws |= {kept[i]: "has no finite vector, neither alone nor in higher precision" for i in error.indices}
    return Embedded(embeddings, flaws)


def _without_tokens(model: Embedder, prompt: str, texts: Sequence[str]) -> dict[int, str]:
    """Why texts cannot be tokenised, by their index."""
    flaws = {}
    for i, text in enumerate(texts):
        try:
            model.encoder.tokenize([text], prompt)
        except TextError as error:
            flaws[i] = str(error).removeprefix("text 1 of 1: ")
    return flaws
