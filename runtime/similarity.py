"""How similar vectors are: cosines, of all pairs or row by row."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from f2gguf.runtime.calls import described
from f2gguf.runtime.errors import InputError
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def similarity(embeddings1: Any, embeddings2: Any) -> Any:
    """Cosine of every row of one with every row of the other, (n1, n2) float32.

    >>> similarity([[3.0, 4.0]], [[4.0, 3.0], [-3.0, -4.0]])    # [[0.96, -1.0]]

    Both are vectors (n, n_dims) or (n_dims,): arrays, lists, or tensors, which give a tensor. A vector of zeros has the
    cosine 0. Raises `InputError` for anything else, such as texts, and for vectors of different widths.
    """
    left, right = _comparable(embeddings1, embeddings2)
    return _as_given(left @ right.T, embeddings1, embeddings2)


def similarity_pairwise(embeddings1: Any, embeddings2: Any) -> Any:
    """Cosine of each row of one with the same row of the other, (n,) float32. See `similarity`."""
    left, right = _comparable(embeddings1, embeddings2)
    if len(left) != len(right):
        raise InputError(f"vectors to compare row by row: {len(left)} and {len(right)} of them.")
    return _as_given(np.einsum("ij,ij->i", left, right), embeddings1, embeddings2)


def _comparable(embeddings1: Any, embeddings2: Any) -> tuple[Rows, Rows]:
    left, right = _unit_rows(embeddings1), _unit_rows(embeddings2)
    if left.shape[1] != right.shape[1]:
        raise InputError(f"vectors to compare: {left.shape[1]} and {right.shape[1]} dimensions.")
    return left, right


def _unit_rows(embeddings: Any) -> Rows:
    """Rows of length 1, (n, n_dims); zeros stay zeros."""
    if _has_tensors(embeddings):
        import torch

        tensor = torch.stack(embeddings) if isinstance(embeddings, list) else embeddings
        embeddings = tensor.detach().float().cpu().numpy()
    try:
        rows = np.atleast_2d(np.asarray(embeddings))
    except ValueError as error:  # rows of different lengths
        raise InputError(f"vectors to compare: {error}.") from error
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise InputError(f"vectors to compare: {described(embeddings)} are none. Texts become vectors by `encode`.")
    rows = rows.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms == 0, 1, norms))


def _as_given(scores: Rows, *given: Any) -> Any:
    """Scores of tensors are a tensor."""
    if not any(map(_has_tensors, given)):
        return scores
    import torch

    return torch.from_numpy(scores)


def _has_tensors(embeddings: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there are none
    first = embeddings[0] if isinstance(embeddings, list) and embeddings else embeddings
    return torch is not None and isinstance(first, torch.Tensor)
