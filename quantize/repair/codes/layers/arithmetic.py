"""Parts of layers in plain arithmetic: norms, activations, RoPE, attention. Arrays are numpy's, or torch's tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from f2gguf.quantize.repair.tensors import Rows, slices
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.packing import Ids
from numpy.typing import NDArray

# Yields names of matrices, without 'blk.N.' and '.weight', and their common inputs (n_tokens, n_cols), and is sent the
# products; at the end no names and what leaves the layer, (n_tokens, n_embd).
Layer = Generator[tuple[tuple[str, ...], Rows], Any, None]


@dataclass(frozen=True)
class Texts:
    """Token ids of texts, the shortest first and one after another; attention takes texts of one length at a time."""

    order: tuple[int, ...]  # places of the texts in what was given
    ids: Ids  # (n_tokens,)
    groups: tuple[tuple[int, int], ...]  # number of texts, length of each

    @classmethod
    def of(cls, ids: Sequence[Ids]) -> Texts:
        lengths = np.array([len(text) for text in ids])
        order = np.argsort(lengths, kind="stable")
        different, counts = np.unique(lengths, return_counts=True)
        groups = tuple(zip(counts.tolist(), different.tolist(), strict=True))
        return cls(tuple(order.tolist()), np.concatenate([ids[i] for i in order]), groups)

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Length of each text, (n_texts,), in this order."""
        return np.repeat([length for _, length in self.groups], [n for n, _ in self.groups])

    @property
    def positions(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Position of each token in its text, (n_tokens,)."""
        return np.concatenate([np.tile(np.arange(length), n) for n, length in self.groups])


@dataclass(frozen=True)
class Shape:
    """What the header says of a model's layers, and which of them is meant."""

    header: Header
    layer: int = 0

    def at(self, layer: int) -> Shape:
        return replace(self, layer=layer)

    def value(self, key: str, default: Any = None) -> Any:
        return self.header.values.get(f"{self.header.architecture}.{key}", default)

    @property
    def n_layers(self) -> int:
        return int(self.value("block_count"))

    @property
    def n_head(self) -> int:
        return int(self.value("attention.head_count"))

    @property
    def n_head_kv(self) -> int:
        return int(self.value("attention.head_count_kv", self.n_head))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of heads of queries, keys and values."""
        return self.n_head, self.n_head_kv, self.n_head_kv


def silu_times(gate: Rows, up: Rows) -> Rows:
    """silu(gate) * up."""
    tanh = library_of(gate).tanh  # a power could overflow
    product: Rows = gate / 2 * (1 + tanh(gate / 2)) * up
    return product


def gelu(up: Rows) -> Rows:
    """GELU by its tanh approximation, as ggml computes it for every model."""
    tanh = library_of(up).tanh
    result: Rows = up / 2 * (1 + tanh(0.7978845608028654 * up * (1 + 0.044715 * up * up)))
    return result


def gelu_times(gate: Rows, up: Rows) -> Rows:
    """gelu(gate) * up."""
    product: Rows = gelu(gate) * up
    return product


def by_rows(function: Callable[..., Rows], *values: Rows) -> Rows:
    """`function` of arrays of one shape, some rows at a time: its steps would each take as much memory as the whole."""
    if library_of(values[0]) is not np:
        return function(*values)
    result = np.empty_like(values[0])
    for part in slices(len(result)):
        result[part] = function(*(value[part] for value in values))
    return result


def library_of(values: Any) -> Any:
    """numpy, or torch for its tensors."""
    return np if isinstance(values, np.ndarray) else sys.modules["torch"]


def _beside(values: Any, constant: Rows) -> Any:
    """`constant` as the library and the device of `values` take it."""
    return constant if isinstance(values, np.ndarray) else values.new_tensor(constant)


def heads(rows: Rows, n_heads: int) -> Rows:
    """Rows (n_tokens, n_heads * width) as (n_tokens, n_heads, width)."""
    return rows.reshape(rows.shape[0], n_heads, -1)


def rms_norm(values: Rows, weight: Rows, epsilon: float) -> Rows:
    """Values (..., n) over the root of their mean square, times `weight` (n,)."""
    normed: Rows = values / ((values * values).mean(axis=-1, keepdims=True) + epsilon) ** 0.5 * weight
    return normed


def layer_norm(values: Rows, weights: Mapping[str, Rows], name: str, epsilon: float) -> Rows:
    """The norm `name`, which some models have without a bias."""
    values = values - values.mean(axis=-1, keepdims=True)
    normed = rms_norm(values, weights[f"{name}.weight"], epsilon)
    return normed + weights[f"{name}.bias"] if f"{name}.bias" in weights else normed


def rotated(heads: Rows, texts: Texts, base: float) -> Rows:
    """Heads (n_tokens, n_heads, width) turned by their position (RoPE); value i pairs with value i + width / 2."""
    half = heads.shape[-1] // 2
    angles = texts.positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = (_beside(heads, turn(angles).astype(np.float32)[:, None]) for turn in (np.cos, np.sin))
    first, second = heads[..., :half], heads[..., half:]
    turned: Rows = library_of(heads).concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned


def rotated_pairs(heads: Rows, texts: Texts, base: float) -> Rows:
    """`rotated`, where value 2i pairs with value 2i + 1. The values come in another order, the same for every head."""
    in_halves: Rows = library_of(heads).concatenate([heads[..., ::2], heads[..., 1::2]], axis=-1)
    return rotated(in_halves, texts, base)


def attention(query: Rows, key: Rows, value: Rows, texts: Texts, is_causal: bool, *, window: int | None = None) -> Rows:
    """Every head's mix of the values, (n_tokens, n_heads * width).

    A causal `window` of 128 shows a token itself and the 127 before it; one that is not, 64 tokens on each side.
    """
    results, library = [], library_of(query)
    n_times = query.shape[1] // key.shape[1]
    for queries, keys, values in zip(*(by_length(part, texts) for part in (query, key, value)), strict=True):
        n_texts, length, _, width = queries.shape
        # (n_texts, n_head_kv, n_times * length, width): heads that share keys are rows of one product
        rows = queries.reshape(n_texts, length, -1, n_times, width).swapaxes(1, 2).swapaxes(2, 3)
        rows = rows.reshape(n_texts, -1, n_times * length, width)
        scores = rows @ keys.swapaxes(1, 2).swapaxes(2, 3) / width**0.5
        hidden = _hidden(length, is_causal, window)
        if hidden.any():
            mask = np.where(hidden, np.float32(-np.inf), np.float32(0))
            scores = scores + _beside(scores, np.tile(mask, (n_times, 1)))
        scores = library.exp(scores - library.amax(scores, axis=-1, keepdims=True))
        mixed = scores / scores.sum(axis=-1, keepdims=True) @ values.swapaxes(1, 2)
        mixed = mixed.reshape(n_texts, -1, n_times, length, width).swapaxes(2, 3).swapaxes(1, 2)
        results.append(mixed.reshape(n_texts * length, -1))
    joined: Rows = library.concatenate(results)
    return joined


def _hidden(length: int, is_causal: bool, window: int | None) -> NDArray[np.bool_]:
    """Which tokens (columns) a token (row) does not see, (length, length)."""
    back = np.arange(length)[:, None] - np.arange(length)
    hidden: NDArray[np.bool_] = np.abs(back) > (window // 2 if window else length)
    if is_causal:
        hidden = (back < 0) | (back >= (window or length))
    return hidden


def by_length(rows: Rows, texts: Texts) -> list[Rows]:
    """Rows (n_tokens, ...) as one (n_texts, length, ...) for each group of texts."""
    parts, begin = [], 0
    for n_texts, length in texts.groups:
        parts.append(rows[begin : begin + n_texts * length].reshape(n_texts, length, *rows.shape[1:]))
        begin += n_texts * length
    return parts
