"""A .gguf file becomes vectors."""

import os
from typing import TYPE_CHECKING, Any

from f2gguf.runtime.errors import F2ggufError

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embedder

# GNU OpenMP reads this when llama.cpp is loaded. Its threads spin 300,000 times at each barrier: beside other work they
# take the core from the thread that they wait for (CHANGELOG). With 10,000 they do less of it, and are as fast alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["Embedder", "F2ggufError"]


def __getattr__(name: str) -> Any:
    """Load numpy and llama.cpp when `Embedder` is asked for, not for every `--help`."""
    if name == "Embedder":
        from f2gguf.runtime.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
