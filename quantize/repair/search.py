"""From a bound to a recipe: importance matrix, scales, then more bits where they save most, measured at every step.

All figures here are of the calibration texts. Of the evaluation texts nothing is seen but, after a verdict over the
bound, by how much: the search is then repeated with a bound that is smaller by as much, twice at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from f2gguf.quantize.repair.assemble import WEIGHED
from f2gguf.quantize.repair.make import Recipes
from f2gguf.quantize.repair.promote import (
    LADDER,
    Choice,
    Choices,
    choices,
    errors,
    fill,
    noise,
    possible_types,
    promote,
    total_noise,
    total_size,
)
from f2gguf.quantize.repair.recipe import Recipe, kind_of
from f2gguf.quantize.repair.rescale import places, scales, search
from f2gguf.quantize.repair.study import Drift, Study
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import OutOfReach
from f2gguf.runtime.files import format_bound, format_size

MARGIN = 0.9  # of the bound, for calibration texts: the verdict is over others
MAX_VERDICTS = 3
WORTH = 0.95  # scales must leave at most so much of the drift without them
CLOSE = 0.85  # of what is allowed: near enough, few bytes are left to win
MAX_ROUNDS = 6
N_PROBE_TEXTS = 48  # with which the kinds of tensors are compared


@dataclass(frozen=True)
class Candidate:
    recipe: Recipe
    drift: Drift


def recipes(study: Study, variant: str, *, max_drift: float, max_size: int | None = None) -> Recipes:
    """The recipe of `variant` that holds the bound at the least bytes, by calibration texts, until a verdict agrees.

    With `max_size` (bytes of the whole file): the recipe of the least drift within it. Raises `OutOfReach` where no
    file of this variant is as small.
    """
    start = _at_stock_size(study, variant)
    if max_size is not None:
        yield _within(study, start, max_size, max_drift)
        return
    wanted = MARGIN * max_drift
    for _ in range(MAX_VERDICTS):
        verdict = yield start.recipe if start.drift.worst < wanted else _promoted(study, start, wanted)
        if verdict.holds:
            return
        say(f"  {variant}: the verdict is {verdict.highest:.2%} at worst, over {format_bound(max_drift)}")
        wanted *= MARGIN * max_drift / verdict.highest


def _at_stock_size(study: Study, variant: str) -> Candidate:
    """With llama.cpp's own types: the importance matrix alone, or with scales, where they are worth it."""
    types = study.types(Recipe(variant))
    plain = study.recipe(variant) if set(WEIGHED) & set(types.values()) else Recipe(variant)
    with study.progress(f"scales {variant}", len(places(study.weights.header))) as advance:
        exponents = search(study.weights, study.activations, study.imatrix, types, on_progress=advance)
    best = _measured(study, plain)
    if exponents:
        scaled = _measured(study, replace(study.recipe(variant), exponents=exponents))
        best = scaled if scaled.drift.mean < WORTH * best.drift.mean else best
    return best


def _promoted(study: Study, start: Candidate, wanted: float) -> Recipe:
    """Predict, promote, measure, correct, until the drift is close under `wanted`; the smallest that was under it."""
    say(f"  {start.recipe.variant}: {start.drift.worst:.2%} at worst, not under {wanted:.2%}: promoting tensors")
    options = _choices(study, start.recipe)
    last, chosen = start, {name: choice[0] for name, choice in options.items()}
    held: Candidate | None = None
    for _ in range(MAX_ROUNDS):
        allowed = noise(last.drift.mean * wanted / last.drift.worst)
        chosen = promote(options, total_noise(chosen) * allowed / noise(last.drift.mean))
        last = _measured(study, _with_types(study, start.recipe, chosen))
        if last.drift.worst < wanted and (held is None or _size(study, last) < _size(study, held)):
            held = last
        elif held:
            break
        if CLOSE * wanted < last.drift.worst < wanted:
            break
    return (held or last).recipe


def _within(study: Study, start: Candidate, max_size: int, max_drift: float) -> Recipe:
    """The least drift within `max_size`: bytes go where they save most."""
    options = _choices(study, start.recipe)
    fixed = _head_bytes(study) + sum(t.size_bytes for t in study.weights.header.tensors if t.name not in options)
    chosen = fill(options, max_size - fixed)
    if chosen is None:
        least = fixed + total_size({name: min(some, key=lambda c: c.size_bytes) for name, some in options.items()})
        raise OutOfReach(
            f"{study.weights.header.path}: no {start.recipe.variant} of {format_size(max_size)} (--max-size): with the "
            f"fewest bits for every weight it takes {format_size(least)}."
        )
    best = _measured(study, _with_types(study, start.recipe, chosen))
    if _head_bytes(study) + _size(study, start) <= max_size and start.drift.mean < best.drift.mean:
        best = start
    if best.drift.worst >= MARGIN * max_drift:
        allowed = noise(best.drift.mean * MARGIN * max_drift / best.drift.worst)
        predicted = promote(options, total_noise(chosen) * allowed / noise(best.drift.mean))
        say(
            f"  the bound of {format_bound(max_drift)} may not hold at this size; by prediction it takes "
            f"{format_size(fixed + total_size(predicted))}"
        )
    return best.recipe


def _choices(study: Study, recipe: Recipe) -> Choices:
    """Every tensor's types with predicted noise; the noise of each kind of tensor is measured."""
    types = study.types(recipe)
    possible = possible_types(study.weights, types, smallest="Q8_0" if recipe.variant == "Q8_0" else LADDER[0])
    scaled = scales(study.weights, study.imatrix, recipe.exponents)
    with study.progress("errors of every type", len(possible)) as advance:
        found = errors(study.weights, study.activations, study.imatrix, scaled, possible, on_progress=advance)
    kinds = {kind: noise(_alone(study, recipe, types, kind)) for kind in sorted(set(map(kind_of, possible)))}
    return choices(study.weights, found, types, kinds)


def _alone(study: Study, recipe: Recipe, types: Mapping[str, str], kind: str) -> float:
    """The mean drift where only tensors of one kind are quantised."""
    only = {t.name: types[t.name] if kind_of(t.name) == kind else t.type for t in study.weights.header.tensors}
    return study.measure(recipe, only, f"{kind} alone", n_texts=N_PROBE_TEXTS).mean


def _with_types(study: Study, recipe: Recipe, chosen: Mapping[str, Choice]) -> Recipe:
    stock = {tensor.name: tensor.new_type for tensor in study.plan(recipe.variant).tensors}
    return replace(recipe, types={name: c.kind for name, c in chosen.items() if c.kind != stock[name]})


def _measured(study: Study, recipe: Recipe) -> Candidate:
    drift = study.measure(recipe, study.types(recipe), f"try {recipe.variant}")
    size, name = format_size(_head_bytes(study) + study.size_bytes(recipe)), f"{recipe.variant}, {recipe.kind}"
    say(f"  {name}: {size}; calibration texts drift {drift.mean:.3%}, at worst {drift.worst:.3%}")
    return Candidate(recipe, drift)


def _size(study: Study, candidate: Candidate) -> int:
    return study.size_bytes(candidate.recipe)


def _head_bytes(study: Study) -> int:
    """About what stands before the tensors, the recipe included."""
    return study.weights.header.tensors[0].begin + 1_000 + 60 * len(study.weights.infos)
