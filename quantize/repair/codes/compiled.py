"""Loops in C++ (feedback.cpp), about twice as fast as numpy's, which are used where there is no compiler."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.repair.codes.blocks import Codes, Floats
from f2gguf.runtime.compiler import compiled, own_is_off
from f2gguf.runtime.llama.threads import cpu_flags, cpu_name
from numpy.typing import NDArray

_SOURCE = Path(__file__).with_name("feedback.cpp")


class Grid(ctypes.Structure):
    """The values that weights can take, as `feedback._Grid` has them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_rows", "sub_block", "n_levels")),
        *((name, ctypes.c_void_p) for name in ("levels", "steps", "inverse", "offsets")),
        ("is_even", ctypes.c_bool),
    )


def library() -> ctypes.CDLL | None:
    """The compiled library, for this processor; None where it cannot be had or is not wanted."""
    return None if own_is_off() else _opened()


@cache
def _opened() -> ctypes.CDLL | None:
    flag = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    path = compiled(_SOURCE, "codes", [flag], f"{cpu_name()} {sorted(cpu_flags())}")
    if path is None:
        return None
    opened, arrays = ctypes.CDLL(str(path)), [ctypes.c_void_p] * 2
    opened.f2gguf_with_feedback.argtypes = [ctypes.POINTER(Grid), ctypes.c_int64, *arrays, *arrays]
    opened.f2gguf_polish.argtypes = [ctypes.POINTER(Grid), ctypes.c_int64, *arrays, ctypes.c_int64, ctypes.c_void_p]
    opened.f2gguf_round_blocks.argtypes = [ctypes.c_int64, ctypes.c_int64, *arrays]
    return opened


def with_feedback(library: ctypes.CDLL, grid: Grid, target: Floats, upper: Floats, order: NDArray[np.intp]) -> Codes:
    """As `feedback._with_feedback`."""
    codes = np.empty(target.shape, dtype=np.uint8)
    order = order.astype(np.int64)
    library.f2gguf_with_feedback(grid, len(target), _at(target), _at(upper), _at(order), _at(codes))
    return codes


def polish(library: ctypes.CDLL, grid: Grid, codes: Codes, target: Floats, matrix: Floats, n_sweeps: int) -> Codes:
    """As `feedback._polish`, in place."""
    library.f2gguf_polish(grid, len(codes), _at(target), _at(matrix), n_sweeps, _at(codes))
    return codes


def round_blocks(library: ctypes.CDLL, rows: Floats, width: int) -> Floats:
    """As `tensors.as_multiplied`, for blocks of `width` values."""
    rows = np.ascontiguousarray(rows)
    rounded = np.empty_like(rows)
    library.f2gguf_round_blocks(rows.size // width, width, _at(rows), _at(rounded))
    return rounded


def _at(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
