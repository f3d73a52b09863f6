"""ggml's buffers that lay out weights anew for other CPU kernels, through its C functions."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

from f2gguf.runtime.gguf.reader import TENSOR_TYPES
from f2gguf.runtime.llama.library import libggml

REPACK, AMX = "CPU_REPACK", "AMX"  # as ggml names them
NUMBERS = {name: number for number, (name, *_) in TENSOR_TYPES.items()}  # of ggml's types of tensors


class InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _declare(name: str, result: Any, *arguments: Any) -> None:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments


_P, _N, _I64, _F = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_float
_declare("ggml_backend_reg_by_name", _P, ctypes.c_char_p)
_declare("ggml_backend_reg_get_proc_address", _P, _P, ctypes.c_char_p)
_declare("ggml_backend_buft_name", ctypes.c_char_p, _P)
_declare("ggml_backend_buft_get_alloc_size", _N, _P, _P)
_declare("ggml_init", _P, InitParams)
_declare("ggml_free", None, _P)
_declare("ggml_new_tensor_2d", _P, _P, ctypes.c_int, _I64, _I64)
_declare("ggml_new_tensor_4d", _P, _P, ctypes.c_int, _I64, _I64, _I64, _I64)
for _name in ("ggml_mul_mat", "ggml_add", "ggml_mul", "ggml_swiglu_split"):
    _declare(_name, _P, _P, _P, _P)
for _name in ("ggml_norm", "ggml_rms_norm"):
    _declare(_name, _P, _P, _P, _F)
_declare("ggml_gelu", _P, _P, _P)
_declare("ggml_flash_attn_ext", _P, _P, _P, _P, _P, _P, _F, _F, _F)
_declare("ggml_new_graph", _P, _P)
_declare("ggml_build_forward_expand", None, _P, _P)
_declare("ggml_nbytes", _N, _P)
_declare("ggml_quantize_chunk", _N, ctypes.c_int, _P, _P, _I64, _I64, _I64, _P)
_declare("ggml_backend_init_by_type", _P, ctypes.c_int, ctypes.c_char_p)
_declare("ggml_backend_cpu_buffer_type", _P)
_declare("ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
_declare("ggml_backend_alloc_ctx_tensors", _P, _P, _P)
_declare("ggml_backend_tensor_set", None, _P, _P, _N, _N)
_declare("ggml_backend_tensor_get", None, _P, _P, _N, _N)
_declare("ggml_set_name", _P, _P, ctypes.c_char_p)
_declare("ggml_backend_sched_new", _P, _P, _P, ctypes.c_int, _N, ctypes.c_bool, ctypes.c_bool)
_declare("ggml_backend_sched_graph_compute", ctypes.c_int, _P, _P)


def extra_buffers() -> dict[str, int]:
    """ggml's types of such buffers by their names, as addresses."""
    cpu = libggml.ggml_backend_reg_by_name(b"CPU")
    address = libggml.ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return {}
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(None)
    addresses = itertools.takewhile(bool, (listed[i] for i in itertools.count()))
    return {libggml.ggml_backend_buft_name(it).decode(): it for it in addresses if it}


def allocated_bytes(buffer_type: int, kind: str, shape: Sequence[int]) -> int:
    """What a matrix of (n_rows, n_cols) takes in a type of buffers."""
    context = libggml.ggml_init(InitParams(1 << 12, None, True))
    tensor = libggml.ggml_new_tensor_2d(context, NUMBERS[kind], shape[1], shape[0])
    n_bytes = int(libggml.ggml_backend_buft_get_alloc_size(buffer_type, tensor))
    libggml.ggml_free(context)
    return n_bytes
