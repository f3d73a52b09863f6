"""A model's layers as plain arithmetic, so that a layer can be run before the next one is quantised.

A layer is a generator: it yields the inputs of each group of products, and is sent the products. Whoever drives it
decides with which weights, and with inputs rounded or not, they are computed, and whether by numpy or by torch, which
follows the derivatives. Every file of this folder but arithmetic.py and kinds.py states `LAYERS`, by GGUF architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
from f2gguf.quantize.repair.codes.layers.arithmetic import (
    Layer,
    Shape,
    Texts,
    by_length,
    layer_norm,
    library_of,
    rms_norm,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows, Weights, as_stored
from f2gguf.runtime.gguf.header import Header

__all__ = [
    "LAYERS",
    "Layer",
    "LayerKind",
    "Shape",
    "Texts",
    "final_norm",
    "first_states",
    "pooled",
    "run_layer",
]

_SHARED = ("arithmetic", "kinds")
_FILES = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__) if file.name not in _SHARED]
LAYERS: dict[str, LayerKind] = {name: kind for file in _FILES for name, kind in file.LAYERS.items()}


def has_layers(header: Header) -> bool:
    """Whether the layers of this architecture are known here."""
    return header.architecture in LAYERS


def run_layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    """The layer `shape.layer`: `weights` are its vectors without 'blk.N.', `states` is (n_tokens, n_embd)."""
    return LAYERS[shape.header.architecture].run(weights, states, texts, shape)


def first_states(weights: Weights, texts: Texts, types: Mapping[str, str]) -> Rows:
    """What enters the first layer, (n_tokens, n_embd), with the tables in `types`."""

    def rows(name: str, chosen: Any) -> Rows:
        taken = weights.picked(name, chosen)
        return as_stored(taken, types[name]) if name in types else taken

    different, index = np.unique(texts.ids, return_inverse=True)
    states = rows("token_embd.weight", different)[index]
    if LAYERS[weights.header.architecture].scales_tokens:
        states = states * np.float32(weights.header.n_embd**0.5)
    if "position_embd.weight" in weights.infos:
        states = states + rows("position_embd.weight", texts.positions)
    if "token_types.weight" in weights.infos:
        states = states + rows("token_types.weight", np.array([0]))
    norm = {name: weights.rows(name)[0] for name in weights.infos if name.startswith("token_embd_norm.")}
    return _normed(norm, states, "token_embd_norm", Shape(weights.header))


def final_norm(weights: Mapping[str, Rows], states: Rows, shape: Shape) -> Rows:
    """What the pooling takes of what leaves the last layer, (n_tokens, n_embd), by 'output_norm.*' of `weights`."""
    return _normed(weights, states, "output_norm", shape)


def _normed(weights: Mapping[str, Rows], states: Rows, name: str, shape: Shape) -> Rows:
    """`states` after the norm `name`, if the model has it; its epsilon says of which kind it is."""
    if f"{name}.weight" not in weights:
        return states
    if (epsilon := shape.value("attention.layer_norm_epsilon")) is not None:
        return layer_norm(states, weights, name, epsilon)
    return rms_norm(states, weights[f"{name}.weight"], shape.value("attention.layer_norm_rms_epsilon"))


def pooled(states: Rows, texts: Texts, pooling: str) -> Rows:
    """The states of texts as one row each, (n_texts, n_embd), for the pooling 'last', 'cls' or 'mean'."""
    parts = by_length(states, texts)
    places = {"last": -1, "cls": 0}
    rows = [part[:, places[pooling]] if pooling in places else part.mean(axis=1) for part in parts]
    joined: Rows = library_of(states).concatenate(rows)
    return joined
