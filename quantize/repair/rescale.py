"""Channels scaled where that leaves the function as it is, so that quantisation hurts less.

A place is where one channel is written by some tensors and read by others: the writer's row divided and the readers'
columns multiplied by the same power of two change no product. Quantisation errors of a row do not depend on its scale;
those of a column do, since a block takes its step from its largest value. Source of the idea: AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from f2gguf.quantize.repair.assemble import Imatrix, Scale
from f2gguf.quantize.repair.imatrix import Activations
from f2gguf.quantize.repair.tensors import Rows, Weights, as_multiplied, as_stored
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.library import default_threads
from numpy.typing import NDArray

Exponents = tuple[float, float]  # of a channel's activation, and (negative) of its weights

NONE: Exponents = (0.0, 0.0)
# Tried at every place. Those whose sum is 1 undo any scaling that a channel was given, whatever its size.
GRID: tuple[Exponents, ...] = (
    NONE,
    (0.25, 0.0),
    (0.5, 0.0),
    (0.25, 0.25),
    (0.5, 0.5),
    (0.75, 0.25),
    (1.0, 0.0),
    (0.25, 0.75),
)
WORTH = 0.9  # scales must leave at most so much of the error without them
N_ROWS = 256  # of a matrix, in a trial
# A row smaller than this takes block scales that F16 holds badly: Q4_K keeps 1/470 of a row's largest value.
_SMALLEST_ROW, _LARGEST_COLUMN = 2.0**-9, 2.0**14


@dataclass(frozen=True)
class Place:
    """One kind of channel in one layer: which tensors write it (first) and which read it."""

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    heads: tuple[int, int, int] | None = None  # value channels: heads, KV heads, width of a head

    def to_writer(self, columns: NDArray[np.float64], merge: Callable[..., NDArray[np.float64]]) -> NDArray[np.float64]:
        """A figure of each reader's column for each writer's channel: heads that share a KV head are merged."""
        if self.heads is None:
            return columns
        n_head, n_head_kv, width = self.heads
        return merge(columns.reshape(n_head_kv, n_head // n_head_kv, width), axis=1).ravel()

    def to_reader(self, channels: NDArray[np.float64]) -> NDArray[np.float64]:
        """A figure of each writer's channel for each reader's column."""
        if self.heads is None:
            return channels
        n_head, n_head_kv, width = self.heads
        return np.repeat(channels.reshape(n_head_kv, 1, width), n_head // n_head_kv, axis=1).ravel()


def places(header: Header) -> list[Place]:
    """Every place of a model; none for an architecture without."""
    find = {"qwen3": _qwen3_places, "bert": _bert_places}.get(header.architecture)
    n_layers = int(header.values.get(f"{header.architecture}.block_count", 0))
    return [place for i in range(n_layers) for place in find(header, f"blk.{i}.")] if find else []


def _qwen3_places(header: Header, layer: str) -> list[Place]:
    matrices = {k: f"{layer}{k}.weight" for k in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")}
    return [
        Place(
            f"{layer}attn_norm",
            (f"{layer}attn_norm.weight",),
            tuple(matrices[k] for k in ("attn_q", "attn_k", "attn_v")),
        ),
        Place(f"{layer}value", (matrices["attn_v"],), (f"{layer}attn_output.weight",), _heads(header)),
        Place(f"{layer}ffn_norm", (f"{layer}ffn_norm.weight",), (matrices["ffn_gate"], matrices["ffn_up"])),
        Place(f"{layer}ffn", (matrices["ffn_up"],), (matrices["ffn_down"],)),
    ]


def _bert_places(header: Header, layer: str) -> list[Place]:
    writers = (f"{layer}attn_v.weight", f"{layer}attn_v.bias")
    return [Place(f"{layer}value", writers, (f"{layer}attn_output.weight",), _heads(header))]


def _heads(header: Header) -> tuple[int, int, int]:
    architecture, values = header.architecture, header.values
    n_head = int(values[f"{architecture}.attention.head_count"])
    n_head_kv = int(values.get(f"{architecture}.attention.head_count_kv", n_head))
    return n_head, n_head_kv, int(values.get(f"{architecture}.attention.value_length", header.n_embd // n_head))


def search(
    weights: Weights,
    activations: Activations,
    imatrix: Imatrix,
    types: Mapping[str, str],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Exponents]:
    """The exponents of GRID with the least error of what each place's readers give, on the sampled activations.

    Readers are quantised for real to their `types`, and activations rounded as llama.cpp's kernels do. Places where
    scales are not worth it are not in the result.
    """
    chosen = {}
    with ThreadPoolExecutor(default_threads()) as pool:
        for place in places(weights.header):
            trial = _Trial(weights, activations, imatrix, types, place)
            errors = list(pool.map(trial.error, GRID))
            best = int(np.argmin(errors))
            if errors[best] < WORTH * errors[GRID.index(NONE)]:
                chosen[place.name] = GRID[best]
            if on_progress:
                on_progress(1)
    return chosen


def scales(weights: Weights, imatrix: Imatrix, exponents: Mapping[str, Exponents]) -> dict[str, Scale]:
    """The factors of every tensor that `exponents` of places ask for; a function of its arguments alone."""
    found: dict[str, Scale] = {}
    for place in places(weights.header):
        if place.name not in exponents:
            continue
        channels = channels_of(weights, imatrix, place).factors(exponents[place.name])
        columns = place.to_reader(channels).astype(np.float32)
        for name in place.readers:
            found[name] = Scale(found[name].rows if name in found else None, columns)
        for name in place.writers:
            inverse = (1 / channels).astype(np.float32)
            is_vector = len(weights.infos[name].shape) == 1
            before = found[name].columns if name in found else None
            found[name] = Scale(None, inverse) if is_vector else Scale(inverse, before)
    return found


def scaled_imatrix(imatrix: Imatrix, scaled: Mapping[str, Scale]) -> Imatrix:
    """The importance matrix of the model with its channels scaled."""
    columns = {name: scale.columns for name, scale in scaled.items() if scale.columns is not None}
    return {name: row / columns[name] ** 2 if name in columns else row for name, row in imatrix.items()}


@dataclass(frozen=True)
class Channels:
    """What the factors of one place follow from, a figure for each channel, (n_channels,) float64."""

    activation: NDArray[np.float64]  # root mean square of the channel's values
    weight: NDArray[np.float64]  # root mean square of its columns
    largest: NDArray[np.float64]  # factor that neither makes rows too small for F16, nor columns too large

    def factors(self, exponents: Exponents) -> NDArray[np.float64]:
        """Power of two by which each channel is multiplied in the readers, (n_channels,) float64.

        activation ** exponents[0] / weight ** exponents[1], over the median channel's.
        """
        floors = [max(float(np.median(values)) * 1e-6, 1e-30) for values in (self.activation, self.weight)]
        logs = exponents[0] * np.log2(np.maximum(self.activation, floors[0]))
        logs -= exponents[1] * np.log2(np.maximum(self.weight, floors[1]))
        return np.minimum(2.0 ** np.round(logs - np.median(logs)), 2.0 ** np.floor(np.log2(self.largest)))


def channels_of(weights: Weights, imatrix: Imatrix, place: Place) -> Channels:
    """Read the place's matrices once."""
    readers = [weights.column_stats(name) for name in place.readers]
    squares = np.mean([mean_squares for mean_squares, _ in readers], axis=0)
    columns = np.max([highest for _, highest in readers], axis=0)
    largest = np.maximum(_LARGEST_COLUMN / np.maximum(place.to_writer(columns, np.max), 1e-30), 1)
    writer = place.writers[0]
    if len(weights.infos[writer].shape) == 2:
        largest = np.minimum(largest, np.maximum(weights.row_max(writer) / _SMALLEST_ROW, 1))
    activation = place.to_writer(imatrix[place.readers[0]].astype(np.float64), np.mean) ** 0.5
    return Channels(activation, place.to_writer(squares, np.mean) ** 0.5, largest)


class _Trial:
    """One place with sampled rows of its readers: what do exponents do to the products?"""

    def __init__(
        self, weights: Weights, activations: Activations, imatrix: Imatrix, types: Mapping[str, str], place: Place
    ) -> None:
        self._imatrix, self._types, self._place = imatrix, types, place
        self._channels = channels_of(weights, imatrix, place)
        self._inputs = activations.inputs(place.readers[0])
        self._rows = {name: weights.sample(name, N_ROWS) for name in place.readers}
        self._exact = {name: self._inputs @ rows.T for name, rows in self._rows.items()}

    def error(self, exponents: Exponents) -> float:
        """Error of the readers' products over their size, in squares, summed over the readers."""
        columns = self._place.to_reader(self._channels.factors(exponents)).astype(np.float32)
        total = 0.0
        for name, rows in self._rows.items():
            kind = self._types[name]
            stored = as_stored(rows * columns, kind, self._imatrix[name] / columns**2)
            total += relative_error(as_multiplied(self._inputs / columns, kind) @ stored.T, self._exact[name])
        return total


def relative_error(products: Rows, exact: Rows) -> float:
    """Sum of squared differences over the sum of squares."""
    return float(np.square(products - exact, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum())
