"""f2gguf's own kernels (cpp/): compiled where they are first used, for the llama-cpp-python that is there.

They compute attention, norms and activations on AVX-512, and products on AMX, or else on VNNI and AVX-512.

They need headers and compiler because the interface of ggml's backends is that of one release. CHANGELOG.md says how
fast they are. F2GGUF_OWN_KERNELS=0 turns them off.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import threading
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from f2gguf.runtime.compiler import compiled, own_is_off
from f2gguf.runtime.llama.kernels.trial import (
    RIGHT,
    Array,
    are_close,
    layers_are_right,
    library_stamp,
    pointer_to,
    products_are_right,
    tried,
)
from f2gguf.runtime.llama.library import libggml
from f2gguf.runtime.llama.threads import cpu_flags

_FLOATS, _CODES = ("F16", "BF16"), ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS")
# What the processor has -> types of matrices, and what their products are computed on
PRODUCTS: dict[str, dict[str, str]] = {
    "AMX": dict.fromkeys((*_FLOATS, *_CODES), "AMX"),
    "VNNI": dict.fromkeys(("F32", *_FLOATS), "AVX-512") | dict.fromkeys(_CODES, "VNNI"),
    "AVX-512": dict.fromkeys(("F32", *_FLOATS), "AVX-512"),
    "": {},
}
NOT_COMPILED = (
    "f2gguf's own kernels could not be compiled: they need a C++ compiler with OpenMP (g++ 11, clang++ 12 or "
    "newer, in PATH or $CXX), the headers that llama-cpp-python installs, and a cache folder that can be written to"
)
_SOURCE = Path(__file__).with_name("cpp") / "backend.cpp"  # and the headers beside it
_HEADERS = Path(llama_cpp.__file__).parent.parent / "include"  # where llama-cpp-python installs ggml's
# What the processor must have, by Linux's names, and what it needs for products
_NEEDED = ("avx512bw", "avx512vl", "avx512dq", "f16c", "fma")
_FOR_TILES, _FOR_BYTES = ("amx_tile", "amx_bf16", "avx512_bf16"), ("avx512_vnni",)
_UNITS = [f"-m{it.replace('amx_', 'amx-').replace('avx512_', 'avx512')}" for it in (*_NEEDED, *_FOR_TILES, *_FOR_BYTES)]
_FLAGS = [*_UNITS, "-fopenmp"]
_SWITCHES = {"AVX-512": 0, "AMX": 1, "VNNI": 2}  # what f2gguf_switch takes
_API_VERSION = 2  # of ggml's backends, whose structs backend.cpp has
_TILE = 32  # columns and rows of a matrix that are multiplied together
_LOCK = threading.Lock()  # so that llama.cpp hears of them once
_CODE = f"from {__name__} import main; main()"
# Of the largest number: llama.cpp rounds a product's inputs to 8 bits, which moves products by 0.8%, and what else it
# computes by way of F16, which moves the trial's numbers by 0.02%
_PRODUCT_TOLERANCE, _LAYER_TOLERANCE = 0.02, 0.002
_FINE_TOLERANCE = 1e-4  # of products of 16 bits, which differ by 4e-6


class _Library(ctypes.CDLL):
    units = "AVX-512"  # the best that it computes products on here: AVX-512, VNNI, or AMX

    def switch(self, on: bool) -> None:
        self.f2gguf_switch(on, _SWITCHES[self.units])


def works() -> bool:
    """Whether these kernels are here and right."""
    with _LOCK:
        return not own_is_off() and _registered() is not None


def units() -> str:
    """The best that these kernels compute products on here: AMX, VNNI, AVX-512; nothing where they don't work."""
    return library.units if works() and (library := _registered()) else ""


def products() -> dict[str, str]:
    """Types of matrices whose products these kernels compute here, and on what."""
    return PRODUCTS[units()]


def switch(on: bool) -> None:
    """Let all contexts use these kernels from their next batch on, or none."""
    with _LOCK:
        if (on or _registered.cache_info().currsize) and (library := _registered()):
            library.switch(on)


