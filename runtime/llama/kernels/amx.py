"""Whether llama.cpp's kernels for AMX are right here: a child process tries them, once for a library and a processor.

Many builds of them end the process in the first product. ggml_tile_config_init (ggml/src/ggml-cpu/amx/mmq.cpp) fills a
configuration on the stack, and GCC 12 drops all stores but those of its first 16 bytes, because its own
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
_RIGHT = "right"  # what the child prints
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
    if not is_built_in() or AMX not in extra_buffers():
        return False
    stamp = [_library_stamp(), platform.node(), _processor()]
    known, found = recall("amx") or (None, False)
    if known != stamp:
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-c", _CODE], capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        found = child.returncode == 0 and child.stdout.strip() == _RIGHT
        if child.returncode in (0, *_CRASHES):  # otherwise it ended for reasons that are not the kernels'
            remember("amx", [stamp, found])
    return bool(found)


def main() -> None:
    """The child process. A crash of it leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(_RIGHT if are_right(extra_buffers()[AMX]) else "wrong")


def are_right(buffer_type: int, types: Sequence[str] = TYPES) -> bool:
    """Whether matrices of `types` have the same products in buffers of a type as in plain ones. It may not return."""
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((_N_ROWS, _N_COLS), dtype=np.float32)
    inputs = generator.standard_normal((_N_TOKENS, _N_COLS), dtype=np.float32)
    plain = libggml.ggml_backend_cpu_buffer_type()
    for kind in types:
        wanted, found = (_products(matrix, NUMBERS[kind], inputs, it) for it in (plain, buffer_type))
        if not np.abs(found - wanted).max() <= _TOLERANCE * np.abs(wanted).max():
            return False
    return True


def _products(
    matrix: NDArray[np.float32], kind: int, inputs: NDArray[np.float32], buffer_type: int
) -> NDArray[np.float32]:
    """`inputs` (n_tokens, n_cols) times a matrix (n_rows, n_cols) in a type, (n_tokens, n_rows), on several threads.

    Nothing is freed.
    """
    weights, others = (libggml.ggml_init(InitParams(1 << 20, None, True)) for _ in range(2))
    n_rows, n_cols = matrix.shape
    left = libggml.ggml_new_tensor_2d(weights, kind, n_cols, n_rows)
    right = libggml.ggml_new_tensor_2d(others, 0, n_cols, len(inputs))
    result = libggml.ggml_mul_mat(others, left, right)
    graph = libggml.ggml_new_graph(others)
    libggml.ggml_build_forward_expand(graph, result)
    backend = libggml.ggml_backend_init_by_type(0, None)  # the CPU
    libggml.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
    libggml.ggml_backend_alloc_ctx_tensors(others, backend)
    data = np.empty(libggml.ggml_nbytes(left), dtype=np.uint8)
    libggml.ggml_quantize_chunk(kind, _pointer(matrix), _pointer(data), 0, n_rows, n_cols, None)
    libggml.ggml_backend_tensor_set(left, _pointer(data), 0, data.nbytes)
    libggml.ggml_backend_tensor_set(right, _pointer(inputs), 0, inputs.nbytes)
    products = np.full((len(inputs), n_rows), np.nan, dtype=np.float32)
    if libggml.ggml_backend_graph_compute(backend, graph) == 0:
        libggml.ggml_backend_tensor_get(result, _pointer(products), 0, products.nbytes)
    return products


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _library_stamp() -> list[list[Any]]:
    """Values of which one changes when another build takes its place."""
    files = sorted(Path(libggml._name).parent.glob("*ggml*"))
    return [[str(path), it.st_size, it.st_mtime_ns] for path in files for it in [path.stat()]]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())
