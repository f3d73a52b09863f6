"""Matrix products on all cores, in blocks that do not depend on their number: the same bits on one core or eight.

Several threads of a BLAS library that wait for each other are slow on a busy machine, and round otherwise than one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from f2gguf.runtime.llama.kernels import own
from f2gguf.runtime.llama.threads import default_threads
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

_N_BLOCKS = 16
_SMALL = 1 << 22  # multiplications that are not worth threads
Item = TypeVar("Item")
Result = TypeVar("Result")
Array = NDArray[np.float32]
Out = TypeVar("Out", bound=np.generic)


_pools: list[ThreadPoolExecutor] = []  # that of the block that runs, if any


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let `product` and `side_by_side` use all cores while the block runs, and BLAS the thread that calls it."""
    threads = ThreadPoolExecutor(default_threads(), thread_name_prefix="f2gguf quantize")
    with threadpool_limits(1, user_api="blas"), threads as pool:
        _pools.append(pool)
        try:
            yield
        finally:
            _pools.remove(pool)


def product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """left @ right, (n_rows, n) and (n, n_cols).

    On AMX it keeps 16 bits of every number, which is a hundred times finer than what codes of 8 bits lose.
    """
    if left.size * right.shape[1] >= _SMALL and (found := own.product(left, right, default_threads())) is not None:
        return found
    shape = left.shape[0], right.shape[1]
    result = np.empty(shape, dtype=np.float32)
    axis = int(shape[1] > shape[0])
    step = max(64, -(-shape[axis] // _N_BLOCKS))
    if left.size * shape[1] < _SMALL:
        return np.matmul(left, right, out=result)

    def block(first: int) -> None:
        part = slice(first, first + step)
        if axis:
            np.matmul(left, right[:, part], out=result[:, part])
        else:
            np.matmul(left[part], right, out=result[part])

    side_by_side(block, range(0, shape[axis], step))
    return result


def gram(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """values.T @ values, (n_cols, n_cols), where each pair of columns is multiplied once."""
    n_cols = values.shape[1]
    result = np.empty((n_cols, n_cols), dtype=np.float32)
    step = max(64, -(-n_cols // _N_BLOCKS))

    def block(first: int) -> None:
        part, right = slice(first, first + step), slice(first + step, None)
        result[part, first:] = values[:, part].T @ values[:, first:]
        result[right, part] = result[part, right].T

    side_by_side(block, range(0, n_cols, step))
    return result


def by_rows(function: Callable[[Array], NDArray[Out]], rows: Array) -> NDArray[Out]:
    """`function(rows)` where it does the same with every row: some rows at a time, side by side."""
    return np.concatenate(side_by_side(function, np.array_split(rows, min(_N_BLOCKS, len(rows)))))


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `function` gives for every item."""
    return list(_pools[-1].map(function, items) if _pools else map(function, items))
