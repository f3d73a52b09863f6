"""Where the documents of an index come from: files of texts, or the shards that `f2gguf embed -o FOLDER` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from f2gguf.runtime.corpus.inputs import find_inputs, glance
from f2gguf.runtime.corpus.job import MANIFEST, require_complete
from f2gguf.runtime.corpus.shards import read_rows
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import InputError, NoVector, WrongUsage
from f2gguf.runtime.index.store import Document, Rows, Vector
from f2gguf.runtime.llama.encoder import normalized
from f2gguf.runtime.tables.texts import iter_texts

Found = tuple[Document, Vector | None]  # a vector where there is one already


class Documents(Protocol):
    """Documents that can be read more than once."""

    @property
    def name(self) -> str:
        """What errors call them."""

    def __iter__(self) -> Iterator[Found]: ...

    def facts(self, model: Embedder, truncate_dim: int | None) -> dict[str, Any]:
        """What their vectors depend on. Raises `InputError` where `model` gives others than they have."""


@dataclass(frozen=True)
class TextFiles:
    """Rows of files, whose vectors are computed."""

    files: Sequence[str]
    column: str | None

    @property
    def name(self) -> str:
        return ", ".join(self.files[:3])

    def __iter__(self) -> Iterator[Found]:
        for file in self.files:
            for row in iter_texts(file, column=self.column):
                yield Document.of(row), None

    def facts(self, model: Embedder, truncate_dim: int | None) -> dict[str, Any]:
        width = model.header.require_width(model.truncate_dim if truncate_dim is None else truncate_dim)
        return {
            "fingerprint": model.fingerprint(width),
            "prompt": model.header.document_prompt,
            "width": width,
            "max_tokens": model.max_seq_length,
        }


@dataclass(frozen=True)
class Shards:
    """Rows of a folder of Parquet shards, with the vectors that they have there."""

    folder: Path
    settings: dict[str, Any]  # that they were made with

    @property
    def name(self) -> str:
        return str(self.folder)

    def __iter__(self) -> Iterator[Found]:
        has_ids = self.settings["ids"] != "position"
        for row, vector in read_rows(self.folder):
            yield Document.of(row if has_ids else row._replace(id=None)), vector

    def facts(self, model: Embedder, truncate_dim: int | None) -> dict[str, Any]:
        settings, again = self.settings, f"Embed the corpus again, with another -o than {self.folder}."
        if not settings["keep_text"]:
            raise InputError(f"{self.folder}: holds vectors without texts. {again} Pass --keep-text.")
        if settings["precision"] not in ("float32", "float16"):
            raise InputError(
                f"{self.folder}: its vectors are {settings['precision']}, and an index is made of float32. {again}"
            )
        width = settings["width"]
        if truncate_dim not in (None, width):
            raise InputError(f"{self.folder}: its vectors have {width} dimensions, and not {truncate_dim} (--dims).")
        if width not in model.header.dims or settings["fingerprint"] != model.fingerprint(width):
            raise InputError(
                f"{self.folder}: was embedded with {settings['model']}, and {model.header.path} gives other vectors. "
                "Use that file (-m)."
            )
        if settings["prompt"] != model.header.document_prompt:
            found, asked = settings["prompt"], model.header.document_prompt
            raise InputError(
                f"{self.folder}: its texts stand behind the prompt {found!r}, and documents of the model behind "
                f"{asked!r}. {again}"
            )
        return {name: settings[name] for name in ("fingerprint", "prompt", "width", "max_tokens")}


def find_documents(names: Sequence[str], *, column: str | None, apart_from: Path) -> Documents:
    """The documents that files, globs and folders name, without those in `apart_from`, or those of a folder of shards.

    Raises `InputError`, `WrongUsage` or `UnknownName` for what holds none.
    """
    try:
        shards = [name for name in names if (Path(name) / MANIFEST).exists()]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}. Allow it, or leave it out.") from error
    if not shards:
        files = find_inputs(names, apart_from=apart_from)
        glance(files, column)
        return TextFiles(files, column)
    if len(names) > 1 or column is not None:
        other = "--column" if column is not None else "other documents"
        raise WrongUsage(f"{shards[0]}: holds texts with their vectors. An index takes it alone, without {other}.")
    return Shards(Path(shards[0]), require_complete(Path(shards[0])))


def vectors_of(
    found: Sequence[Found], model: Embedder, facts: dict[str, Any]
) -> tuple[list[Document], Rows, list[str]]:
    """Documents, their unit vectors (n, width), and the names of those that have no finite vector."""
    documents, there = [document for document, _ in found], [vector for _, vector in found]
    failed: list[str] = []
    if all(vector is not None for vector in there):
        vectors = np.stack([np.asarray(vector, dtype=np.float32) for vector in there])
    else:
        texts = [document.text for document in documents]
        try:
            vectors = model.embed(texts, prompt=facts["prompt"], truncate_dim=facts["width"]).vectors
        except NoVector as error:
            vectors, failed = error.embeddings.vectors, [documents[i].name for i in error.indices]
    return [it for it in documents if it.name not in failed], normalized(vectors), failed
