"""A few layers of a file, with random weights of its shapes and types: what its speed is sampled with."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from f2gguf.quantize.fit.plan import Candidate
from f2gguf.quantize.repair.assemble import head_bytes
from f2gguf.quantize.repair.tensors import quantize_rows, shape_of, size_as
from f2gguf.runtime.fit.memory import TABLE
from f2gguf.runtime.fit.speed import N_IDS, Excerpt
from f2gguf.runtime.gguf.entries import Value
from f2gguf.runtime.gguf.reader import TensorInfo
from numpy.typing import NDArray

_LAYER = re.compile(r"blk\.(\d+)\.")
_BYTES = 96_000_000  # of layers: more than the caches of usual processors hold, as with the whole file
_N_ROWS = 64  # different ones
_ALIGNMENT = 32


def write_excerpt(candidate: Candidate, path: Path, *, is_whole: bool = False) -> Excerpt:
    """Write as many of a file's first layers as have _BYTES, or all, to `path`. Values do not matter to their speed.

    A file that `is_whole` has every layer and every row of its tables: what would be made, but for its numbers.
    """
    header = candidate.header
    sizes: dict[int, int] = {}
    for info in header.tensors:
        if match := _LAYER.match(info.name):
            sizes[int(match[1])] = sizes.get(int(match[1]), 0) + size_as(info, candidate.types[info.name])
    n_layers = len(sizes) if is_whole else min(len(sizes), max(2, math.ceil(_BYTES / max(1, sizes.get(0, 1)))))
    changed: dict[str, Value] = {f"{header.architecture}.block_count": n_layers} if sizes else {}
    plan = [
        (info, candidate.types[info.name])
        for info in header.tensors
        if not (match := _LAYER.match(info.name)) or int(match[1]) < n_layers
    ]
    head = head_bytes(header, plan, changed)
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(head)
        for info, kind in plan:
            end = file.tell() + -(-size_as(info, kind) // _ALIGNMENT) * _ALIGNMENT
            n_rows = shape_of(info)[0] if is_whole or info.name != TABLE else min(shape_of(info)[0], N_IDS)
            rows = _rows(info, kind, generator)
            for _ in range(n_rows // len(rows)):
                file.write(rows.data)
            file.write(rows[: n_rows % len(rows)].data)
            file.truncate(end)  # the rest of a table is a hole
            file.seek(end)
    prompt = header.prompts.get("query", "")
    return Excerpt(str(path), n_layers / len(sizes) if sizes else 1.0, len(prompt.encode()))


def _rows(info: TensorInfo, kind: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Bytes of some rows of a tensor."""
    n_rows, n_cols = shape_of(info)
    shape = (min(n_rows, _N_ROWS), n_cols)
    if n_rows == 1:
        values = np.full(shape, not info.name.endswith("bias"), dtype=np.float32)
    else:
        values = 0.02 * generator.standard_normal(shape, dtype=np.float32)
    return quantize_rows(values, kind, np.ones(n_cols, dtype=np.float32))
