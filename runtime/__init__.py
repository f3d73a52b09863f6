"""A .gguf file becomes vectors."""

from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import F2ggufError

__all__ = ["Embedder", "F2ggufError"]
