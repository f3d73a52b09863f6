"""A .gguf file becomes vectors."""

from typing import TYPE_CHECKING, Any

from f2gguf.runtime.errors import F2ggufError

if TYPE_CHECKING:
    from f2gguf.runtime.embedder import Embedder

__all__ = ["Embedder", "F2ggufError"]


def __getattr__(name: str) -> Any:
    """Load numpy and llama.cpp when `Embedder` is asked for, not for every `--help`."""
    if name == "Embedder":
        from f2gguf.runtime.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
