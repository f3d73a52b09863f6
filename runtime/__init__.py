"""A .gguf file becomes vectors."""

import os
from typing import TYPE_CHECKING, Any

from f2gguf.runtime.errors import F2ggufError

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embedder

# GNU OpenMP reads this when llama.cpp is loaded. Its threads spin 300,000 times at each barrier: beside other work they
# take the core from the thread that they wait for. 250 texts of f2llm-nano beside two busy loops on 2 cores took 42 and
# 49 s, with 10,000 spins 10 and 2 s; on idle cores 1.05 and 0.97 s, and 1.05 and 1.03 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["Embedder", "F2ggufError"]


def __getattr__(name: str) -> Any:
    """Load numpy and llama.cpp when `Embedder` is asked for, not for every `--help`."""
    if name == "Embedder":
        from f2gguf.runtime.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
