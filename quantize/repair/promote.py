"""Which tensors get more bits, so that the bound holds with the fewest bytes, or the drift is least within a size.

Drift adds up as noise: a vector whose independent errors have the energies e_i has 1 / cosine ** 2 = 1 + sum(e_i). The
noise of a kind of tensor (all ffn_down, say) is measured on a file in which that kind alone is quantised. It is divided
among the tensors of the kind by their quantisation errors on sampled activations. Measured candidates correct the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from f2gguf.quantize.repair.assemble import Imatrix, Scale
from f2gguf.quantize.repair.codes.parallel import all_cores, side_by_side
from f2gguf.quantize.repair.imatrix import Activations
from f2gguf.quantize.repair.recipe import kind_of
from f2gguf.quantize.repair.rescale import N_ROWS, Trial, relative_error
from f2gguf.quantize.repair.tensors import OnProgress, Weights, as_stored, fits, shape_of, size_as

# From the smallest to the largest. A tensor can take those whose blocks its rows fill.
LADDER = ("IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16")
TOKEN_EMBD = "token_embd.weight"


@dataclass(frozen=True)
class Choice:
    """A type that a tensor can take, and the noise that it adds then."""

    kind: str
    size_bytes: int
    noise: float


Choices = Mapping[str, tuple[Choice, ...]]  # tensor -> its choices; the first is where the search begins


def noise(drift: float) -> float:
    """Energy of the errors that give a mean drift.

    >>> noise(0.02)    # cosine 0.98: 1 / 0.98 ** 2 - 1
    0.041232819658475
    """
    return 1 / max(1 - drift, 0.01) ** 2 - 1


def errors(
    weights: Weights,
    activations: Activations,
    imatrix: Imatrix,
    scaled: Mapping[str, Scale],
    types: Mapping[str, tuple[str, ...]],
    on_progress: OnProgress,
) -> dict[str, dict[str, float]]:
    """Relative squared error of each tensor's products in each of its `types`, on sampled rows and activations."""

    def measure(name: str) -> tuple[str, dict[str, float]]:
        if name == TOKEN_EMBD:
            by_type = _table_errors(weights, types[name])
        else:
            columns = scaled.get(name, Scale()).columns
            trial = Trial(weights.sample(name, N_ROWS), activations.inputs(name), imatrix.get(name))
            by_type = {kind: trial.error(kind, np.float32(1) if columns is None else columns) for kind in types[name]}
        on_progress(1)
        return name, by_type

    with all_cores():
        return dict(side_by_side(measure, types))


def _table_errors(weights: Weights, types: tuple[str, ...]) -> dict[str, float]:
    """Errors of the token table's rows after the first norm, which alone reads them."""
    names = ("token_embd_norm.weight", "blk.0.attn_norm.weight")
    norm = next((weights.rows(name)[0] for name in names if name in weights.infos), np.float32(1))
    rows = weights.sample(TOKEN_EMBD, 4 * N_ROWS)
    return {kind: relative_error(as_stored(rows, kind) * norm, rows * norm) for kind in types}


def possible_types(weights: Weights, types: Mapping[str, str], *, smallest: str) -> dict[str, tuple[str, ...]]:
    """The types that each quantised tensor can take: its own of `types` first, then all from `smallest` up."""
    larger = LADDER[LADDER.index(smallest) :]
    return {
        name: tuple(dict.fromkeys((kind, *(k for k in larger if fits(k, shape_of(weights.infos[name])[1])))))
        for name, kind in types.items()
        if kind not in ("F32", "F16", "BF16")
    }


def choices(
    weights: Weights, errors: Mapping[str, Mapping[str, float]], types: Mapping[str, str], kinds: Mapping[str, float]
) -> Choices:
    """Every tensor's choices with their predicted noise.

    The measured noise of a kind (`kinds`, with tensors in `types`) is divided among its tensors in proportion to their
    quantisation `errors`.
    """
    totals = dict.fromkeys(kinds, 0.0)
    for name, by_type in errors.items():
        totals[kind_of(name)] += by_type[types[name]]
    options = {}
    for name, by_type in errors.items():
        info, measured, total = weights.infos[name], kinds[kind_of(name)], totals[kind_of(name)]
        options[name] = tuple(Choice(k, size_as(info, k), measured * error / total) for k, error in by_type.items())
    return options


def promote(options: Choices, allowed: float) -> dict[str, Choice]:
    """Types of few bytes whose noise sums up to less than `allowed`; the best types if there are none such.

    First the steps that save most noise per byte are taken, until the noise is allowed; then the steps back that save
    most bytes per noise. Of two starts, each tensor's first choice and its smallest, the one that ends smaller counts.
    """
    starts = {name: some[0] for name, some in options.items()}, smallest(options)
    return min((_promote(options, start, allowed) for start in starts), key=total_size)


def _promote(options: Choices, start: Mapping[str, Choice], allowed: float) -> dict[str, Choice]:
    chosen = dict(start)
    while total_noise(chosen) >= allowed and (step := _best_step(options, chosen, _noise_per_byte, math.inf)):
        chosen |= step
    while step := _best_step(options, chosen, _bytes_per_noise, allowed - total_noise(chosen)):
        chosen |= step
    return chosen


def smallest(options: Choices) -> dict[str, Choice]:
    """Each tensor's choice of the fewest bytes."""
    return {name: min(some, key=lambda choice: (choice.size_bytes, choice.noise)) for name, some in options.items()}


def fill(options: Choices, budget: int) -> dict[str, Choice] | None:
    """The types that save most noise per byte within `budget` bytes of tensors; None if the smallest do not fit."""
    chosen = smallest(options)
    if total_size(chosen) > budget:
        return None
    while step := _best_step(options, chosen, _noise_per_byte, budget - total_size(chosen)):
        chosen |= step
    return chosen


def total_noise(chosen: Mapping[str, Choice]) -> float:
    return sum(choice.noise for choice in chosen.values())


def total_size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.size_bytes for choice in chosen.values())


def _best_step(
    options: Choices, chosen: Mapping[str, Choice], gain: Callable[[Choice, Choice, float], float], room: float
) -> dict[str, Choice]:
    """The tensor and type of the highest `gain`; empty if no change gains anything."""
    steps = ((gain(now, new, room), name, new) for name, now in chosen.items() for new in options[name])
    value, name, choice = max(steps, key=lambda step: step[:2], default=(0.0, "", None))
    return {name: choice} if choice and value > 0 else {}


def _noise_per_byte(now: Choice, new: Choice, room: float) -> float:
    n_more = new.size_bytes - now.size_bytes
    return (now.noise - new.noise) / max(n_more, 1e-9) if 0 <= n_more <= room else 0.0


def _bytes_per_noise(now: Choice, new: Choice, room: float) -> float:
    more = new.noise - now.noise
    return (now.size_bytes - new.size_bytes) / max(more, 1e-12) if more < room else 0.0
