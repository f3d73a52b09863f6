"""Whether kernels for AMX are right here: a child process tries them, once for a library and a processor.

Many builds of llama.cpp's end the process in the first product. ggml_tile_config_init in ggml/src/ggml-cpu/amx/mmq.cpp
fills a configuration on the stack, and GCC 12 drops all stores but those of its first 16 bytes, because its own
_tile_loadconfig states that so few are read. With -fno-tree-dse -fno-dse it keeps them. A library does not say what
compiled it. llama-cpp-python 0.3.36 still has that code: https://github.com/ggml-org/llama.cpp/issues/20824.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from f2gguf.runtime.files import recall, remember
from f2gguf.runtime.llama.kernels.buffers import AMX, NUMBERS, InitParams, extra_buffers
from f2gguf.runtime.llama.library import libggml
from numpy.typing import NDArray

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS")  # that have such kernels, but for F16
RIGHT = "right"  # what the child prints
_CODE = f"from {__name__} import main; main()"
_TIMEOUT_S = 60
_CRASHES = (-signal.SIGILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGABRT)
_N_ROWS, _N_COLS, _N_TOKENS = 64, 512, 48  # more than one tile of each, so that several threads have work
_TOLERANCE = 1e-3  # of the largest product: both kernels round inputs to 8 bits, by their own blocks


def is_built_in() -> bool:
    """Whether llama.cpp was compiled for AMX."""
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


@cache
def works() -> bool:
    """Whether products on AMX end well and are right; what the child process found is remembered."""
    return is_built_in() and AMX in extra_buffers() and tried("amx", _CODE)


def tried(name: str, code: str) -> bool:
    """Whether a child process that runs `code` says `RIGHT`. It is remembered where it ended by itself or crashed."""
    stamp = [library_stamp(), platform.node(), _processor()]
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


def main() -> None:
    """The child process. A crash of it leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(RIGHT if are_right(extra_buffers()[AMX]) else "wrong")


def are_right(
    buffer_type: int, types: Sequence[str] = TYPES, *, backend: int | None = None, tolerance: float | None = None
) -> bool:
    """Whether matrices of `types` have the products that they have on the CPU in plain buffers. It may not return.

    They lie in buffers of a type, and a `backend` takes what it supports before the CPU.
    """
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((_N_ROWS, _N_COLS), dtype=np.float32)
    inputs = generator.standard_normal((_N_TOKENS, _N_COLS), dtype=np.float32)
    plain = libggml.ggml_backend_cpu_buffer_type()
    for kind in types:
        wanted = products(matrix, kind, inputs, plain)
        found = products(matrix, kind, inputs, buffer_type, backend)
        if not np.abs(found - wanted).max() <= (tolerance or _TOLERANCE) * np.abs(wanted).max():
            return False
    return True


def products(
    matrix: NDArray[np.float32], kind: str, inputs: NDArray[np.float32], buffer_type: int, backend: int | None = None
) -> NDArray[np.float32]:
    """`inputs` (n_tokens, n_cols) times a matrix (n_rows, n_cols) in a type, (n_tokens, n_rows), on several threads.

    Nothing is freed.
    """
    weights, others = (libggml.ggml_init(InitParams(1 << 20, None, True)) for _ in range(2))
    n_rows, n_cols = matrix.shape
    left = libggml.ggml_new_tensor_2d(weights, NUMBERS[kind], n_cols, n_rows)
    libggml.ggml_set_name(left, b"blk.0.ffn_up.weight")
    right = libggml.ggml_new_tensor_2d(others, 0, n_cols, len(inputs))
    result = libggml.ggml_mul_mat(others, left, right)
    graph = libggml.ggml_new_graph(others)
    libggml.ggml_build_forward_expand(graph, result)
    backends = [*([backend] if backend else []), libggml.ggml_backend_init_by_type(0, None)]  # the CPU comes last
    libggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
    libggml.ggml_backend_alloc_ctx_tensors(others, backends[-1])
    data = np.empty(libggml.ggml_nbytes(left), dtype=np.uint8)
    libggml.ggml_quantize_chunk(NUMBERS[kind], _pointer(matrix), _pointer(data), 0, n_rows, n_cols, None)
    libggml.ggml_backend_tensor_set(left, _pointer(data), 0, data.nbytes)
    libggml.ggml_backend_tensor_set(right, _pointer(inputs), 0, inputs.nbytes)
    found = np.full((len(inputs), n_rows), np.nan, dtype=np.float32)
    array = (ctypes.c_void_p * len(backends))(*backends)
    scheduler = libggml.ggml_backend_sched_new(array, None, len(backends), 64, False, False)
    if libggml.ggml_backend_sched_graph_compute(scheduler, graph) == 0:
        libggml.ggml_backend_tensor_get(result, _pointer(found), 0, found.nbytes)
    return found


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def library_stamp() -> list[list[Any]]:
    """Values of which one changes when another build takes its place."""
    files = sorted(Path(libggml._name).parent.glob("*ggml*"))
    return [[str(path), it.st_size, it.st_mtime_ns] for path in files for it in [path.stat()]]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())
