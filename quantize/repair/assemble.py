"""A .gguf file with other tensor types, re-scaled channels and more header values. Everything else is copied."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from f2gguf.quantize.convert.write import map_ahead
from f2gguf.quantize.repair.tensors import OnProgress, Rows, Weights, dequantized, quantize_rows, row_slices, size_as
from f2gguf.runtime.errors import QuantizationFailed
from f2gguf.runtime.files import require_free_space
from f2gguf.runtime.gguf.entries import Value, entries, entry, packed, seal
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.gguf.reader import TensorInfo
from f2gguf.runtime.llama.threads import default_threads
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

Imatrix = Mapping[str, Rows]  # tensor -> weight of the error in each column, (n_cols,)
Ready = Mapping[str, NDArray[np.uint8]]  # tensor -> its bytes, (n_rows, n_bytes), where they are chosen already

# Types whose quantiser weighs columns. Q8_0 and F16 round each value by itself.
WEIGHED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
_N_COMPARED = 32  # rows with which the effect of an importance matrix is checked
_ALIGNMENT = 32
_CHUNK_ELEMENTS = 1 << 20  # a task of one thread


@dataclass(frozen=True)
class Scale:
    """The factors of one tensor: one for every row, one for every column."""

    rows: Rows | None = None  # (n_rows,)
    columns: Rows | None = None  # (n_cols,)

    def apply(self, values: Rows, first_row: int = 0) -> Rows:
        """Scale `values` (n, n_cols), the tensor's rows from `first_row` on."""
        if self.columns is not None:
            values = values * self.columns
        if self.rows is not None:
            values = values * self.rows[first_row : first_row + len(values), None]
        return values


def assemble(
    weights: Weights,
    target: Path,
    types: Mapping[str, str],
    *,
    header: Mapping[str, Value],
    imatrix: Imatrix | None = None,
    scales: Mapping[str, Scale] | None = None,
    ready: Ready | None = None,
    on_progress: OnProgress = lambda _: None,
) -> None:
    """Write the tensors of `weights` in `types`, and its header with `header` values added or replaced, to `target`.

    Tensors that are not `ready` are those that llama_model_quantize makes of the same numbers, bit for bit.
    `on_progress` is called for each tensor. Raises `OutputError` if the disk is too small, `QuantizationFailed` if
    values do not fit a type or an importance matrix changes nothing.
    """
    plan = [(info, types[info.name]) for info in weights.header.tensors]
    head = head_bytes(weights.header, plan, header)
    require_free_space(target.parent, len(head) + sum(size_as(*item) for item in plan), target.name)
    with ThreadPoolExecutor(default_threads()) as pool, target.open("wb") as file:
        file.write(head)
        for info, kind in plan:
            for data in _tensor(weights, info, kind, scales or {}, imatrix or {}, ready or {}, pool):
                file.write(data.data)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            on_progress(1)
    seal(target)


def _tensor(
    weights: Weights,
    info: TensorInfo,
    kind: str,
    scales: Mapping[str, Scale],
    imatrix: Imatrix,
    ready: Ready,
    pool: ThreadPoolExecutor,
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of one tensor, some rows at a time."""
    if info.name in ready:
        if ready[info.name].nbytes != size_as(info, kind):
            raise QuantizationFailed(f"{weights.header.path}: {info.name}: its codes are not of the type {kind}.")
        yield np.ascontiguousarray(ready[info.name])
        return
    scale, columns = scales.get(info.name, Scale()), imatrix.get(info.name)
    try:
        if columns is not None and kind in WEIGHED:
            _require_effect(scale.apply(weights.rows(info.name, slice(_N_COMPARED))), kind, columns)
        quantized = functools.partial(_quantized, weights, info, kind, scale, columns)
        yield from map_ahead(pool, quantized, row_slices(info, _CHUNK_ELEMENTS))
    except QuantizationFailed as error:
        raise QuantizationFailed(f"{weights.header.path}: {info.name}: {error}") from error


def _quantized(
    weights: Weights, info: TensorInfo, kind: str, scale: Scale, imatrix: Rows | None, chosen: slice
) -> NDArray[np.uint8]:
    return quantize_rows(scale.apply(weights.rows(info.name, chosen), chosen.start), kind, imatrix)


def _require_effect(rows: Rows, kind: str, columns: Rows) -> None:
    """Raise `QuantizationFailed` if the importance matrix changes no byte, though there are errors to weigh."""
    plain = quantize_rows(rows, kind)
    if np.array_equal(plain, quantize_rows(rows, kind, columns)) and not np.array_equal(dequantized(plain, kind), rows):
        raise QuantizationFailed("the importance matrix changes no byte. Make another: quantize imatrix SOURCE.")


def file_bytes(source: Header, types: Mapping[str, str], added: Mapping[str, Value]) -> int:
    """The size of the file that `assemble` makes of these."""
    plan = [(info, types[info.name]) for info in source.tensors]
    return len(head_bytes(source, plan, added)) + sum(-(-size_as(*item) // _ALIGNMENT) * _ALIGNMENT for item in plan)


def head_bytes(source: Header, plan: Sequence[tuple[TensorInfo, str]], added: Mapping[str, Value]) -> bytes:
    """Everything that comes before the tensors in a file of `source`'s values and the tensors of `plan`.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    kept = {key: data for key, data in entries(source).items() if key != "general.alignment"}
    kept |= {key: entry(key, value) for key, value in added.items()}
    infos, offset = [], 0
    for info, kind in plan:
        n_dims = len(info.shape)
        placed = struct.pack(f"<I{n_dims}QIQ", n_dims, *info.shape[::-1], GGMLQuantizationType[kind].value, offset)
        infos.append(packed(info.name) + placed)
        offset += -(-size_as(info, kind) // _ALIGNMENT) * _ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(kept)) + b"".join([*kept.values(), *infos])
    return head + bytes(-len(head) % _ALIGNMENT)
