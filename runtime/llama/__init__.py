"""llama.cpp: text becomes token ids, token ids become raw vectors."""

import os

from f2gguf.runtime.errors import LlamaCppMissing

try:
    import llama_cpp as llama_cpp
except (AttributeError, ImportError, OSError, RuntimeError) as error:  # all that llama-cpp-python's loader raises
    _folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    _first = f"Unset LLAMA_CPP_LIB_PATH, which names {_folder}, or build" if _folder else "Build"
    raise LlamaCppMissing(
        f"llama.cpp's library cannot be loaded: {error}. {_first} it on this machine, with the packages that it needs "
        "(Debian: apt install g++ libgomp1):\n"
        "  pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    ) from error
