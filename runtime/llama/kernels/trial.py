"""Trials of CPU kernels: does a backend, or a type of buffers, compute what ggml's CPU backend does from plain buffers?

A child process makes them, since kernels that do not fit the processor may end it. What it found is remembered.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.files import recall, remember
from f2gguf.runtime.llama.kernels.buffers import NUMBERS, InitParams
from f2gguf.runtime.llama.library import libggml
from f2gguf.runtime.llama.threads import cpu_flags
from numpy.typing import NDArray

Array = NDArray[np.float32]
Build = Callable[..., int]  # a ggml_context and tensors -> the tensor to compute

RIGHT = "right"  # what the child prints
_TIMEOUT_S = 60
_CRASHES = (-signal.SIGILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGABRT)
_N_ROWS, _N_COLS, _N_TOKENS = 64, 512, 48  # more than one tile of each, so that several threads have work


def tried(name: str, code: str) -> bool:
    """Whether a child process that runs `code` says `RIGHT`. It is remembered where it ended by itself or crashed."""
    stamp = [library_stamp(), platform.node(), _processor(), sorted(cpu_flags())]
    known, found = recall(name) or (None, False)
    if known != stamp:
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        found = child.returncode == 0 and child.stdout.strip() == RIGHT
        if child.returncode in (0, *_CRASHES):  # otherwise it ended for reasons that are not the kernels'
            remember(name, [stamp, found])
    return bool(found)


@dataclass(frozen=True)
class Tensor:
    """What a graph starts from: values in a type of ggml's, of up to four dimensions, the last one contiguous."""

    values: Array
    kind: str = "F32"
    name: str = ""
    buffer_type: int | None = None  # ggml's plain one


