"""Vectors in fewer bits, as sentence-transformers defines them: int8, uint8, binary and ubinary."""

from __future__ import annotations

from typing import Any

import numpy as np
from f2gguf.runtime.errors import UnknownName, WrongUsage
from f2gguf.runtime.gguf.header import Header
from numpy.typing import NDArray

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
SCALED = ("int8", "uint8")  # which need ranges
_STEPS = 255


def require_precision(precision: str, header: Header, width: int, *, is_normalized: bool) -> NDArray[np.float32] | None:
    """The ranges that `quantized` needs for vectors of a file, (2, width), or None where it needs none.

    Raises `UnknownName` for no precision, and `WrongUsage` for int8 and uint8 where the file has no ranges, or the
    vectors are not of length 1, as those are which the ranges are of.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if precision not in SCALED:
        return None
    if not is_normalized:
        raise WrongUsage(
            f"{precision}: {header.path} states ranges for vectors of length 1, and these are not normalised. Pass "
            "normalize_embeddings=True (without --no-normalize)."
        )
    if (ranges := header.ranges(width)) is None:
        raise WrongUsage(
            f"{precision}: {header.path} states no ranges for it, and those of a batch would make a vector depend on "
            "its batch. Make the file again with `quantize all MODEL --force`, or take float32, binary or ubinary."
        )
    return ranges


def quantized(vectors: NDArray[np.float32], precision: str, ranges: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Vectors (n, width) in another precision; `ranges` (2, width): least and greatest number of each column.

    int8 and uint8: a column's range is divided into 255 steps, and numbers outside it are clipped. binary and ubinary:
    a bit for each number, set where it is positive, eight to an int8 (less 128) or uint8: (n, width / 8), rounded up.

    >>> quantized(np.array([[-1.0, 0.5, 2.0]]), "uint8", np.array([[-1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    array([[  0, 127, 255]], dtype=uint8)

    Source: `quantize_embeddings` of sentence-transformers, with `ranges`.
    """
    if precision in ("float32", "float16"):
        return vectors.astype(precision, copy=False)
    if precision in SCALED:
        assert ranges is not None
        steps = _steps(ranges)
        with np.errstate(over="ignore"):  # where a range is hardly any: clipped like all that is outside
            codes = np.clip(np.floor((vectors - ranges[0]) / steps), 0, _STEPS)
        return np.asarray(codes, np.uint8) if precision == "uint8" else np.asarray(codes - 128, np.int8)
    bits = np.packbits(vectors > 0, axis=-1)
    return np.asarray(bits if precision == "ubinary" else (bits - 128).astype(np.int8))


def restored(codes: NDArray[np.uint8], ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors that uint8 codes stand for, (n, width): the middles of their steps."""
    return np.asarray((codes + np.float32(0.5)) * _steps(ranges) + ranges[0], dtype=np.float32)


def _steps(ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    steps = (ranges[1] - ranges[0]) / np.float32(_STEPS)
    return np.where(steps == 0, np.float32(1), steps)
