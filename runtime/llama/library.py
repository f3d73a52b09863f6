"""The llama.cpp library as a whole, through llama-cpp-python's C functions: its logs, devices and build."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator

import llama_cpp
from f2gguf.runtime.errors import DeviceMissing, UnknownName
from llama_cpp._ggml import libggml as libggml

for _name in ("ggml_version", "ggml_commit", "ggml_backend_reg_name"):
    getattr(libggml, _name).restype = ctypes.c_char_p
libggml.ggml_backend_reg_name.argtypes = [ctypes.c_void_p]
libggml.ggml_backend_reg_count.restype = ctypes.c_size_t
libggml.ggml_backend_reg_get.argtypes = [ctypes.c_size_t]
libggml.ggml_backend_reg_get.restype = ctypes.c_void_p
libggml.ggml_backend_dev_by_type.argtypes = [ctypes.c_int]
libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
libggml.ggml_backend_dev_memory.restype = None
# device -> names of the ggml backend that drives it, and the build flag that brings it
DEVICES: dict[str, tuple[tuple[str, ...], str]] = {
    "auto": ((), ""),
    "cpu": ((), ""),
    "metal": (("MTL", "Metal"), "-DGGML_METAL=on"),
    "cuda": (("CUDA",), "-DGGML_CUDA=on"),
}
OWN = "F2GGUF"  # f2gguf's own backend: a part of the CPU (kernels/own.py)
TORCH_NAMES = {"CUDA": "cuda", "ROCm": "cuda", "MTL": "mps", "Metal": "mps"}  # of ggml's backends
ERROR = 4  # ggml_log_level
_GPU = 1  # ggml_backend_dev_type: a card with memory of its own

# ggml replays a CUDA graph where a batch has the shape of the two before it, and gives an earlier batch's vectors: for
# 1,764 of 4,096 queries of all-MiniLM-L6-v2 on an H100. For a 0.6B shape in F16 it ended the process (ggml 0.25.3,
# CUDA 13.0). Without graphs every vector is right and no file is slower, because few batches have equal shapes.
os.environ.setdefault("GGML_CUDA_DISABLE_GRAPHS", "1")

_sinks: list[Callable[[int, str], None]] = []
_last_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", errors="replace")
    if level == ERROR:
        _last_errors.append(line)
    for sink in list(_sinks):
        sink(level, line)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _on_abort(message: bytes) -> None:
    """Say why ggml ends the process: its reason is in the log, which nobody would see otherwise."""
    lines = (f"llama.cpp ends the process: {message.decode(errors='replace')}", *map(str.strip, _last_errors))
    print(*lines, sep="\n", file=sys.stderr, flush=True)


llama_cpp.llama_log_set(_on_log, ctypes.c_void_p())
libggml.ggml_set_abort_callback(_on_abort)
llama_cpp.llama_backend_init()


def device_in_use(*, offloaded: bool) -> str:
    """Where a model computes, by torch's names where it has one: 'cpu', 'cuda', 'mps'."""
    if not offloaded:
        return "cpu"
    names = [name for name in backends() if name != "CPU"]
    return next((TORCH_NAMES[name] for name in names if name in TORCH_NAMES), names[0].lower())


def cuda_memory() -> tuple[int, int]:
    """Free and total bytes of the first card that CUDA drives; 0 and 0 without one."""
    device = libggml.ggml_backend_dev_by_type(_GPU)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if device and "CUDA" in backends():
        libggml.ggml_backend_dev_memory(device, free, total)
    return free.value, total.value


def ggml_build() -> str:
    """Version and commit of the ggml that llama.cpp was compiled with."""
    return f"{libggml.ggml_version().decode()} ({libggml.ggml_commit().decode()})"


@contextlib.contextmanager
def log_to(sink: Callable[[int, str], None]) -> Iterator[None]:
    """Send llama.cpp's log fragments (level, text) to `sink` while the block runs."""
    _sinks.append(sink)
    try:
        yield
    finally:
        _sinks.remove(sink)


@contextlib.contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collect what llama.cpp logs as errors while the block runs, each as one line."""
    lines: list[str] = []
    with log_to(lambda level, text: lines.append(" ".join(text.split())) if level == ERROR else None):
        yield lines


def require_device(device: str) -> None:
    """Raise `UnknownName` for no device, `DeviceMissing` where this build of llama.cpp lacks it."""
    if device not in DEVICES:
        raise UnknownName("device", device, DEVICES)
    names, flag = DEVICES[device]
    if names and not set(names) & set(backends()):
        raise DeviceMissing(
            f"--device {device}: this build of llama.cpp has only: {', '.join(backends())}. Reinstall with\n"
            f'  CMAKE_ARGS="{flag}" pip install --force-reinstall --no-cache-dir llama-cpp-python'
        )


def backends() -> list[str]:
    """Names of ggml's backends in this build, such as 'CPU' and 'CUDA', without f2gguf's own."""
    registered = map(libggml.ggml_backend_reg_get, range(libggml.ggml_backend_reg_count()))
    names = [libggml.ggml_backend_reg_name(backend).decode() for backend in registered]
    return [name for name in names if name != OWN]
