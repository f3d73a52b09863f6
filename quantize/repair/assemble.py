"""A .gguf file becomes another one: other tensor types, channels re-scaled, header values added; all else is copied."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from f2gguf.quantize.repair.tensors import Rows, Weights, dequantized, quantize_rows, shape_of, size_as
from f2gguf.runtime.errors import QuantizationFailed
from f2gguf.runtime.files import require_free_space
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.gguf.reader import TensorInfo
from f2gguf.runtime.llama.library import default_threads
from gguf import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

Value = bool | int | float | str
Imatrix = Mapping[str, Rows]  # tensor -> how much each column's error weighs, (n_cols,)

# types whose quantiser weighs columns; Q8_0 and F16 round each value by itself
WEIGHED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_N_COMPARED = 32  # rows that show whether an importance matrix has any effect
_ALIGNMENT = 32
_CHUNK_ELEMENTS = 1 << 20  # a task of one thread
_TYPES: dict[type, tuple[GGUFValueType, str]] = {
    bool: (GGUFValueType.BOOL, "<?"),
    int: (GGUFValueType.UINT32, "<I"),
    float: (GGUFValueType.FLOAT32, "<f"),
}


@dataclass(frozen=True)
class Scale:
    """Factors of one tensor: every row times its own, every column times its own."""

    rows: Rows | None = None  # (n_rows,)
    columns: Rows | None = None  # (n_cols,)

    def apply(self, values: Rows, first_row: int = 0, step: int = 1) -> Rows:
        """`values` (n, n_cols), which are rows `first_row`, `first_row + step`, ... of the tensor, scaled."""
        if self.columns is not None:
            values = values * self.columns
        if self.rows is not None:
            values = values * self.rows[first_row::step][: len(values), None]
        return values


def assemble(
    weights: Weights,
    target: Path,
    types: Mapping[str, str],
    *,
    header: Mapping[str, Value],
    imatrix: Imatrix | None = None,
    scales: Mapping[str, Scale] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write the file of `weights` with tensors in `types` to `target`, and `header` values added or replaced.

    Quantised tensors are what llama_model_quantize makes of the same numbers, bit for bit. `on_progress` is told of
    each tensor. Raises `OutputError` before a disk that is too small, `QuantizationFailed` where values do not fit a
    type, or an importance matrix changes nothing.
    """
    plan = [(info, types[info.name]) for info in weights.header.tensors]
    head = _head(weights.header, plan, header)
    require_free_space(target.parent, len(head) + sum(size_as(*item) for item in plan), target.name)
    n_threads = default_threads()
    with ThreadPoolExecutor(n_threads) as pool, target.open("wb") as file:
        file.write(head)
        for info, kind in plan:
            scale, columns = (scales or {}).get(info.name, Scale()), (imatrix or {}).get(info.name)
            try:
                if columns is not None and kind in WEIGHED:
                    _require_effect(scale.apply(weights.rows(info.name, slice(_N_COMPARED))), kind, columns)
                for data in _quantized(pool, 2 * n_threads, weights, info, kind, scale, columns):
                    file.write(data.data)
            except QuantizationFailed as error:
                raise QuantizationFailed(f"{weights.header.path}: {info.name}: {error}") from error
            file.write(bytes(-file.tell() % _ALIGNMENT))
            if on_progress:
                on_progress(1)


def _quantized(
    pool: ThreadPoolExecutor,
    n_ahead: int,
    weights: Weights,
    info: TensorInfo,
    kind: str,
    scale: Scale,
    imatrix: Rows | None,
) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes in order, a few chunks made while the one before is written."""
    n_rows, n_cols = shape_of(info)
    step = max(1, _CHUNK_ELEMENTS // n_cols)

    def make(first: int) -> NDArray[np.uint8]:
        rows = weights.rows(info.name, slice(first, first + step))
        return quantize_rows(scale.apply(rows, first), kind, imatrix)

    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    for first in range(0, n_rows, step):
        waiting.append(pool.submit(make, first))
        if len(waiting) > n_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _require_effect(rows: Rows, kind: str, columns: Rows) -> None:
    """Raise `QuantizationFailed` where the importance matrix moves no byte, though there are errors to weigh."""
    plain = quantize_rows(rows, kind)
    if np.array_equal(plain, quantize_rows(rows, kind, columns)) and not np.array_equal(dequantized(plain, kind), rows):
        raise QuantizationFailed("the importance matrix changes no byte. Make another: quantize imatrix SOURCE.")


def _head(source: Header, plan: Sequence[tuple[TensorInfo, str]], added: Mapping[str, Value]) -> bytes:
    """Everything before the tensors. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    entries = _entries(source)
    entries |= {key: _entry(key, value) for key, value in added.items()}
    infos, offset = [], 0
    for info, kind in plan:
        infos.append(_string(info.name) + struct.pack("<I", len(info.shape)))
        infos.append(struct.pack(f"<{len(info.shape)}Q", *info.shape[::-1]))
        infos.append(struct.pack("<IQ", GGMLQuantizationType[kind].value, offset))
        offset += -(-size_as(info, kind) // _ALIGNMENT) * _ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(entries)) + b"".join([*entries.values(), *infos])
    return head + bytes(-len(head) % _ALIGNMENT)


def _entries(source: Header) -> dict[str, bytes]:
    """Each header value with its key, as the bytes of the source: the vocabulary goes over unread."""
    begins = {key: at - 4 - len(key.encode()) - 8 for key, at in source.offsets.items()}
    ends = [*list(begins.values())[1:], source.values_end]
    with source.path.open("rb") as file:
        data = file.read(source.values_end)
    pairs = zip(begins.items(), ends, strict=True)
    return {key: data[begin:end] for (key, begin), end in pairs if key != "general.alignment"}


def _entry(key: str, value: Value) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", GGUFValueType.STRING) + _string(value)
    kind, layout = _TYPES[type(value)]
    return _string(key) + struct.pack("<I", kind) + struct.pack(layout, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
