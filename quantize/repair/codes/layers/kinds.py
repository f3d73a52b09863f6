"""What one GGUF architecture is to the repair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from f2gguf.quantize.repair.codes.layers.arithmetic import Layer

Sides = tuple[tuple[str, ...], tuple[str, ...]]  # the tensors that write a channel, and those that read it


@dataclass(frozen=True)
class LayerKind:
    """The layer of one GGUF architecture, and the channels in it that can be re-scaled."""

    run: Callable[..., Layer]
    places: Mapping[str, Sides]  # place -> tensors without 'blk.N.'; "value" is the place of value channels
    scales_tokens: bool = False  # rows of the token table are multiplied by the root of their width
