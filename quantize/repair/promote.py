"""Which tensors get more bits, so that a bound holds at the least bytes; or the least drift, within so many bytes.

Drift is added up as noise: a vector whose independent errors have the energies e_i has 1 / cosine ** 2 = 1 + sum(e_i).
A tensor's part of it is predicted from its quantisation error on sampled activations, in proportion to what its kind of
tensor (all ffn_down, say) costs when it alone is quantised, which is measured. Measured candidates correct the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from f2gguf.quantize.repair.assemble import Imatrix, Scale
from f2gguf.quantize.repair.imatrix import Activations
from f2gguf.quantize.repair.recipe import kind_of
from f2gguf.quantize.repair.rescale import N_ROWS, relative_error
from f2gguf.quantize.repair.tensors import Weights, as_multiplied, as_stored, fits, shape_of, size_as
from f2gguf.runtime.llama.library import default_threads

# From the smallest to the largest; which of them a tensor can take depends on its rows.
LADDER = ("Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16")
TOKEN_EMBD = "token_embd.weight"


@dataclass(frozen=True)
class Choice:
    """A type that a tensor can take, and the noise that it then adds."""

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
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Relative error of each tensor's products, in squares, for each of its `types`: sampled rows and activations."""

    def measure(name: str) -> tuple[str, dict[str, float]]:
        if name == TOKEN_EMBD:
            by_type = _table_errors(weights, types[name])
        else:
            by_type = _errors(weights, activations, imatrix, scaled.get(name, Scale()), name, types[name])
        if on_progress:
            on_progress(1)
        return name, by_type

    with ThreadPoolExecutor(default_threads()) as pool:
        return dict(pool.map(measure, types))


def _errors(
    weights: Weights, activations: Activations, imatrix: Imatrix, scale: Scale, name: str, types: tuple[str, ...]
) -> dict[str, float]:
    columns = np.float32(1) if scale.columns is None else scale.columns
    rows, inputs = weights.sample(name, N_ROWS), activations.inputs(name)
    wanted = inputs @ rows.T
    used = imatrix.get(name)
    row = None if used is None else used / columns**2
    return {
        kind: relative_error(as_multiplied(inputs / columns, kind) @ as_stored(rows * columns, kind, row).T, wanted)
        for kind in types
    }


def _table_errors(weights: Weights, types: tuple[str, ...]) -> dict[str, float]:
    """Of the token table: of its rows as the first norm weighs them, since nothing else reads them."""
    names = ("token_embd_norm.weight", "blk.0.attn_norm.weight")
    norm = next((weights.rows(name)[0] for name in names if name in weights.infos), np.float32(1))
    rows = weights.sample(TOKEN_EMBD, 4 * N_ROWS)
    return {kind: relative_error(as_stored(rows, kind) * norm, rows * norm) for kind in types}


def possible_types(weights: Weights, types: Mapping[str, str], *, smallest: str) -> dict[str, tuple[str, ...]]:
    """What every quantised tensor of `types` could be instead, from `smallest` up, its own type first."""
    larger = LADDER[LADDER.index(smallest) :]
    return {
        name: tuple(dict.fromkeys((kind, *(k for k in larger if fits(k, shape_of(weights.infos[name])[1])))))
        for name, kind in types.items()
        if kind not in ("F32", "F16", "BF16")
    }


def choices(
    weights: Weights, errors: Mapping[str, Mapping[str, float]], types: Mapping[str, str], kinds: Mapping[str, float]
) -> Choices:
    """Every tensor's choices with predicted noise.

    A kind's measured noise (`kinds`, with tensors in `types`) is divided among its tensors in proportion to their
    quantisation `errors`.
    """
    totals: dict[str, float] = {}
    for name in errors:
        totals[kind_of(name)] = totals.get(kind_of(name), 0.0) + errors[name][types[name]]
    return {
        name: tuple(
            Choice(kind, size_as(weights.infos[name], kind), kinds[kind_of(name)] * error / totals[kind_of(name)])
            for kind, error in by_type.items()
        )
        for name, by_type in errors.items()
    }


def promote(options: Choices, allowed: float) -> dict[str, Choice]:
    """The types with a sum of noise under `allowed`, at few bytes; everything at its best where that is not enough.

    Step by step, up by what saves most noise per byte, then down by what saves most bytes for the noise as far as there
    is room; once from each tensor's first choice and once from its smallest: the fewer bytes of the two.
    """
    starts = {name: some[0] for name, some in options.items()}, smallest(options)
    return min((_promote(options, start, allowed) for start in starts), key=total_size)


def _promote(options: Choices, start: Mapping[str, Choice], allowed: float) -> dict[str, Choice]:
    chosen = dict(start)
    while total_noise(chosen) >= allowed and (step := _step_up(options, chosen)):
        chosen[step[0]] = step[1]
    while step := _step_down(options, chosen, room=allowed - total_noise(chosen)):
        chosen[step[0]] = step[1]
    return chosen


def smallest(options: Choices) -> dict[str, Choice]:
    """Each tensor's choice of the fewest bytes."""
    return {name: min(some, key=lambda choice: (choice.size_bytes, choice.noise)) for name, some in options.items()}


def fill(options: Choices, budget: int) -> dict[str, Choice] | None:
    """From each tensor's smallest choice, the steps that save most noise per byte, within `budget` bytes of tensors.

    None where even the smallest choices are larger.
    """
    chosen = smallest(options)
    if total_size(chosen) > budget:
        return None
    while step := _step_up(options, chosen, room=budget - total_size(chosen)):
        chosen[step[0]] = step[1]
    return chosen


def total_noise(chosen: Mapping[str, Choice]) -> float:
    return sum(choice.noise for choice in chosen.values())


def total_size(chosen: Mapping[str, Choice]) -> int:
    return sum(choice.size_bytes for choice in chosen.values())


def _step_up(options: Choices, chosen: Mapping[str, Choice], *, room: float = math.inf) -> tuple[str, Choice] | None:
    """The change to less noise, in `room` bytes, that saves most noise per byte; None where there is none."""
    steps = (
        ((now.noise - choice.noise) / max(choice.size_bytes - now.size_bytes, 1e-9), name, choice)
        for name, now in chosen.items()
        for choice in options[name]
        if choice.noise < now.noise and 0 <= choice.size_bytes - now.size_bytes <= room
    )
    best = max(steps, key=lambda step: step[:2], default=None)
    return best and (best[1], best[2])


def _step_down(options: Choices, chosen: Mapping[str, Choice], *, room: float) -> tuple[str, Choice] | None:
    """The change to fewer bytes, at less than `room` more noise, that saves most bytes for it; None without any."""
    steps = (
        ((now.size_bytes - choice.size_bytes) / max(choice.noise - now.noise, 1e-12), name, choice)
        for name, now in chosen.items()
        for choice in options[name]
        if choice.size_bytes < now.size_bytes and choice.noise - now.noise < room
    )
    best = max(steps, key=lambda step: step[:2], default=None)
    return best and (best[1], best[2])
