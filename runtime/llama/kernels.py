"""Which matrices llama.cpp repacks for its CPU kernels, and which it leaves as they stand in the file.

On x86 it would also repack Q4_K, and so lose its tiled product, which is faster and takes K-quants as they are. Here
types are chosen instead. `scripts/kernels` measures both ways: on 2 cores with AVX-512, with layers of the 0.6B shape,
Q4_K does 3,191 tokens/s as it is and 2,277 repacked, Q4_0 1,490 and 2,110, IQ4_NL 1,419 and 2,055.

Nothing is measured at load: a llama.cpp that has AVX2 alone (ggml's -DGGML_NATIVE=OFF: no AVX-512, no VNNI) leads to
the same choice on the same processor. There, on a busy machine, `scripts/kernels --layers 1` gave
Q4_K 1,727 tokens/s as it is and 960 repacked, Q4_0 1,965 and 3,519, IQ4_NL 1,122 and 2,369.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import llama_cpp
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.library import libggml

REPACKED = ("Q4_0", "IQ4_NL", "MXFP4")
_N_ROWS = 8  # that are interleaved: llama.cpp repacks multiples of them
_MATRIX = re.compile(r"blk\.(\d+)\.(attn_(?:q|k|v|qkv|output)|ffn_(?:gate|up|down))\.weight")

libggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
libggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
libggml.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
libggml.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
libggml.ggml_backend_buft_name.argtypes = [ctypes.c_void_p]
libggml.ggml_backend_buft_name.restype = ctypes.c_char_p


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def repacked(header: Header, types: Iterable[str] = REPACKED) -> list[str]:
    """Names of the matrices of a file that are worth repacking on x86."""
    types = frozenset(types)
    return [
        tensor.name
        for tensor in header.tensors
        if tensor.type in types and _MATRIX.fullmatch(tensor.name) and tensor.shape[0] % _N_ROWS == 0
    ]


def describe_kernels(header: Header) -> str:
    """Which matrices are repacked on this machine's CPU, in words; without loading the file."""
    if _repacking_buffer() is None:
        return "as llama.cpp chooses on this processor"
    types = {tensor.name: tensor.type for tensor in header.tensors}
    if not (counts := Counter(types[name] for name in repacked(header))):
        return "no matrix is repacked on this processor: its types have faster kernels as they are"
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) + " matrices are repacked on this processor"


def repack(params: Any, names: Sequence[str]) -> bool:
    """Let a load with `params` repack the matrices `names` and no others; False where llama.cpp is left to choose."""
    buffer_type = _repacking_buffer()
    params.use_extra_bufts = buffer_type is None
    if buffer_type is None:
        return False
    patterns = _patterns(names)
    overrides = (_Override * (len(patterns) + 1))()  # ended by an empty one
    for override, pattern in zip(overrides, patterns, strict=False):
        override.pattern, override.buffer_type = pattern.encode(), buffer_type
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    params.kept_alive = overrides
    return True


def _repacking_buffer() -> int | None:
    """ggml's buffer type that repacks what is written to it; None where `REPACKED` was not measured: not on x86."""
    if b"AVX2 = 1" not in llama_cpp.llama_print_system_info():
        return None
    cpu = libggml.ggml_backend_reg_by_name(b"CPU")
    address = libggml.ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(None)
    buffer_types = itertools.takewhile(bool, (listed[i] for i in itertools.count()))
    return next((it for it in buffer_types if libggml.ggml_backend_buft_name(it) == b"CPU_REPACK"), None)


def _patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions that match `names` alone, and few of them: llama.cpp tries each on every tensor."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := _MATRIX.fullmatch(name):
            layers[match[2]].append(match[1])
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, numbers in layers.items():
        kinds["|".join(numbers)].append(kind)
    return [rf"^blk\.({numbers})\.({'|'.join(some)})\.weight$" for numbers, some in kinds.items()]
