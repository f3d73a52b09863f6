"""The importance matrix and activations of one model, and the drift of candidates on the calibration texts."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.drift import drift, highest_mean
from f2gguf.evals.texts import EvalText, texts_sha256
from f2gguf.quantize.repair.assemble import Imatrix, Ready
from f2gguf.quantize.repair.calibration import (
    LONG_TOKENS,
    Calibration,
    fitting,
    judging,
    layer_shapes,
    sampled,
    spliced,
    token_budget,
    token_ids,
)
from f2gguf.quantize.repair.codes.compensate import COMPENSATED, Compensation
from f2gguf.quantize.repair.codes.layers import has_layers
from f2gguf.quantize.repair.codes.tune import (
    Estimate,
    Objective,
    gradient_seconds,
    is_worth,
    require_torch,
    training_seconds,
    tuned,
    tuning_arithmetic,
    weighed,
)
from f2gguf.quantize.repair.imatrix import Activations, collect, read_imatrix, write_imatrix
from f2gguf.quantize.repair.plan import TypePlan, plan_variant
from f2gguf.quantize.repair.recipe import Recipe, arithmetic, kind_of, make
from f2gguf.quantize.repair.rescale import scaled_imatrix, scales
from f2gguf.quantize.repair.tensors import OnProgress, Rows, Weights, size_as
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import NoVector, WrongRecipe
from f2gguf.runtime.files import sha256_file, write_text, writing
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.llama.runner import unusable

N_PROBE_TEXTS = 48  # that the kinds of tensors are compared with


@dataclass(frozen=True)
class Candidate:
    """A recipe, and the drift of its file on the calibration texts that judge."""

    recipe: Recipe
    mean: float
    worst: float  # the highest of what the bound holds for: upper end of the mean, mean of a language, mean of a kind


@dataclass(frozen=True)
class Judged:
    """The texts that candidates are measured on."""

    texts: Sequence[EvalText]
    ids: Sequence[Ids]
    reference: Rows  # the 16-bit file's vectors, (n_texts, n_embd)

    def some(self, n_texts: int) -> Judged:
        """About `n_texts` of them, evenly spread."""
        chosen = slice(None, None, max(1, len(self.texts) // n_texts))
        return Judged(self.texts[chosen], self.ids[chosen], self.reference[chosen])


@dataclass(frozen=True)
class Study:
    """A 16-bit file, and what the search for a recipe needs of it."""

    weights: Weights
    imatrix: Imatrix
    imatrix_sha256: str
    activations: Activations
    texts: Sequence[EvalText]  # of the calibration
    fitting: Sequence[Ids]  # token ids of those that choose scales and codes
    judged: Judged
    work: Path  # folder of candidates and of results
    device: str
    compensate: bool  # choose codes that compensate for each other's errors
    tune: bool | None  # train scales and vectors; None: where torch is there and it takes minutes
    _plans: dict[str, TypePlan] = field(default_factory=dict)

    def types(self, recipe: Recipe) -> dict[str, str]:
        """The type of every tensor in `recipe`."""
        if recipe.variant not in self._plans:
            self._plans[recipe.variant] = plan_variant(self.weights.header.path, recipe.variant)
        return recipe.all_types(self._plans[recipe.variant])

    def size_bytes(self, recipe: Recipe) -> int:
        """The size of all tensors in `recipe`."""
        return sum(size_as(self.weights.infos[name], kind) for name, kind in self.types(recipe).items())

    def recipe(self, variant: str) -> Recipe:
        """The recipe of llama.cpp's own types with the importance matrix."""
        return Recipe(variant, {}, {}, self.imatrix_sha256, texts_sha256(self.texts), len(self.texts))

    def compensates(self, recipe: Recipe) -> bool:
        """Whether a layer of `recipe` has a type whose codes can compensate for each other's errors."""
        kinds = {kind for name, kind in self.types(recipe).items() if name.startswith("blk.")}
        return self.compensate and has_layers(self.weights.header) and bool(kinds & set(COMPENSATED))

    @cached_property
    def weighs(self) -> bool:
        """Whether gradients weigh tokens; says how long it would take where they do not."""
        return self._is_worth(gradient_seconds, "tokens are not weighed by gradients")

    @cached_property
    def trains(self) -> bool:
        """Whether scales and vectors are trained; says how long it would take where they are not."""
        return self._is_worth(training_seconds, "scales are not trained")

    def _is_worth(self, seconds: Estimate, without: str) -> bool:
        """A run that goes on does as it began, though the machine may be busier or less busy now."""
        n_weights, n_tokens = sum(map(math.prod, layer_shapes(self.weights.infos.items()))), sum(map(len, self.fitting))
        key = f"{without}, {self.tune}, {find_spec('torch') is not None}"
        return bool(self._kept(key, lambda: is_worth(self.tune, seconds, n_weights, n_tokens, without=without)))

    def compensation(self, recipe: Recipe) -> Compensation:
        """What makes the codes of `recipe`."""
        return _compensation(self.weights, self.fitting, self.judged.ids, recipe, self.imatrix, self.work)

    def ready(self, recipe: Recipe) -> Ready:
        """The tensors that a compensated `recipe` does not leave to ggml; they are kept until the study ends."""
        if not recipe.compensated:
            return {}
        return _run(self.compensation(recipe), recipe, self.types(recipe), self.work, self.device)

    def measure(self, recipe: Recipe, label: str, *, only: str | None = None) -> Candidate:
        """The drift of the file of `recipe` on the texts that judge.

        With `only`, nothing but tensors of that kind is quantised, and some of the texts do. Results are saved and used
        again, by later runs too.
        """
        return Candidate(recipe, *self._kept(self._key(recipe, only), lambda: self._measure(recipe, label, only)))

    def _kept(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` gives, as JSON has it; the work's folder keeps it."""
        path = self.work / "measured.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if key not in known:
            known[key] = find()
            write_text(path, json.dumps(known))
        return known[key]

    def _measure(self, recipe: Recipe, label: str, only: str | None) -> tuple[float, float]:
        types, ready, judged, path = self.types(recipe), self.ready(recipe), self.judged, self.work / "candidate.gguf"
        if only is not None:
            infos = self.weights.infos
            types = {name: kind if kind_of(name) == only else infos[name].type for name, kind in types.items()}
            ready = {name: data for name, data in ready.items() if kind_of(name) == only}
            judged = judged.some(N_PROBE_TEXTS)
        with progress(label, len(types) + len(judged.texts)) as advance:
            make(self.weights, path, recipe, self.imatrix, types=types, ready=ready, on_progress=advance)
            drifts = drift(vectors_of(path, judged.ids, self.device, advance), judged.reference)
        path.unlink()
        return float(drifts.mean()), highest_mean(drifts, judged.texts)

    def _key(self, recipe: Recipe, only: str | None = None) -> str:
        """A name for what is computed of a recipe."""
        return _key_of(self.weights, recipe, self.imatrix_sha256, texts_sha256(self.texts), only)


def compensated(
    weights: Weights, recipe: Recipe, imatrix: Imatrix, calibration: Calibration, work: Path, path: Path, device: str
) -> Ready:
    """The tensors of a compensated `recipe` of the file `path`, made again from the same calibration texts.

    Raises `WrongRecipe` for other texts.
    """
    texts, corpus = sampled(calibration.texts, _budget(weights)), calibration.corpus
    if texts_sha256(texts) != recipe.calibration_sha256:
        here = corpus.path if corpus else "those that f2gguf ships"
        raise WrongRecipe(
            f"{path}: was made with other calibration texts than {here}: their SHA-256 is {recipe.calibration_sha256} "
            "(--calibration)."
        )
    if recipe.compensated != (here := arithmetic()):
        say(f"The recipe's codes were chosen by {recipe.compensated}. Some will differ with {here}.")
    for theirs, what in ((recipe.weighed, "tokens were weighed"), (recipe.tuned, "scales were trained")):
        if theirs:
            require_torch(f"{path}: its {what} with gradients")
            if theirs != (here := tuning_arithmetic()):
                say(f"The recipe's {what} by {theirs}. Some codes and scales will differ with {here}.")
    types = recipe.all_types(plan_variant(weights.header.path, recipe.variant))
    fit, judge = token_ids_of(weights, texts)
    return _run(_compensation(weights, fit, judge, recipe, imatrix, work), recipe, types, work, device)


def token_ids_of(weights: Weights, texts: Sequence[EvalText]) -> tuple[list[Ids], list[Ids]]:
    """Of the texts that choose, and of those that judge."""
    with Embedder(weights.header.path, max_tokens=min(LONG_TOKENS, weights.header.max_tokens)) as model:
        chosen = [*fitting(texts), *spliced(texts, _budget(weights))]
        return token_ids(model.encoder, chosen), token_ids(model.encoder, judging(texts))


def _budget(weights: Weights) -> float:
    return token_budget(layer_shapes(weights.infos.items()))


def vectors_of(path: Path, ids: Sequence[Ids], device: str, on_progress: OnProgress = lambda _: None) -> Rows:
    """What the file `path` makes of token ids, (n_texts, n_embd)."""
    with Embedder(path, device=device, max_tokens=max(map(len, ids))) as model:
        vectors = model.encoder.compute(ids, on_progress=on_progress)
    if bad := unusable(vectors):
        raise NoVector(f"{path}: {len(bad)} of {len(ids)} calibration texts have no finite vector.", bad, vectors)
    return vectors


def _compensation(
    weights: Weights, fit: Sequence[Ids], judge: Sequence[Ids], recipe: Recipe, imatrix: Imatrix, work: Path
) -> Compensation:
    factors = scales(weights, imatrix, recipe.exponents)
    gradients = weighed(weights, fit, work) if recipe.weighed else None
    return Compensation(weights, fit, judge, scaled_imatrix(imatrix, factors), factors, gradients)


def _run(
    compensation: Compensation,
    recipe: Recipe,
    types: dict[str, str],
    work: Path,
    device: str,
) -> Ready:
    """Choose the codes of `recipe`, and train scales if it says so. Both are kept in `work` under their own names."""
    weights = compensation.weights
    folder = work / f"codes-{_key_of(weights, replace(recipe, tuned=''))}"
    with progress(f"compensate {recipe.variant}", sum(compensation.costs.values())) as advance:
        ready = compensation.run(types, folder, advance)
    if not recipe.tuned:
        return ready
    path = work / f"tuned-{_key_of(weights, recipe)}.npz"
    if not path.exists():
        fit, judge = (
            Objective(ids, vectors_of(weights.header.path, ids, device))
            for ids in (compensation.fitting, compensation.judging)
        )
        made = tuned(compensation, types, ready, fit, judge, label=f"tune {recipe.variant}")
        with writing(path) as part, part.open("wb") as file:
            np.savez(file, **made)  # type: ignore[arg-type]
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _key_of(weights: Weights, recipe: Recipe, *more: str | None) -> str:
    """A name for what is computed of a recipe, which names its imatrix and texts itself if it uses them."""
    inputs = json.dumps([sha256_file(weights.header.path), recipe.to_header(), *more])
    return hashlib.sha256(inputs.encode()).hexdigest()


def study_source(
    source: Path,
    *,
    imatrix_path: Path,
    work: Path,
    texts: Sequence[EvalText],
    device: str,
    own_imatrix: Path | None = None,
    compensate: bool = True,
    tune: bool | None = None,
) -> Study:
    """Run `texts`, or so many as the size of `source` allows, through it; write the importance matrix.

    `own_imatrix` is a file of the user that is used instead. A run that was stopped goes on from `work`.
    """
    weights = Weights(source)
    texts = sampled(texts, _budget(weights))
    if own_imatrix:
        read_imatrix(own_imatrix, weights)  # refuses a wrong file before the work
    work.mkdir(parents=True, exist_ok=True)
    fit, judge = fitting(texts), judging(texts)
    with progress("calibrate", len(fit) + len(judge)) as advance:
        state_path = work / "activations.npz"
        activations, _ = collect(source, fit, device=device, state_path=state_path, on_progress=advance)
        ids = token_ids_of(weights, texts)
        judged = Judged(judge, ids[1], vectors_of(source, ids[1], device, advance))
    if own_imatrix is None:
        write_imatrix(imatrix_path, activations, weights.header, texts)
    elif own_imatrix.resolve() != imatrix_path.resolve():
        with writing(imatrix_path) as part:
            shutil.copyfile(own_imatrix, part)
    say(f"importance matrix of {len(texts)} calibration texts")
    imatrix, sha256 = read_imatrix(imatrix_path, weights), sha256_file(imatrix_path)
    return Study(weights, imatrix, sha256, activations, texts, ids[0], judged, work, device, compensate, tune)
