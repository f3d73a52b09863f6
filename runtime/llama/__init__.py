"""llama.cpp: text becomes token ids, token ids become raw vectors."""

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from f2gguf.runtime.errors import LlamaCppMissing


class _Bindings(ModuleType):
    """The package llama_cpp with its C functions; its classes, whose import takes 60 ms, where they are asked for."""

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name != "__version__") or not self.__spec__ or not self.__spec__.loader:
            raise AttributeError(f"module 'llama_cpp' has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _import_bindings() -> None:
    if "llama_cpp" in sys.modules or not (spec := importlib.util.find_spec("llama_cpp")):
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Bindings
    sys.modules["llama_cpp"] = package
    try:
        functions = importlib.import_module("llama_cpp.llama_cpp")
    except BaseException:
        del sys.modules["llama_cpp"]
        raise
    vars(package).update({name: value for name, value in vars(functions).items() if not name.startswith("_")})
    # It sets llama.cpp's log callback when it is imported: now, and not in place of library.py's with the classes
    importlib.import_module("llama_cpp._logger")


try:
    _import_bindings()
    import llama_cpp as llama_cpp
except (AttributeError, ImportError, OSError, RuntimeError) as error:  # all that llama-cpp-python's loader raises
    _folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    _first = f"Unset LLAMA_CPP_LIB_PATH, which names {_folder}, or build" if _folder else "Build"
    raise LlamaCppMissing(
        f"llama.cpp's library cannot be loaded: {error}. {_first} it on this machine, with the packages that it needs "
        "(Debian: apt install g++ libgomp1):\n"
        "  pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    ) from error
