"""How a stored tensor becomes the one that is written, where llama.cpp keeps it otherwise. Streamed, as others are.

A transform is a function of a stored tensor. Those with arguments are made by a call: `Target(..., take_rows(2, 514))`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.weights import CHUNK_ELEMENTS, DTYPES, StoredTensor, as_float32
from numpy.typing import NDArray

Transform = Callable[[StoredTensor], StoredTensor]


def as_stored(tensor: StoredTensor) -> StoredTensor:
    """No change."""
    return tensor


def take_rows(begin: int, end: int) -> Transform:
    """Rows `begin` to `end` (which is left out): a part of a fused tensor, or a table without its first rows."""
    return lambda tensor: tensor.rows(begin, end)


def add(value: float) -> Transform:
    """Every value plus `value`, in float32: norms that are stored as what they add to 1."""
    return lambda tensor: _Sum(tensor.file, "F32", tensor.shape, tensor.begin, tensor, value)


def interleave_halves(n_head: int) -> Transform:
    """Rows of a query or key matrix of `n_head` heads in the order of llama.cpp's architecture `llama`.

    transformers turns value i of a head with value i + width / 2 (RoPE), llama.cpp value 2i with value 2i + 1 there.
    Rows 0 1 2 3 of a head of width 4 become 0 2 1 3. Source: llama.cpp's converter, LlamaModel.permute
    """

    def transform(tensor: StoredTensor) -> StoredTensor:
        rows = np.arange(tensor.shape[0]).reshape(n_head, 2, -1)
        return _Reordered(
            *(tensor.file, tensor.dtype, tensor.shape, tensor.begin, rows.swapaxes(1, 2).ravel()),
            strides=tensor.strides,
            byte_order=tensor.byte_order,
        )

    return transform


@dataclass(frozen=True)
class _Sum(StoredTensor):
    stored: StoredTensor
    value: float

    def chunks(self) -> Iterator[NDArray[Any]]:
        for chunk in self.stored.chunks():
            yield as_float32(self.stored.dtype, chunk) + np.float32(self.value)


@dataclass(frozen=True)
class _Reordered(StoredTensor):
    order: NDArray[np.int64] = field(compare=False)  # (n_rows,): the stored row that each written one is

    def chunks(self) -> Iterator[NDArray[Any]]:
        stored, n_rows = self.mapped(), max(1, CHUNK_ELEMENTS * len(self.order) // self.n_elements)
        for start in range(0, len(self.order), n_rows):
            yield stored[self.order[start : start + n_rows]].ravel().astype(DTYPES[self.dtype], copy=False)