def compute(build: Build, *tensors: Tensor, backend: int | None = None) -> Array:
    """The values, flat, of what `build` makes of tensors; a `backend` takes what it supports before the CPU.

    Nothing is freed.
    """
    contexts = [libggml.ggml_init(InitParams(1 << 20, None, True)) for _ in range(len(tensors) + 1)]
    pointers = []
    for context, tensor in zip(contexts, tensors, strict=False):
        sizes = [*reversed(tensor.values.shape), 1, 1, 1][:4]
        pointer = libggml.ggml_new_tensor_4d(context, NUMBERS[tensor.kind], *sizes)
        libggml.ggml_set_name(pointer, tensor.name.encode())
        buffer_type = tensor.buffer_type or libggml.ggml_backend_cpu_buffer_type()
        libggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        data = np.empty(libggml.ggml_nbytes(pointer), dtype=np.uint8)
        values = np.ascontiguousarray(tensor.values, dtype=np.float32).reshape(-1, sizes[0])
        libggml.ggml_quantize_chunk(NUMBERS[tensor.kind], pointer_to(values), pointer_to(data), 0, *values.shape, None)
        libggml.ggml_backend_tensor_set(pointer, pointer_to(data), 0, data.nbytes)
        pointers.append(pointer)
    result = build(contexts[-1], *pointers)
    graph = libggml.ggml_new_graph(contexts[-1])
    libggml.ggml_build_forward_expand(graph, result)
    backends = [*([backend] if backend else []), libggml.ggml_backend_init_by_type(0, None)]  # the CPU comes last
    libggml.ggml_backend_alloc_ctx_tensors(contexts[-1], backends[-1])
    found = np.full(libggml.ggml_nbytes(result) // 4, np.nan, dtype=np.float32)
    array = (ctypes.c_void_p * len(backends))(*backends)
    scheduler = libggml.ggml_backend_sched_new(array, None, len(backends), 64, False, False)
    if libggml.ggml_backend_sched_graph_compute(scheduler, graph) == 0:
        libggml.ggml_backend_tensor_get(result, pointer_to(found), 0, found.nbytes)
    return found


def products(
    matrix: Array, kind: str, inputs: Array, buffer_type: int | None = None, backend: int | None = None
) -> Array:
    """`inputs` (n_tokens, n_cols) times a matrix (n_rows, n_cols) in a type, (n_tokens, n_rows)."""
    weights = Tensor(matrix, kind, "blk.0.ffn_up.weight", buffer_type)
    return compute(libggml.ggml_mul_mat, weights, Tensor(inputs), backend=backend).reshape(len(inputs), len(matrix))


def attention(queries: Array, keys: Array, values: Array, mask: Array, backend: int | None = None) -> Array:
    """Flash attention of (n_heads, n_tokens, n) with (n_kv_heads, n_keys, n), (n_tokens, n_heads, n)."""

    def build(context: int, *tensors: int) -> int:
        return int(libggml.ggml_flash_attn_ext(context, *tensors, queries.shape[2] ** -0.5, 0.0, 0.0))

    halves = [Tensor(it, "F16") for it in (keys, values, mask)]
    found = compute(build, Tensor(queries), *halves, backend=backend)
    return found.reshape(queries.shape[1], queries.shape[0], values.shape[2])


def steps(inputs: Array, others: Array, factors: Array, backend: int | None = None) -> Array:
    """A row of each kind of step between products: `inputs` and `others` (n_rows, n), and `factors` (n,)."""

    def build(context: int, x: int, y: int, factor: int) -> int:
        x = libggml.ggml_mul(context, libggml.ggml_norm(context, libggml.ggml_add(context, x, y), 1e-5), factor)
        x = libggml.ggml_rms_norm(context, libggml.ggml_gelu(context, x), 1e-5)
        return int(libggml.ggml_add(context, libggml.ggml_swiglu_split(context, x, y), factor))

    rows = Tensor(factors, name="blk.0.attn_norm.weight")
    return compute(build, Tensor(inputs), Tensor(others), rows, backend=backend).reshape(inputs.shape)


def products_are_right(
    buffer_type: int | None, types: Sequence[str], *, backend: int | None = None, tolerance: float
) -> bool:
    """Whether matrices of `types` have the products that they have on the CPU in plain buffers. It may not return.

    They lie in buffers of a type, and a `backend` takes them before the CPU. Where it rounds no sum otherwise than the
    CPU, it took none of them, which is wrong too.
    """
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((_N_ROWS, _N_COLS), dtype=np.float32)
    inputs = generator.standard_normal((_N_TOKENS, _N_COLS), dtype=np.float32)
    for kind in types:
        found, wanted = products(matrix, kind, inputs, buffer_type, backend), products(matrix, kind, inputs)
        if not are_close(found, wanted, tolerance) or (backend and np.array_equal(found, wanted)):
            return False
    return True


def layers_are_right(backend: int, *, tolerance: float) -> bool:
    """Whether a backend takes attention, and the steps between products, and they are those of the CPU."""
    normal = np.random.default_rng(0).standard_normal
    queries, keys, values = (normal((n_heads, 80, 64), dtype=np.float32) for n_heads in (4, 2, 2))
    texts = np.repeat([0, 1], [30, 50])
    mask = np.where(texts[:, None] == texts, 0, -np.inf).astype(np.float32)
    inputs, others, factors = (normal(shape, dtype=np.float32) for shape in ((80, 256), (80, 256), 256))
    for computed in (partial(attention, queries, keys, values, mask), partial(steps, inputs, others, factors)):
        found, wanted = computed(backend), computed(None)
        if not are_close(found, wanted, tolerance) or np.array_equal(found, wanted):
            return False
    return True


def are_close(found: Array, wanted: Array, tolerance: float) -> bool:
    """Whether numbers differ by at most so much of the largest of them; not where one is no number."""
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


def pointer_to(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def library_stamp() -> list[list[Any]]:
    """Values of which one changes when another build takes its place."""
    files = sorted(Path(libggml._name).parent.glob("*ggml*"))
    return [[str(path), it.st_size, it.st_mtime_ns] for path in files for it in [path.stat()]]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())
