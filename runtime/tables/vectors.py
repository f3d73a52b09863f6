"""Vectors out: .npy, .jsonl and .safetensors files, and JSON lines on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from f2gguf.runtime.errors import UnknownName
from f2gguf.runtime.files import require_absent, write_text, writing
from f2gguf.runtime.tables.texts import Texts

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embeddings


def require_output(path: Path, *, force: bool) -> None:
    """Refuse an output of unknown format, or one that exists. Call it before the work."""
    if path.suffix not in WRITERS:
        raise UnknownName("output format", path.suffix or path.name, WRITERS, " The file's ending decides (-o).")
    require_absent(path, force=force)
    if path.suffix == ".npy":
        require_absent(_ids_path(path), force=force)


def json_rows(texts: Texts, embeddings: Embeddings) -> Iterator[str]:
    """One JSON object a text: id, number of tokens, whether it was cut, vector (with digits enough for a float32)."""
    columns = (texts.ids, embeddings.n_tokens.tolist(), embeddings.truncated.tolist(), embeddings.vectors)
    for row_id, n_tokens, truncated, vector in zip(*columns, strict=True):
        row = {"id": row_id, "n_tokens": n_tokens, "truncated": truncated}
        numbers = vector.tolist() if vector.dtype.kind in "iu" else [float(f"{x:.9g}") for x in vector]
        yield json.dumps({**row, "embedding": numbers}, ensure_ascii=False)


def _write_npy(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    with writing(path) as part:
        with part.open("wb") as file:
            np.save(file, embeddings.vectors)
        if texts.has_ids:
            rows = (json.dumps(row_id, ensure_ascii=False) + "\n" for row_id in texts.ids)
            write_text(_ids_path(path), "".join(rows))
        else:
            _ids_path(path).unlink(missing_ok=True)  # of the vectors that --force overwrites
    return [path, _ids_path(path)] if texts.has_ids else [path]


def _write_jsonl(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    with writing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(row + "\n" for row in json_rows(texts, embeddings))
    return [path]


def _write_safetensors(path: Path, texts: Texts, embeddings: Embeddings) -> list[Path]:
    from safetensors.numpy import save

    with writing(path) as part:
        columns = {"n_tokens": embeddings.n_tokens, "truncated": embeddings.truncated}
        ids = json.dumps(texts.ids, ensure_ascii=False)
        part.write_bytes(save({"embeddings": embeddings.vectors, **columns}, metadata={"ids": ids}))
    return [path]


def _ids_path(path: Path) -> Path:
    return path.with_suffix(".ids.jsonl")


# By the file's ending: each writes vectors (n_texts, n_dims), and gives the paths of the written files. A .npy file
# holds the vectors only: ids of the input file go to NAME.ids.jsonl beside it.
WRITERS: dict[str, Callable[[Path, Texts, Embeddings], list[Path]]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".safetensors": _write_safetensors,
}
