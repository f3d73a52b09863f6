"""A few layers of a file, with random weights of its shapes and types: what its speed is sampled with."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from f2gguf.quantize.fit.plan import Candidate
from f2gguf.quantize.repair.assemble import head_bytes
from f2gguf.quantize.repair.tensors import quantize_rows, shape_of
from f2gguf.runtime.files import require_free_space
from f2gguf.runtime.fit.memory import TABLE
from f2gguf.runtime.fit.speed import N_IDS, Excerpt, Speed, sample_speed
from f2gguf.runtime.gguf.entries import Value
from f2gguf.runtime.gguf.reader import TensorInfo
from numpy.typing import NDArray

_LAYER = re.compile(r"blk\.(\d+)\.")
_BYTES = 96_000_000  # of layers: more than the caches of usual processors hold, as with the whole file
_N_ROWS = 64  # different ones
_ALIGNMENT = 32


def sampled_speed(
    candidate: Candidate, path: Path, *, pooling: str, n_threads: int, n_tokens: int | None = None
) -> Speed:
    """What `sample_speed` says of a file by its excerpt, which is at `path` for as long as that takes."""
    require_free_space(path.parent, 1 << 30, "the sample of a model's layers", choose_with="TMPDIR")
    excerpt = write_excerpt(candidate, path)
    speed = sample_speed(excerpt, pooling=pooling, n_threads=n_threads, n_tokens=n_tokens)
    path.unlink()
    return speed


def write_excerpt(candidate: Candidate, path: Path, *, is_whole: bool = False) -> Excerpt:
    """Write as many of a file's first layers as have _BYTES, or all, to `path`. Values do not matter to their speed.

    A file that `is_whole` has every layer and every row of its tables: what would be made, but for its numbers.
    """
    header = candidate.header
    sizes: dict[int, int] = {}
    for info in header.tensors:
        if match := _LAYER.match(info.name):
            sizes[int(match[1])] = sizes.get(int(match[1]), 0) + info.size_bytes
    n_layers = len(sizes) if is_whole else min(len(sizes), max(2, math.ceil(_BYTES / max(1, sizes.get(0, 1)))))
    changed: dict[str, Value] = {f"{header.architecture}.block_count": n_layers} if sizes else {}
    kept = [info for info in header.tensors if not (match := _LAYER.match(info.name)) or int(match[1]) < n_layers]
    head = head_bytes(header, [(info, info.type) for info in kept], changed)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(head)
        for info in kept:
            end = file.tell() + -(-info.size_bytes // _ALIGNMENT) * _ALIGNMENT
            n_rows = shape_of(info)[0] if is_whole or info.name != TABLE else min(shape_of(info)[0], N_IDS)
            rows = _rows(info, generator)
            for _ in range(n_rows // len(rows)):
                file.write(rows.data)
            file.write(rows[: n_rows % len(rows)].data)
            file.truncate(end)  # the rest of a table is a hole
            file.seek(end)
    prompt = header.prompts.get("query", "")
    return Excerpt(str(path), n_layers / len(sizes) if sizes else 1.0, len(prompt.encode()))


def _rows(info: TensorInfo, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of some rows of a tensor."""
    n_rows, n_cols = shape_of(info)
    shape = (min(n_rows, _N_ROWS), n_cols)
    if n_rows == 1:
        values = np.full(shape, not info.name.endswith("bias"), dtype=np.float32)
    else:
        values = 0.02 * generator.standard_normal(shape, dtype=np.float32)
    return quantize_rows(values, info.type, np.ones(n_cols, dtype=np.float32))
