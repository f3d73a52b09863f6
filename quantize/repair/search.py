"""The search for a recipe: importance matrix, scales, then more bits where they save most, measured at every step.

All figures here are of the calibration texts. The search never sees evaluation texts. When the verdict misses the
bound, the search learns only by how much, and is repeated with a bound that is stricter by as much.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from f2gguf.evals.drift import Verdict, distribution, drift, judge
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, embed_texts, embed_timed
from f2gguf.quantize.convert.reserved import CORPUS_DRIFT, VERDICT, fill_in, golden_stamps
from f2gguf.quantize.repair import promote, rescale
from f2gguf.quantize.repair.assemble import WEIGHED, Imatrix, Ready
from f2gguf.quantize.repair.codes.tune import tuning_arithmetic
from f2gguf.quantize.repair.corpus import Corpus, CorpusDrift
from f2gguf.quantize.repair.promote import LADDER, Choice, Choices, noise, total_noise, total_size
from f2gguf.quantize.repair.recipe import Recipe, arithmetic, kind_of, make
from f2gguf.quantize.repair.study import Candidate, Study
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import OutOfReach, TruncationWarning
from f2gguf.runtime.files import format_bound, format_size
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.entries import Value

MARGIN = 0.9  # of the bound is allowed on calibration texts, as the verdict is on other texts
MAX_VERDICTS = 3
WORTH = 0.95  # scales are used if they leave less than this part of the drift
CLOSE = 0.85  # of the allowed drift: closer is not worth another try, as few bytes are left to save
MAX_PROMOTIONS = 6


@dataclass(frozen=True)
class Evaluation:
    """What a variant is measured with."""

    texts: Sequence[EvalText]
    reference: Vectors  # the F16 file's vectors of `texts`, (n_texts, n_embd)
    max_drift: float
    device: str
    held_out: HeldOut | None = None
    quick: bool = False  # they are some of the evaluation texts


@dataclass(frozen=True)
class HeldOut:
    """The texts of a corpus that chose nothing."""

    corpus: Corpus
    reference: Vectors  # the F16 file's vectors of `corpus.held_out`, (n_texts, n_embd)


@dataclass(frozen=True)
class Made:
    """A recipe, and what was measured of its file."""

    recipe: Recipe
    verdict: Verdict
    texts_per_s: float  # of the evaluation texts, here
    corpus: CorpusDrift | None = None


def make_within_bound(
    study: Study,
    variant: str,
    path: Path,
    *,
    evaluation: Evaluation,
    max_size: int | None = None,
    there: Made | None = None,
) -> Made:
    """Make `path` by the recipe that holds the bound with the fewest bytes: search, make, judge, and tighten if needed.

    With `max_size` (bytes of the whole file) it is the recipe of the least drift within that size. `there` is what
    `path` holds already; it is not made again. Raises `OutOfReach` if no file of this variant is so small.
    """
    search, allowed = Search(study, variant), MARGIN * evaluation.max_drift
    for _ in range(MAX_VERDICTS):
        recipe = search.tuned(search.within_size(max_size, allowed) if max_size else search.under(allowed))
        if there is None or there.recipe != recipe:
            ready = study.ready(recipe)
            there = make_measured(study.weights, path, recipe, study.imatrix, ready, evaluation=evaluation)
        if there.verdict.holds or max_size:
            break
        highest, bound = there.verdict.highest, evaluation.max_drift
        say(f"  {variant}: the verdict is {highest:.2%} at worst, over {format_bound(bound)}")
        allowed = study.measure(recipe, f"try {variant}").worst * MARGIN * bound / highest
    assert there is not None
    return there


def make_measured(
    weights: Weights, path: Path, recipe: Recipe, imatrix: Imatrix, ready: Ready, *, evaluation: Evaluation
) -> Made:
    """Make the file of `recipe` at `path`, measure it, and fill the verdict into its header."""
    texts, held_out, max_drift = evaluation.texts, evaluation.held_out, float(evaluation.max_drift)
    header: dict[str, Value] = {**VERDICT, keys.KEY_MAX_DRIFT: max_drift, keys.KEY_N_TEXTS: len(texts)}
    if evaluation.quick:
        header[keys.KEY_QUICK] = True
    if held_out:
        header |= {keys.KEY_CORPUS: held_out.corpus.name, keys.KEY_CORPUS_N_TEXTS: len(held_out.reference)}
        header |= CORPUS_DRIFT
    with progress(f"quantise {recipe.variant}", len(weights.infos)) as advance:
        make(weights, path, recipe, imatrix, ready=ready, header=header, on_progress=advance)
    with Embedder(path, device=evaluation.device) as model:
        vectors, texts_per_s = embed_timed(model, texts, f"measure {recipe.variant}")
        dims, ranges = model.header.dims, model.header.ranges(model.header.n_embd)
        verdict = judge(vectors, evaluation.reference, texts, dims=dims, ranges=ranges, max_drift=max_drift)
        golden = golden_stamps(model)
    drifts = {keys.KEY_MEAN_DRIFT: verdict.mean, keys.KEY_UPPER_DRIFT: verdict.upper}
    on_corpus = _on_corpus(path, held_out, evaluation.device) if held_out else None
    if on_corpus:
        drifts |= {keys.KEY_CORPUS_MEAN: on_corpus.mean, keys.KEY_CORPUS_UPPER: on_corpus.upper}
    fill_in(path, {**drifts, keys.KEY_HOLDS: verdict.holds, **golden})
    return Made(recipe, verdict, texts_per_s, on_corpus)


def _on_corpus(path: Path, held_out: HeldOut, device: str) -> CorpusDrift:
    texts = held_out.corpus.held_out
    drifts = drift(embed_sample(path, texts, device), held_out.reference)
    return CorpusDrift(name=held_out.corpus.name, **distribution(drifts, [text.id for text in texts]))


def embed_held_out(source: Path, corpus: Corpus | None, device: str) -> HeldOut | None:
    """The held-out texts of a corpus with the vectors of the 16-bit file `source`; None without a corpus."""
    return HeldOut(corpus, embed_sample(source, corpus.held_out, device)) if corpus else None


def embed_sample(path: Path, texts: Sequence[EvalText], device: str) -> Vectors:
    """Vectors of texts of a corpus, (n_texts, n_embd): as a user gets them, who is not told here what is cut."""
    with Embedder(path, device=device) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return embed_texts(model, texts, "measure held-out texts")


@dataclass(frozen=True)
class Search:
    """The search for recipes of one variant. Both questions to it share what was measured."""

    study: Study
    variant: str

    @cached_property
    def start(self) -> Candidate:
        """With llama.cpp's own types: the importance matrix alone, or with scales and codes that save enough."""
        study, stock = self.study, Recipe(self.variant)
        types = study.types(stock)
        plain = study.recipe(self.variant) if set(WEIGHED) & set(types.values()) else stock
        with progress(f"scales {self.variant}", len(rescale.places(study.weights.header))) as advance:
            exponents = rescale.search(study.weights, study.activations, study.imatrix, types, advance)
        best = self._measured(plain)
        scaled = self._measured(replace(study.recipe(self.variant), exponents=exponents)) if exponents else best
        best = scaled if scaled.mean < WORTH * best.mean else best
        if not study.compensates(best.recipe):
            return best
        weighed = tuning_arithmetic() if study.weighs else ""
        compensated = self._measured(replace(best.recipe, compensated=arithmetic(), weighed=weighed))
        if compensated.mean < best.mean:
            return compensated
        say(f"  {self.variant}: codes that compensate for each other's errors save nothing here, and are not used")
        return best

    @cached_property
    def choices(self) -> Choices:
        """The types that each tensor can take, with predicted noise."""
        study, recipe = self.study, self.start.recipe
        types = study.types(recipe)
        smallest = "Q8_0" if self.variant == "Q8_0" else LADDER[0]
        possible = promote.possible_types(study.weights, types, smallest=smallest)
        scales = rescale.scales(study.weights, study.imatrix, recipe.exponents)
        with progress("errors of every type", len(possible)) as advance:
            errors = promote.errors(study.weights, study.activations, study.imatrix, scales, possible, advance)
        if recipe.compensated:
            compensation = study.compensation(recipe)
            with progress("errors of feedback", sum(compensation.costs.values())) as advance:
                errors |= compensation.errors(possible, advance)
        kinds = {kind: noise(self._alone(kind)) for kind in sorted(set(map(kind_of, possible)))}
        return promote.choices(study.weights, errors, types, kinds)

    def under(self, allowed: float) -> Recipe:
        """The smallest recipe whose drift is under `allowed`, or the last one that was tried if none is.

        Predict, promote, measure and correct, until the drift is close under `allowed`.
        """
        if self.start.worst < allowed:
            return self.start.recipe
        say(f"  {self.variant}: {self.start.worst:.2%} at worst, not under {allowed:.2%}: promoting tensors")
        last, chosen = self.start, {name: choice[0] for name, choice in self.choices.items()}
        best: Candidate | None = None
        for _ in range(MAX_PROMOTIONS):
            chosen = promote.promote(self.choices, _allowed_noise(last, chosen, allowed))
            last = self._promoted(chosen)
            if last.worst < allowed and (best is None or self._size(last) < self._size(best)):
                best = last
            elif best:
                break
            if CLOSE * allowed < last.worst < allowed:
                break
        return (best or last).recipe

    def within_size(self, max_size: int, allowed: float) -> Recipe:
        """The recipe of the least drift within `max_size` bytes."""
        fixed = self._size(self.start) - sum(some[0].size_bytes for some in self.choices.values())
        chosen = promote.fill(self.choices, max_size - fixed)
        if chosen is None:
            least = fixed + total_size(promote.smallest(self.choices))
            raise OutOfReach(
                f"{self.study.weights.header.path}: no {self.variant} of {format_size(max_size)} (--max-size): with "
                f"the fewest bits for every weight it takes {format_size(least)}."
            )
        best = self._promoted(chosen)
        if self._size(self.start) <= max_size and self.start.mean < best.mean:
            best = self.start
        if best.worst >= allowed:
            needed = fixed + total_size(promote.promote(self.choices, _allowed_noise(best, chosen, allowed)))
            say(f"  the bound may not hold at this size; by prediction it takes {format_size(needed)}")
        return best.recipe

    def tuned(self, recipe: Recipe) -> Recipe:
        """`recipe` with trained scales and vectors, if that is wanted and lowers the drift."""
        if not (recipe.compensated and self.study.trains):
            return recipe
        before, after = self._measured(recipe), self._measured(replace(recipe, tuned=tuning_arithmetic()))
        if after.mean < before.mean and after.worst <= before.worst:
            return after.recipe
        say(f"  {self.variant}: training scales saves nothing here, and is not used")
        return recipe

    def _alone(self, kind: str) -> float:
        """The mean drift if only tensors of one kind are quantised."""
        return self.study.measure(self.start.recipe, f"{kind} alone", only=kind).mean

    def _promoted(self, chosen: Mapping[str, Choice]) -> Candidate:
        stock = self.study.types(Recipe(self.variant))
        types = {name: choice.kind for name, choice in chosen.items() if choice.kind != stock[name]}
        return self._measured(replace(self.start.recipe, types=types))

    def _measured(self, recipe: Recipe) -> Candidate:
        tried = self.study.measure(recipe, f"try {self.variant}")
        drifts = f"calibration texts drift {tried.mean:.3%}, at worst {tried.worst:.3%}"
        say(f"  {self.variant}, {recipe.kind}: {format_size(self._size(tried))}; {drifts}")
        return tried

    def _size(self, candidate: Candidate) -> int:
        """Bytes of the whole file. Those before the tensors, with the recipe, are estimated."""
        header, n_tensors = self.study.weights.header, len(self.study.weights.infos)
        return header.tensors[0].begin + 1_000 + 60 * n_tensors + self.study.size_bytes(candidate.recipe)


def _allowed_noise(last: Candidate, chosen: Mapping[str, Choice], allowed: float) -> float:
    """The predicted noise at which `last`, the candidate of `chosen`, would drift by `allowed` at worst."""
    return total_noise(chosen) * noise(last.mean * allowed / last.worst) / noise(last.mean)
