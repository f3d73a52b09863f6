"""Channels are scaled so that quantisation hurts less, where that does not change what the model computes.

In a place, some tensors write a channel and others read it. No product changes if the writer's row is divided, and the
readers' columns are multiplied, by the same power of two. The quantisation error of a row does not depend on its scale,
but that of a column does, since a block takes its step from its largest value. Source: AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from f2gguf.quantize.repair.assemble import Imatrix, Scale
from f2gguf.quantize.repair.codes.layers import LAYERS
from f2gguf.quantize.repair.codes.parallel import all_cores, side_by_side
from f2gguf.quantize.repair.imatrix import Activations
from f2gguf.quantize.repair.tensors import OnProgress, Rows, Weights, as_multiplied, as_stored
from f2gguf.runtime.gguf.header import Header
from numpy.typing import NDArray

Exponents = tuple[float, float]  # of a channel's activation, and (negative) of its weights

# Tried at every place; the first is no scaling. Two exponents with the sum 1 undo any scaling that a channel has.
GRID: tuple[Exponents, ...] = (
    (0.0, 0.0),
    (0.25, 0.0),
    (0.5, 0.0),
    (0.25, 0.25),
    (0.5, 0.5),
    (0.75, 0.25),
    (1.0, 0.0),
    (0.25, 0.75),
)
WORTH = 0.9  # scales are used if they leave less than this part of the error
N_ROWS = 256  # of a matrix in a trial
# A smaller row needs block scales that F16 holds badly: Q4_K stores 1/470 of a row's largest value.
_SMALLEST_ROW, _LARGEST_COLUMN = 2.0**-9, 2.0**14


@dataclass(frozen=True)
class Place:
    """One kind of channel in one layer: the tensors that write it, and those that read it.

    A writer with more rows than there are channels is fused: its last rows write them.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    heads: tuple[int, int, int] = (1, 1, -1)  # heads, KV heads, width of a head: more than one head for value channels

    def to_writer(self, columns: NDArray[np.float64], merge: Callable[..., NDArray[np.float64]]) -> NDArray[np.float64]:
        """From one value for each reader's column to one for each channel: heads that share a KV head are merged."""
        n_head, n_head_kv, width = self.heads
        return merge(columns.reshape(n_head_kv, n_head // n_head_kv, width), axis=1).ravel()

    def to_reader(self, channels: NDArray[np.float64]) -> NDArray[np.float64]:
        """From one value for each channel to one for each reader's column."""
        n_head, n_head_kv, width = self.heads
        return np.repeat(channels.reshape(n_head_kv, 1, width), n_head // n_head_kv, axis=1).ravel()


def places(header: Header) -> list[Place]:
    """Every place of a model; none for an architecture that f2gguf does not convert."""
    architecture, values = header.architecture, header.values
    if architecture not in LAYERS:
        return []
    n_head = int(values[f"{architecture}.attention.head_count"])
    n_head_kv = int(values.get(f"{architecture}.attention.head_count_kv", n_head))
    heads = n_head, n_head_kv, int(values.get(f"{architecture}.attention.value_length", header.n_embd // n_head))
    result, tensors = [], {tensor.name for tensor in header.tensors}
    for i in range(int(values.get(f"{architecture}.block_count", 0))):
        for name, sides in LAYERS[architecture].places.items():
            writers, readers = (tuple(f"blk.{i}.{tensor}" for tensor in side) for side in sides)
            if tensors.issuperset(writers):  # ModernBERT's first layer has no norm before its attention
                result.append(Place(f"blk.{i}.{name}", writers, readers, heads if name == "value" else (1, 1, -1)))
    return result


def search(
    weights: Weights, activations: Activations, imatrix: Imatrix, types: Mapping[str, str], on_progress: OnProgress
) -> dict[str, Exponents]:
    """The exponents of GRID with the least error of the readers' products on sampled activations, for each place.

    Readers are really quantised to their `types`, and activations rounded as llama.cpp's kernels round them. A place is
    left out if scales win too little there.
    """
    chosen = {}
    with all_cores():
        for place in places(weights.header):
            channels, inputs = channels_of(weights, imatrix, place), activations.inputs(place.readers[0])
            trials = {name: Trial(weights.sample(name, N_ROWS), inputs, imatrix[name]) for name in place.readers}
            columns = [place.to_reader(channels.factors(exponents)).astype(np.float32) for exponents in GRID]
            parts = [side_by_side(partial(trial.error, types[name]), columns) for name, trial in trials.items()]
            errors = [sum(of_readers) for of_readers in zip(*parts, strict=True)]
            best = int(np.argmin(errors))
            if errors[best] < WORTH * errors[0]:
                chosen[place.name] = GRID[best]
            on_progress(1)
    return chosen


def scales(weights: Weights, imatrix: Imatrix, exponents: Mapping[str, Exponents]) -> dict[str, Scale]:
    """The factors of every tensor at the places of `exponents`. They depend on nothing but the arguments."""
    by_name: dict[str, Scale] = {}
    for place in places(weights.header):
        if place.name not in exponents:
            continue
        channels = channels_of(weights, imatrix, place).factors(exponents[place.name])
        columns = place.to_reader(channels).astype(np.float32)
        for name in place.readers:
            by_name[name] = replace(by_name.get(name, Scale()), columns=columns)
        for name in place.writers:
            shape = weights.infos[name].shape
            inverse = np.ones(shape[0], dtype=np.float32)
            inverse[-len(channels) :] = 1 / channels
            is_vector = len(shape) == 1
            by_name[name] = Scale(None, inverse) if is_vector else replace(by_name.get(name, Scale()), rows=inverse)
    return by_name


def scaled_imatrix(imatrix: Imatrix, scaled: Mapping[str, Scale]) -> Imatrix:
    """The importance matrix of the model with its channels scaled."""
    columns = {name: scale.columns for name, scale in scaled.items() if scale.columns is not None}
    return {name: row / columns[name] ** 2 if name in columns else row for name, row in imatrix.items()}


@dataclass(frozen=True)
class Channels:
    """What the factors of one place depend on: one value for each channel, (n_channels,) float64."""

    activation: NDArray[np.float64]  # root mean square of the channel's values
    weight: NDArray[np.float64]  # root mean square of its columns
    largest: NDArray[np.float64]  # factor that makes no row too small for F16, and no column too large

    def factors(self, exponents: Exponents) -> NDArray[np.float64]:
        """The power of two that each channel is multiplied by in the readers, (n_channels,) float64.

        It is activation ** exponents[0] / weight ** exponents[1], divided by that of the median channel.
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
        largest = np.minimum(largest, np.maximum(weights.row_max(writer)[-len(largest) :] / _SMALLEST_ROW, 1))
    activation = place.to_writer(imatrix[place.readers[0]].astype(np.float64), np.mean) ** 0.5
    return Channels(activation, place.to_writer(squares, np.mean) ** 0.5, largest)


@dataclass(frozen=True)
class Trial:
    """Sampled rows of a matrix and sampled inputs: how far are their products off when the matrix is quantised?"""

    rows: Rows
    inputs: Rows
    imatrix: Rows | None

    @cached_property
    def _exact(self) -> Rows:
        return self.inputs @ self.rows.T

    def error(self, kind: str, columns: Rows | np.float32) -> float:
        """Relative squared error of the products in the type `kind`, with the matrix's `columns` scaled."""
        imatrix = None if self.imatrix is None else self.imatrix / columns**2
        stored = as_stored(self.rows * columns, kind, imatrix)
        return relative_error(as_multiplied(self.inputs / columns, kind) @ stored.T, self._exact)


def relative_error(products: Rows, exact: Rows) -> float:
    """Sum of squared differences over the sum of squares."""
    return float(np.square(products - exact, dtype=np.float64).sum() / np.square(exact, dtype=np.float64).sum())
