"""A model's layers as plain arithmetic, so that a layer can be run before the next one is quantised.

A layer is a generator: it yields the inputs of each group of products, and is sent the products. Whoever drives it
decides with which weights, and with inputs rounded or not, they are computed, and whether by numpy or by torch, which
follows the derivatives. Sources: llama.cpp, src/models/qwen3.cpp and bert.cpp.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from f2gguf.quantize.repair.tensors import Rows, Weights, as_stored, slices
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.packing import Ids

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
    """What the header says of a model's layers."""

    header: Header

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


def _qwen3(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon, base = shape.value("attention.layer_norm_rms_epsilon"), shape.value("rope.freq_base")
    normed = _rms_norm(states, weights["attn_norm.weight"], epsilon)
    query, key, value = yield ("attn_q", "attn_k", "attn_v"), normed
    query, key, value = (_heads(part, n) for part, n in zip((query, key, value), _counts(shape), strict=True))
    query, key = (
        _rotated(_rms_norm(part, weights[f"{name}_norm.weight"], epsilon), texts, base)
        for name, part in (("attn_q", query), ("attn_k", key))
    )
    (mixed,) = yield ("attn_output",), _attention(query, key, value, texts, shape.header.is_causal)
    states = states + mixed
    normed = _rms_norm(states, weights["ffn_norm.weight"], epsilon)
    gate, up = yield ("ffn_gate", "ffn_up"), normed
    gate = _by_rows(_silu_times, gate, up)
    del up
    (down,) = yield ("ffn_down",), gate
    yield (), states + down


def _bert(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon = shape.value("attention.layer_norm_epsilon")
    parts = yield ("attn_q", "attn_k", "attn_v"), states
    query, key, value = (_heads(part, shape.n_head) for part in parts)
    (mixed,) = yield ("attn_output",), _attention(query, key, value, texts, shape.header.is_causal)
    states = _layer_norm(states + mixed, weights, "attn_output_norm", epsilon)
    (up,) = yield ("ffn_up",), states
    up = _by_rows(_gelu, up)
    (down,) = yield ("ffn_down",), up
    yield (), _layer_norm(states + down, weights, "layer_output_norm", epsilon)


_LAYERS: dict[str, Callable[..., Layer]] = {"qwen3": _qwen3, "bert": _bert}


def has_layers(header: Header) -> bool:
    """Whether the layers of this architecture are known here."""
    return header.architecture in _LAYERS


def run_layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    """One layer: `weights` are its vectors by their names without 'blk.N.', `states` is (n_tokens, n_embd)."""
    return _LAYERS[shape.header.architecture](weights, states, texts, shape)


def first_states(weights: Weights, texts: Texts, types: Mapping[str, str]) -> Rows:
    """What enters the first layer, (n_tokens, n_embd), with the tables in `types`."""

    def rows(name: str, chosen: Any) -> Rows:
        taken = weights.picked(name, chosen)
        return as_stored(taken, types[name]) if name in types else taken

    different, index = np.unique(texts.ids, return_inverse=True)
    states = rows("token_embd.weight", different)[index]
    if weights.header.architecture == "bert":
        states = states + rows("position_embd.weight", texts.positions) + rows("token_types.weight", np.array([0]))
        norm = {f"norm.{part}": weights.rows(f"token_embd_norm.{part}")[0] for part in ("weight", "bias")}
        states = _layer_norm(states, norm, "norm", Shape(weights.header).value("attention.layer_norm_epsilon"))
    return states


def final_norm(weights: Mapping[str, Rows], states: Rows, shape: Shape) -> Rows:
    """What the pooling takes of what leaves the last layer, (n_tokens, n_embd); `weights` has 'output_norm.weight'."""
    if "output_norm.weight" not in weights:
        return states
    return _rms_norm(states, weights["output_norm.weight"], shape.value("attention.layer_norm_rms_epsilon"))


def pooled(states: Rows, texts: Texts, pooling: str) -> Rows:
    """The states of texts as one row each, (n_texts, n_embd), for the pooling 'last', 'cls' or 'mean'."""
    parts = _by_length(states, texts)
    places = {"last": -1, "cls": 0}
    rows = [part[:, places[pooling]] if pooling in places else part.mean(axis=1) for part in parts]
    joined: Rows = _library(states).concatenate(rows)
    return joined


def _silu_times(gate: Rows, up: Rows) -> Rows:
    tanh = _library(gate).tanh  # a power could overflow
    product: Rows = gate / 2 * (1 + tanh(gate / 2)) * up
    return product


def _gelu(up: Rows) -> Rows:
    tanh = _library(up).tanh
    result: Rows = up / 2 * (1 + tanh(0.7978845608028654 * up * (1 + 0.044715 * up * up)))
    return result


def _by_rows(function: Callable[..., Rows], *values: Rows) -> Rows:
    """`function` of arrays of one shape, some rows at a time: its steps would each take as much memory as the whole."""
    if _library(values[0]) is not np:
        return function(*values)
    result = np.empty_like(values[0])
    for part in slices(len(result)):
        result[part] = function(*(value[part] for value in values))
    return result


def _library(values: Any) -> Any:
    """numpy, or torch for its tensors."""
    return np if isinstance(values, np.ndarray) else sys.modules["torch"]


def _beside(values: Any, constant: Rows) -> Any:
    """`constant` as the library and the device of `values` take it."""
    return constant if isinstance(values, np.ndarray) else values.new_tensor(constant)


def _counts(shape: Shape) -> tuple[int, int, int]:
    return shape.n_head, shape.n_head_kv, shape.n_head_kv


def _heads(rows: Rows, n_heads: int) -> Rows:
    return rows.reshape(rows.shape[0], n_heads, -1)


def _rms_norm(values: Rows, weight: Rows, epsilon: float) -> Rows:
    normed: Rows = values / ((values * values).mean(axis=-1, keepdims=True) + epsilon) ** 0.5 * weight
    return normed


def _layer_norm(values: Rows, weights: Mapping[str, Rows], name: str, epsilon: float) -> Rows:
    values = values - values.mean(axis=-1, keepdims=True)
    return _rms_norm(values, weights[f"{name}.weight"], epsilon) + weights[f"{name}.bias"]


def _rotated(heads: Rows, texts: Texts, base: float) -> Rows:
    """Heads (n_tokens, n_heads, width) turned by their position (RoPE); value i pairs with value i + width / 2."""
    half = heads.shape[-1] // 2
    angles = texts.positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = (_beside(heads, turn(angles).astype(np.float32)[:, None]) for turn in (np.cos, np.sin))
    first, second = heads[..., :half], heads[..., half:]
    turned: Rows = _library(heads).concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned


def _attention(query: Rows, key: Rows, value: Rows, texts: Texts, is_causal: bool) -> Rows:
    """Every head's mix of the values, (n_tokens, n_heads * width)."""
    results, library = [], _library(query)
    n_times = query.shape[1] // key.shape[1]
    for queries, keys, values in zip(*(_by_length(part, texts) for part in (query, key, value)), strict=True):
        n_texts, length, _, width = queries.shape
        # (n_texts, n_head_kv, n_times * length, width): heads that share keys are rows of one product
        rows = queries.reshape(n_texts, length, -1, n_times, width).swapaxes(1, 2).swapaxes(2, 3)
        rows = rows.reshape(n_texts, -1, n_times * length, width)
        scores = rows @ keys.swapaxes(1, 2).swapaxes(2, 3) / width**0.5
        if is_causal:
            hidden = np.triu(np.full((length, length), -np.inf, dtype=np.float32), 1)
            scores = scores + _beside(scores, np.tile(hidden, (n_times, 1)))
        scores = library.exp(scores - library.amax(scores, axis=-1, keepdims=True))
        mixed = scores / scores.sum(axis=-1, keepdims=True) @ values.swapaxes(1, 2)
        mixed = mixed.reshape(n_texts, -1, n_times, length, width).swapaxes(2, 3).swapaxes(1, 2)
        results.append(mixed.reshape(n_texts * length, -1))
    joined: Rows = library.concatenate(results)
    return joined


def _by_length(rows: Rows, texts: Texts) -> list[Rows]:
    """Rows (n_tokens, ...) as one (n_texts, length, ...) for each group of texts."""
    parts, begin = [], 0
    for n_texts, length in texts.groups:
        parts.append(rows[begin : begin + n_texts * length].reshape(n_texts, length, *rows.shape[1:]))
        begin += n_texts * length
    return parts
