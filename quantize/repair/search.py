"""From a bound to a file: importance matrix, scales, then more bits where they save most, measured at every step.

All figures here are of the calibration texts. The search never sees evaluation texts. When the verdict on a file misses
the bound, the search learns only by how much, and is repeated with a bound that is stricter by as much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from f2gguf.evals.drift import Verdict
from f2gguf.quantize.repair import promote, rescale
from f2gguf.quantize.repair.assemble import WEIGHED
from f2gguf.quantize.repair.make import Evaluation, make_measured
from f2gguf.quantize.repair.promote import LADDER, Choice, Choices, noise, total_noise, total_size
from f2gguf.quantize.repair.recipe import Recipe, kind_of
from f2gguf.quantize.repair.study import CalibrationDrift, Study
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import OutOfReach
from f2gguf.runtime.files import format_bound, format_size

MARGIN = 0.9  # of the bound, for calibration texts: the verdict is over others
MAX_VERDICTS = 3
WORTH = 0.95  # scales must leave at most so much of the drift without them
CLOSE = 0.85  # of what is allowed: near enough, few bytes are left to win
MAX_PROMOTIONS = 6
N_PROBE_TEXTS = 48  # with which the kinds of tensors are compared


@dataclass(frozen=True)
class Made:
    """A recipe, and the verdict on the file that was made by it."""

    recipe: Recipe
    verdict: Verdict


def make_within_bound(
    study: Study,
    variant: str,
    path: Path,
    *,
    evaluation: Evaluation,
    max_size: int | None = None,
    there: Made | None = None,
) -> Made:
    """Make `path` by the recipe that holds the bound at the least bytes: search, make, judge, and tighten if need be.

    With `max_size` (bytes of the whole file) it is the recipe of the least drift within that size. `there` is what
    `path` holds already: it is not made again. Raises `OutOfReach` where no file of this variant is as small.
    """
    search, allowed = Search(study, variant), MARGIN * evaluation.max_drift
    for _ in range(MAX_VERDICTS):
        recipe = search.within_size(max_size, allowed) if max_size else search.under(allowed)
        if there is None or there.recipe != recipe:
            verdict = make_measured(study.weights, path, recipe, study.imatrix, evaluation=evaluation)
            there = Made(recipe, verdict)
        if there.verdict.holds or max_size:
            break
        highest, bound = there.verdict.highest, evaluation.max_drift
        say(f"  {variant}: the verdict is {highest:.2%} at worst, over {format_bound(bound)}")
        allowed *= MARGIN * bound / highest
    assert there is not None
    return there


@dataclass(frozen=True)
class Candidate:
    recipe: Recipe
    drift: CalibrationDrift


@dataclass(frozen=True)
class Search:
    """The search for recipes of one variant; what was measured on the way is measured once."""

    study: Study
    variant: str

    @cached_property
    def start(self) -> Candidate:
        """With llama.cpp's own types: the importance matrix alone, or with scales, where they are worth it."""
        study, stock = self.study, Recipe(self.variant)
        types = study.types(stock)
        plain = study.recipe(self.variant) if set(WEIGHED) & set(types.values()) else stock
        with study.progress(f"scales {self.variant}", len(rescale.places(study.weights.header))) as advance:
            exponents = rescale.search(study.weights, study.activations, study.imatrix, types, on_progress=advance)
        best = self._measured(plain)
        if exponents:
            scaled = self._measured(replace(study.recipe(self.variant), exponents=exponents))
            best = scaled if scaled.drift.mean < WORTH * best.drift.mean else best
        return best

    @cached_property
    def choices(self) -> Choices:
        """Every tensor's types with predicted noise; the noise of each kind of tensor is measured."""
        study, recipe = self.study, self.start.recipe
        types = study.types(recipe)
        smallest = "Q8_0" if self.variant == "Q8_0" else LADDER[0]
        possible = promote.possible_types(study.weights, types, smallest=smallest)
        scales = rescale.scales(study.weights, study.imatrix, recipe.exponents)
        with study.progress("errors of every type", len(possible)) as advance:
            errors = promote.errors(
                study.weights, study.activations, study.imatrix, scales, possible, on_progress=advance
            )
        kinds = sorted(set(map(kind_of, possible)))
        return promote.choices(study.weights, errors, types, {kind: noise(self._alone(kind)) for kind in kinds})

    def under(self, allowed: float) -> Recipe:
        """The smallest recipe whose drift is under `allowed`; the best there is where none is.

        Predict, promote, measure, correct, until the drift is close under `allowed`.
        """
        if self.start.drift.worst < allowed:
            return self.start.recipe
        say(f"  {self.variant}: {self.start.drift.worst:.2%} at worst, not under {allowed:.2%}: promoting tensors")
        last, chosen = self.start, {name: choice[0] for name, choice in self.choices.items()}
        best: Candidate | None = None
        for _ in range(MAX_PROMOTIONS):
            chosen = promote.promote(self.choices, _allowed_noise(last, chosen, allowed))
            last = self._measured(self._with_types(chosen))
            if last.drift.worst < allowed and (best is None or self._size(last) < self._size(best)):
                best = last
            elif best:
                break
            if CLOSE * allowed < last.drift.worst < allowed:
                break
        return (best or last).recipe

    def within_size(self, max_size: int, allowed: float) -> Recipe:
        """The recipe of the least drift within `max_size` bytes: bytes go where they save most."""
        tensors = self.study.weights.header.tensors
        fixed = self._head_bytes + sum(tensor.size_bytes for tensor in tensors if tensor.name not in self.choices)
        chosen = promote.fill(self.choices, max_size - fixed)
        if chosen is None:
            least = fixed + total_size(promote.smallest(self.choices))
            raise OutOfReach(
                f"{self.study.weights.header.path}: no {self.variant} of {format_size(max_size)} (--max-size): with "
                f"the fewest bits for every weight it takes {format_size(least)}."
            )
        best = self._measured(self._with_types(chosen))
        if self._size(self.start) <= max_size and self.start.drift.mean < best.drift.mean:
            best = self.start
        if best.drift.worst >= allowed:
            needed = promote.promote(self.choices, _allowed_noise(best, chosen, allowed))
            size = format_size(fixed + total_size(needed))
            say(f"  the bound may not hold at this size; by prediction it takes {size}")
        return best.recipe

    def _alone(self, kind: str) -> float:
        """The mean drift where only tensors of one kind are quantised."""
        recipe = self.start.recipe
        types = self.study.types(recipe)
        tensors = self.study.weights.header.tensors
        only = {tensor.name: types[tensor.name] if kind_of(tensor.name) == kind else tensor.type for tensor in tensors}
        return self.study.measure(recipe, only, f"{kind} alone", n_texts=N_PROBE_TEXTS).mean

    def _with_types(self, chosen: Mapping[str, Choice]) -> Recipe:
        stock = {tensor.name: tensor.new_type for tensor in self.study.plan(self.variant).tensors}
        types = {name: choice.kind for name, choice in chosen.items() if choice.kind != stock[name]}
        return replace(self.start.recipe, types=types)

    def _measured(self, recipe: Recipe) -> Candidate:
        drift = self.study.measure(recipe, self.study.types(recipe), f"try {self.variant}")
        candidate = Candidate(recipe, drift)
        say(
            f"  {self.variant}, {recipe.kind}: {format_size(self._size(candidate))}; calibration texts drift "
            f"{drift.mean:.3%}, at worst {drift.worst:.3%}"
        )
        return candidate

    def _size(self, candidate: Candidate) -> int:
        """About the bytes of the whole file."""
        return self._head_bytes + self.study.size_bytes(candidate.recipe)

    @property
    def _head_bytes(self) -> int:
        """About what stands before the tensors, the recipe included."""
        return self.study.weights.header.tensors[0].begin + 1_000 + 60 * len(self.study.weights.infos)


def _allowed_noise(last: Candidate, chosen: Mapping[str, Choice], allowed: float) -> float:
    """The predicted noise at which `last`, made of `chosen`, would drift by `allowed` at worst."""
    mean, worst = last.drift.mean, last.drift.worst
    return total_noise(chosen) * noise(mean * allowed / worst) / noise(mean)
