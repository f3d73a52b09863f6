"""`LazyModel`: the name of a file and how to open it, which every integration holds in place of the open file."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2gguf.runtime.calls import Texts, Vectors, described
from f2gguf.runtime.errors import TextError, WrongUsage

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embedder

N_OPEN = 4  # models that a process keeps open; the one that was not used for longest is let go

_lock = threading.Lock()


@dataclass(frozen=True)
class LazyModel:
    """A file by its path, or by `org/name[:VARIANT][@revision]` on the Hub, and the options of `Embedder`.

    It can be pickled, compared and written down. The file is opened when vectors are asked for, once in a process for
    all who name it in the same way, and again in a fork.
    """

    path: str
    _: KW_ONLY
    truncate_dim: int | None = None
    max_tokens: int | None = None
    device: str = "auto"
    n_threads: int | None = None

    @classmethod
    def of(cls, path: str | Path, **options: Any) -> LazyModel:
        """The same, with a path that holds in other folders where the file is there."""
        return cls(str(Path(path).absolute() if Path(path).exists() else path), **options)

    @property
    def embedder(self) -> Embedder:
        """The open file. Raises what `Embedder` does."""
        with _lock:
            return _opened(self, os.getpid())

    def embed(self, texts: Texts, *, query: bool) -> Vectors:
        """Vectors with the prompt of queries, or of documents: (n_texts, n_dims) float32.

        Raises `TextError` for what is no list of texts, a single text included, and what `Embedder` does.
        """
        if isinstance(texts, str):
            raise TextError(f"texts are a list, and this is one: {described(texts)}.")
        model = self.embedder
        return model.encode_query(texts) if query else model.encode(texts, prompt=model.header.document_prompt)

    def fingerprint(self) -> str:
        """`Embedder.fingerprint`, as it may stand in an index."""
        return self.embedder.fingerprint()

    def require_fingerprint(self, stated: str | None, where: str) -> None:
        """Raise `WrongUsage` unless the file gives the vectors that `where` holds. None: nothing was stated."""
        if stated is not None and (found := self.fingerprint()) != stated:
            raise WrongUsage(
                f"{where} holds vectors of another file or width (fingerprint {stated}) than {self.path} gives "
                f"({found}), so that they do not compare. Name the file that it was made with, or make it again."
            )


@functools.lru_cache(maxsize=N_OPEN)
def _opened(model: LazyModel, process: int) -> Embedder:
    """`process` is part of the key: a fork cannot use what was open before."""
    from f2gguf.runtime.embedder import Embedder  # and llama.cpp with it

    return Embedder(
        model.path,
        truncate_dim=model.truncate_dim,
        max_tokens=model.max_tokens,
        device=model.device,
        n_threads=model.n_threads,
    )
