"""Whether llama.cpp's kernels for AMX are right here: a child process tries them, once for a library and a processor.

Many builds of llama.cpp's end the process in the first product. ggml_tile_config_init in ggml/src/ggml-cpu/amx/mmq.cpp
fills a configuration on the stack, and GCC 12 drops all stores but those of its first 16 bytes, because its own
_tile_loadconfig states that so few are read. With -fno-tree-dse -fno-dse it keeps them. A library does not say what
compiled it. llama-cpp-python 0.3.36 still has that code: https://github.com/ggml-org/llama.cpp/issues/20824.
"""

from __future__ import annotations

import resource
from functools import cache

import llama_cpp
from f2gguf.runtime.llama.kernels.buffers import AMX, extra_buffers
from f2gguf.runtime.llama.kernels.trial import RIGHT, products_are_right, tried

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS")  # that have such kernels, but for F16
_CODE = f"from {__name__} import main; main()"
_TOLERANCE = 1e-3  # of the largest product: both kernels round inputs to 8 bits, by their own blocks


def is_built_in() -> bool:
    """Whether llama.cpp was compiled for AMX."""
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


@cache
def works() -> bool:
    """Whether products on AMX end well and are right; what the child process found is remembered."""
    return is_built_in() and AMX in extra_buffers() and tried("amx", _CODE)


def main() -> None:
    """The child process. A crash of it leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(RIGHT if products_are_right(extra_buffers()[AMX], TYPES, tolerance=_TOLERANCE) else "wrong")
