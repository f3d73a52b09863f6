"""From a bound to a recipe: importance matrix, scales, then more bits where they save most, measured at every step.

Nothing here sees an evaluation text: all figures are of the calibration texts. The verdict comes afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from f2gguf.quantize.promote import Choice, Choices, choices, errors, fill, noise, possible_types, promote
from f2gguf.quantize.recipe import Recipe, kind_of
from f2gguf.quantize.rescale import places, scales, search
from f2gguf.quantize.study import Drift, Study
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import OutOfReach
from f2gguf.runtime.files import format_bound, format_size

# Of the bound, that calibration texts must stay under: a verdict is over other texts.
MARGIN = 0.9
CLOSE = 0.85  # of the margin: near enough, no byte is left to win
MAX_ROUNDS = 6
N_PROBE_TEXTS = 48  # with which the kinds of tensors are compared
_FLOAT = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Candidate:
    recipe: Recipe
    drift: Drift


def find_recipe(study: Study, variant: str, *, max_drift: float, max_size: int | None = None) -> Recipe:
    """The recipe of `variant` whose drift on the calibration texts is under the bound, at the least bytes.

    With `max_size` (bytes of the whole file): the one of the least drift within it. Raises `OutOfReach` where no file
    of this kind is as small.
    """
    best = _at_stock_size(study, variant)
    wanted = MARGIN * max_drift
    if max_size is not None:
        return _within(study, best, max_size)
    if best.drift.worst < wanted:
        return best.recipe
    say(f"  {best.drift.worst:.2%} at worst is not under {format_bound(wanted)}: looking for tensors to promote")
    return _promoted(study, best, wanted)


def _at_stock_size(study: Study, variant: str) -> Candidate:
    """With llama.cpp's own types: the importance matrix alone, or scales too, whichever drifts less."""
    types = study.recipe(variant).all_types(study.plan(variant))
    with study.progress(f"scales {variant}", len(places(study.weights.header))) as advance:
        exponents = search(study.weights, study.activations, study.imatrix, types, on_progress=advance)
    recipes = [study.recipe(variant)] + ([study.recipe(variant, exponents=exponents)] if exponents else [])
    candidates = [_measured(study, recipe) for recipe in recipes]
    return min(candidates, key=lambda candidate: candidate.drift.mean)


def _promoted(study: Study, start: Candidate, wanted: float) -> Recipe:
    """Predict, promote, measure, correct, until the bound is held at close to the least bytes."""
    options = _choices(study, start.recipe)
    allowed = noise(start.drift.mean * wanted / start.drift.worst)
    factor = noise(start.drift.mean) / sum(c[0].noise for c in options.values())
    held: Candidate | None = None
    for _ in range(MAX_ROUNDS):
        chosen = promote(options, allowed / factor)
        candidate = _measured(study, _with_types(study, start.recipe, chosen))
        if held and candidate.recipe == held.recipe:
            break
        worst = candidate.drift.worst
        if worst < wanted and (held is None or _size(study, candidate) < _size(study, held)):
            held = candidate
        if CLOSE * wanted < worst < wanted:
            break
        factor = noise(candidate.drift.mean) / sum(choice.noise for choice in chosen.values())
        allowed = noise(candidate.drift.mean * wanted / worst)
    return held.recipe if held else candidate.recipe


def _within(study: Study, start: Candidate, max_size: int) -> Recipe:
    """The least drift within `max_size`: the tensors' bytes are spent where they save most."""
    variant = start.recipe.variant
    options = _choices(study, start.recipe, base=variant)
    plan = study.plan(variant)
    fixed = sum(t.size_bytes for t in study.weights.header.tensors if t.name not in options)
    head = study.weights.header.tensors[0].begin + 2_000 + 100 * len(options)  # the recipe is in the header
    chosen = fill(options, max_size - fixed - head)
    if chosen is None:
        least = fixed + head + sum(min(c.size_bytes for c in tensor) for tensor in options.values())
        raise OutOfReach(
            f"--max-size {format_size(max_size)}: {variant} of {study.source.name} takes {format_size(least)} at least."
        )
    candidate = _measured(study, _with_types(study, start.recipe, chosen))
    if head + plan.size_bytes <= max_size and start.drift.mean <= candidate.drift.mean:
        return start.recipe
    return candidate.recipe


def _choices(study: Study, recipe: Recipe, *, base: str | None = None) -> Choices:
    """Every tensor's types with predicted noise; the noise of each kind of tensor is measured."""
    types = recipe.all_types(study.plan(recipe.variant))
    possible = possible_types(study.weights, types)
    scaled = scales(study.weights, study.imatrix, recipe.exponents)
    with study.progress("errors of every type", len(possible)) as advance:
        found = errors(study.weights, study.activations, study.imatrix, scaled, possible, on_progress=advance)
    kinds = {
        kind: noise(_alone(study, recipe, types, kind).mean) for kind in sorted({kind_of(name) for name in possible})
    }
    return choices(study.weights, found, types, kinds)


def _alone(study: Study, recipe: Recipe, types: Mapping[str, str], kind: str) -> Drift:
    """The drift where only tensors of one kind are quantised."""
    only = {t.name: types[t.name] if kind_of(t.name) == kind else t.type for t in study.weights.header.tensors}
    return study.measure_types(recipe, only, f"{kind} alone", n_texts=N_PROBE_TEXTS)


def _with_types(study: Study, recipe: Recipe, chosen: Mapping[str, Choice]) -> Recipe:
    stock = {tensor.name: tensor.new_type for tensor in study.plan(recipe.variant).tensors}
    return replace(recipe, types={name: c.kind for name, c in chosen.items() if c.kind != stock[name]})


def _measured(study: Study, recipe: Recipe) -> Candidate:
    candidate = Candidate(recipe, study.measure(recipe, f"try {recipe.variant}"))
    size = format_size(_size(study, candidate))
    drift = candidate.drift
    say(
        f"  {recipe.variant} {recipe.kind}: {size}, drift {drift.mean:.3%} on calibration texts, {drift.worst:.3%} at worst"
    )
    return candidate


def _size(study: Study, candidate: Candidate) -> int:
    from f2gguf.quantize.tensors import size_as

    plan = study.plan(candidate.recipe.variant)
    types = candidate.recipe.all_types(plan)
    return sum(size_as(info, types[info.name]) for info in study.weights.header.tensors)
