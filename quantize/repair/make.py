"""A recipe becomes a file: measured, its verdict in its own header, and only then given its name."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from f2gguf.evals.drift import Vectors, Verdict, judge
from f2gguf.evals.texts import EvalText, embed_texts
from f2gguf.quantize.convert.probes import golden_stamps
from f2gguf.quantize.convert.reserved import stamp
from f2gguf.quantize.repair.assemble import Imatrix, Value, assemble
from f2gguf.quantize.repair.plan import VARIANTS, plan_variant
from f2gguf.quantize.repair.recipe import Recipe
from f2gguf.quantize.repair.rescale import scaled_imatrix, scales
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import Progress
from f2gguf.runtime.files import writing
from f2gguf.runtime.gguf import header as keys

Recipes = Generator[Recipe, Verdict, None]  # one after the other: each but the first for the verdict on the one before


@dataclass(frozen=True)
class Measurement:
    """What a variant is measured with: evaluation texts, the 16-bit file's vectors of them, the bound."""

    texts: Sequence[EvalText]
    reference: Vectors  # (n_texts, n_embd)
    max_drift: float
    device: str
    progress: Progress


def make(
    weights: Weights,
    target: Path,
    recipe: Recipe,
    imatrix: Imatrix,
    *,
    types: Mapping[str, str] | None = None,
    header: Mapping[str, Value] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `weights` as `recipe` says to `target`, with `header` values added; `types` replace the recipe's own."""
    scaled = scales(weights, imatrix, recipe.exponents)
    stated: dict[str, Value] = {
        "general.file_type": int(VARIANTS[recipe.variant]),
        "general.quantization_version": 2,
        keys.KEY_VARIANT: recipe.variant,
        keys.KEY_RECIPE: recipe.to_header(),
    }
    assemble(
        weights,
        target,
        types or recipe.all_types(plan_variant(weights.header.path, recipe.variant)),
        header={**stated, **(header or {})},
        imatrix=scaled_imatrix(imatrix, scaled) if recipe.imatrix_sha256 else {},
        scales=scaled,
        on_progress=on_progress,
    )


def only(recipe: Recipe) -> Recipes:
    """`recipe`, whatever the verdict."""
    yield recipe


def settle(
    weights: Weights,
    target: Path,
    recipes: Recipes,
    imatrix: Imatrix,
    *,
    measurement: Measurement,
    before_rename: Callable[[Path, Recipe, Verdict], None] = lambda *_: None,
) -> Verdict:
    """Make `target` by the last of `recipes`, and stamp the verdict into its header.

    `before_rename` is given the finished file under its temporary name.
    """
    recipe: Recipe | None = next(recipes)
    with writing(target) as part:
        while recipe:
            settled = recipe
            verdict, cosines = _make_and_judge(weights, part, recipe, imatrix, measurement)
            recipe = _after(recipes, verdict)
        measured = {keys.KEY_MEAN_DRIFT: verdict.mean, keys.KEY_UPPER_DRIFT: verdict.upper}
        stamp(part, {**measured, keys.KEY_HOLDS: verdict.holds, **cosines})
        before_rename(part, settled, verdict)
    return verdict


def _after(recipes: Recipes, verdict: Verdict) -> Recipe | None:
    try:
        return recipes.send(verdict)
    except StopIteration:
        return None


def _make_and_judge(
    weights: Weights, part: Path, recipe: Recipe, imatrix: Imatrix, measurement: Measurement
) -> tuple[Verdict, dict[str, list[float]]]:
    """The verdict on `recipe`, and the golden vectors' cosines to stamp into the file."""
    variant, texts = recipe.variant, measurement.texts
    placeholders: dict[str, Value] = {
        keys.KEY_MEAN_DRIFT: 0.0,
        keys.KEY_UPPER_DRIFT: 0.0,
        keys.KEY_HOLDS: False,
        keys.KEY_MAX_DRIFT: float(measurement.max_drift),
        keys.KEY_N_TEXTS: len(texts),
    }
    with measurement.progress(f"quantise {variant}", len(weights.infos)) as advance:
        make(weights, part, recipe, imatrix, header=placeholders, on_progress=advance)
    with (
        Embedder(part, device=measurement.device) as model,
        measurement.progress(f"measure {variant}", len(texts)) as advance,
    ):
        vectors = embed_texts(model, texts, advance)
        dims, cosines = model.header.dims, golden_stamps(model)
    return judge(vectors, measurement.reference, texts, dims=dims, max_drift=measurement.max_drift), cosines
