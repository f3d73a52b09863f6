"""Weights of a .gguf file as numbers, and numbers as ggml's quantised blocks, through ggml's own quantiser."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.weights import DTYPES
from f2gguf.quantize.repair.codes import compiled
from f2gguf.runtime.errors import QuantizationFailed
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.gguf.reader import TensorInfo
from f2gguf.runtime.llama.library import libggml
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

Rows = NDArray[np.float32]
OnProgress = Callable[[int], None]  # is called with the number of things that are done now
_BLOCK_ELEMENTS, _STEP_ROWS = 1 << 22, 1024

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
libggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER]
libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
libggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libggml.ggml_validate_row_data.restype = ctypes.c_bool
DENSE = "dense_"  # names of the matrices behind the pooling begin with it


class Weights:
    """The tensors of a 16- or 32-bit .gguf file. They are mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        self.header = read_header(path)
        self.infos = {tensor.name: tensor for tensor in self.header.tensors}

    def rows(self, name: str, chosen: slice = slice(None)) -> Rows:
        """Rows of a matrix, (n_rows, n_cols) float32, or the whole of a vector as one row."""
        return self._as_float32(name, self._stored(name)[chosen])

    def _as_float32(self, name: str, stored: NDArray[Any]) -> Rows:
        if self.infos[name].type == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(stored, dtype=np.float32)

    def picked(self, name: str, chosen: NDArray[np.integer[Any]]) -> Rows:
        """The rows `chosen` of a matrix, (n_chosen, n_cols) float32; no other row is read."""
        return self._as_float32(name, self._stored(name)[chosen])

    def sample(self, name: str, n_rows: int) -> Rows:
        """About `n_rows` rows, evenly spread over the matrix."""
        return self.rows(name, slice(None, None, max(1, shape_of(self.infos[name])[0] // n_rows)))

    def column_stats(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Mean square and largest magnitude of each column, (n_cols,) each. A few rows are in memory at a time."""
        n_rows, n_cols = shape_of(self.infos[name])
        squares, highest = np.zeros(n_cols), np.zeros(n_cols, dtype=np.float32)
        for rows in self._row_blocks(name):
            squares += np.square(rows).sum(axis=0, dtype=np.float64)
            highest = np.maximum(highest, np.abs(rows).max(axis=0))
        return squares / n_rows, highest

    def row_max(self, name: str) -> NDArray[np.float32]:
        """Largest magnitude of each row, (n_rows,)."""
        return np.concatenate([np.abs(rows).max(axis=1) for rows in self._row_blocks(name)])

    def _row_blocks(self, name: str) -> Iterator[Rows]:
        return (self.rows(name, chosen) for chosen in row_slices(self.infos[name], _BLOCK_ELEMENTS))

    def _stored(self, name: str) -> NDArray[Any]:
        info = self.infos[name]
        if info.type not in DTYPES:
            raise QuantizationFailed(
                f"{self.header.path}: {name} is {info.type} already. Start from the F16 file: `quantize convert MODEL`."
            )
        return np.memmap(self.header.path, dtype=DTYPES[info.type], mode="r", offset=info.begin, shape=shape_of(info))


def shape_of(info: TensorInfo) -> tuple[int, int]:
    """(n_rows, n_cols) of a matrix; a vector is one row."""
    *rows, n_cols = info.shape
    return int(np.prod(rows, dtype=np.int64)), n_cols


def row_slices(info: TensorInfo, n_elements: int) -> list[slice]:
    """All rows of a tensor, in blocks of about `n_elements` values."""
    n_rows, n_cols = shape_of(info)
    step = max(1, n_elements // n_cols)
    return [slice(first, first + step) for first in range(0, n_rows, step)]


def slices(n_rows: int) -> list[slice]:
    """Blocks of rows small enough for arithmetic in many steps."""
    return [slice(first, first + _STEP_ROWS) for first in range(0, n_rows, _STEP_ROWS)]


def row_bytes(kind: str, n_cols: int) -> int:
    """Bytes of one row of `n_cols` values in the GGML type `kind`."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return n_cols // block * block_bytes


def size_as(info: TensorInfo, kind: str) -> int:
    """Bytes of a tensor in the GGML type `kind`."""
    n_rows, n_cols = shape_of(info)
    return n_rows * row_bytes(kind, n_cols)


def fits(kind: str, n_cols: int) -> bool:
    """Whether rows of `n_cols` values fill the blocks of the GGML type `kind`."""
    return n_cols % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0


def quantize_rows(rows: Rows, kind: str, imatrix: Rows | None = None) -> NDArray[np.uint8]:
    """`rows` (n_rows, n_cols) in the GGML type `kind`, (n_rows, n_bytes), by ggml's own quantiser.

    `imatrix` (n_cols,) weighs the errors in the columns. Raises `QuantizationFailed` if the blocks are not finite.
    """
    n_rows, n_cols = rows.shape
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    data = np.empty((n_rows, row_bytes(kind, n_cols)), dtype=np.uint8)
    number = GGMLQuantizationType[kind].value
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    pointer = None if weights is None else weights.ctypes.data
    libggml.ggml_quantize_chunk(number, rows.ctypes.data, data.ctypes.data, 0, n_rows, n_cols, pointer)
    if not libggml.ggml_validate_row_data(number, data.ctypes.data, data.nbytes):
        raise QuantizationFailed(f"values of magnitude {np.abs(rows).max():.3g} do not fit {kind}.")
    return data


def as_stored(rows: Rows, kind: str, imatrix: Rows | None = None) -> Rows:
    """`rows` (n_rows, n_cols) after a round trip through the type `kind`."""
    return dequantized(quantize_rows(rows, kind, imatrix), kind)


def dequantized(data: NDArray[np.uint8], kind: str) -> Rows:
    """The values of quantised rows (n_rows, n_bytes), (n_rows, n_cols)."""
    return np.asarray(dequantize(data, GGMLQuantizationType[kind]), dtype=np.float32).reshape(len(data), -1)


def rounding_width(kind: str) -> int:
    """Values in a block of rounded activations: 256 (Q8_K) where the weights' blocks are as large, else 32 (Q8_0)."""
    return 256 if GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 256 else 32


def as_multiplied(rows: Rows, kind: str) -> Rows:
    """Activations as llama.cpp's kernels round them before a product with weights of the type `kind`, same shape.

    A value takes eight bits, and a block of `rounding_width` values has one scale.
    """
    if kind in DTYPES:
        return rows
    width = rounding_width(kind)
    if library := compiled.library():
        return compiled.round_blocks(library, rows, width)
    rounded = np.empty_like(rows)
    for part in slices(len(rows)):
        blocks = rows[part].reshape(-1, rows.shape[1] // width, width)
        scales = np.abs(blocks).max(axis=2, keepdims=True) / 127
        whole = np.round(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
        rounded[part] = (whole * scales).reshape(-1, rows.shape[1])
    return rounded