def product(left: Array, right: Array, n_threads: int) -> Array | None:
    """left @ right, (n_rows, n) and (n, n_cols), to 16 bits; None where it cannot be had.

    `right` is a transposed array: its columns are contiguous, as the rows of `left` are.
    """
    fits = not (right.shape[0] % _TILE or right.shape[1] % _TILE)
    lies_so = left.flags.c_contiguous and right.flags.f_contiguous and left.dtype == right.dtype == np.float32
    return _product(_registered(), left, right, n_threads) if fits and lies_so and units() == "AMX" else None


def _product(library: _Library | None, left: Array, right: Array, n_threads: int) -> Array | None:
    result = np.empty((len(left), right.shape[1]), dtype=np.float32)
    pointers = [pointer_to(array) for array in (left, right, result)]
    numbers = len(left), right.shape[1], len(right)
    done = library and library.f2gguf_product(*pointers, *numbers, n_threads)
    return result if done else None


def cannot_be_compiled() -> bool:
    """Whether this processor could use them, but they cannot be compiled here."""
    return _could() and _compiled() is None


@cache
def _registered() -> _Library | None:
    """The library, whose backend llama.cpp knows; None where it cannot be had, or a child process found it wrong."""
    if not _could() or not (path := _compiled()) or not tried(path.stem, _CODE):
        return None
    library = _open(path)
    library.f2gguf_register()
    return library


def _could() -> bool:
    """Whether the processor has what they need, ggml's backends are as theirs, and llama.cpp's threads are OpenMP's."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not cpu_flags() >= set(_NEEDED):
        return False
    return _api_version() == _API_VERSION and b"OPENMP = 1" in llama_cpp.llama_print_system_info()


def _api_version() -> int | None:
    """What every backend states first (ggml/src/ggml-backend-impl.h, ggml_backend_reg)."""
    backend = libggml.ggml_backend_reg_by_name(b"CPU")
    return ctypes.c_int.from_address(backend).value if backend else None


@cache
def _compiled() -> Path | None:
    """The compiled library, in the cache folder; None without compiler, headers or a place to write to."""
    if not (_HEADERS / "ggml-backend.h").exists():
        return None
    more: list[str | Path] = ["-I", _HEADERS, "-L", Path(libggml._name).parent, "-lggml", "-lggml-base"]
    return compiled(_SOURCE, "own-kernels", _FLAGS, str(library_stamp()), more)


def _open(path: Path) -> _Library:
    library = _Library(str(path))
    library.f2gguf_may_use_tiles.restype = ctypes.c_bool
    library.f2gguf_switch.argtypes = [ctypes.c_bool, ctypes.c_int]
    library.f2gguf_backend.restype = ctypes.c_void_p
    library.f2gguf_product.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int]
    library.f2gguf_product.restype = ctypes.c_bool
    if cpu_flags() >= set(_FOR_TILES) and library.f2gguf_may_use_tiles():
        library.units = "AMX"
    elif cpu_flags() >= set(_FOR_BYTES):
        library.units = "VNNI"
    return library


def main() -> None:
    """The child process: all that the backend computes, through ggml's scheduler, against the CPU's."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = _compiled()
    print(RIGHT if path and _is_right(_open(path)) else "wrong")


def _is_right(library: _Library) -> bool:
    library.switch(True)
    backend = library.f2gguf_backend(2)
    return (
        layers_are_right(backend, tolerance=_LAYER_TOLERANCE)
        and products_are_right(None, list(PRODUCTS[library.units]), backend=backend, tolerance=_PRODUCT_TOLERANCE)
        and (library.units != "AMX" or _multiplies_floats(library))
    )


def _multiplies_floats(library: _Library) -> bool:
    left, right = (np.random.default_rng(0).standard_normal((n, 96), dtype=np.float32) for n in (70, 64))
    found = _product(library, left, right.T, 2)
    return found is not None and are_close(found, left @ right.T, _FINE_TOLERANCE)
