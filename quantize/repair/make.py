"""A recipe becomes a file. The file is measured on the evaluation texts, and its header gets the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from f2gguf.evals.drift import Verdict, judge
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, embed_texts
from f2gguf.quantize.convert.probes import golden_stamps
from f2gguf.quantize.convert.reserved import VERDICT, fill_in
from f2gguf.quantize.repair.assemble import Imatrix, Value, assemble
from f2gguf.quantize.repair.plan import VARIANTS, plan_variant
from f2gguf.quantize.repair.recipe import Recipe
from f2gguf.quantize.repair.rescale import scaled_imatrix, scales
from f2gguf.quantize.repair.tensors import OnProgress, Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress
from f2gguf.runtime.gguf import header as keys


@dataclass(frozen=True)
class Evaluation:
    """What a variant is measured with."""

    texts: Sequence[EvalText]
    reference: Vectors  # the F16 file's vectors of `texts`, (n_texts, n_embd)
    max_drift: float
    device: str


def make_measured(weights: Weights, path: Path, recipe: Recipe, imatrix: Imatrix, *, evaluation: Evaluation) -> Verdict:
    """Make the file of `recipe` at `path`, measure it, and fill the verdict into its header."""
    texts, max_drift = evaluation.texts, float(evaluation.max_drift)
    header = {**VERDICT, keys.KEY_MAX_DRIFT: max_drift, keys.KEY_N_TEXTS: len(texts)}
    with progress(f"quantise {recipe.variant}", len(weights.infos)) as advance:
        make(weights, path, recipe, imatrix, header=header, on_progress=advance)
    with Embedder(path, device=evaluation.device) as model:
        with progress(f"measure {recipe.variant}", len(texts)) as advance:
            vectors = embed_texts(model, texts, advance)
        verdict = judge(vectors, evaluation.reference, texts, dims=model.header.dims, max_drift=max_drift)
        golden = golden_stamps(model)
    drifts = {keys.KEY_MEAN_DRIFT: verdict.mean, keys.KEY_UPPER_DRIFT: verdict.upper}
    fill_in(path, {**drifts, keys.KEY_HOLDS: verdict.holds, **golden})
    return verdict


def make(
    weights: Weights,
    path: Path,
    recipe: Recipe,
    imatrix: Imatrix,
    *,
    types: Mapping[str, str] | None = None,
    header: Mapping[str, Value] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write the file of `recipe` to `path`, with `header` values added. `types` replace those of the recipe."""
    types = types or recipe.all_types(plan_variant(weights.header.path, recipe.variant))
    factors = scales(weights, imatrix, recipe.exponents)
    imatrix = scaled_imatrix(imatrix, factors) if recipe.imatrix_sha256 else {}
    stated: dict[str, Value] = {
        "general.file_type": VARIANTS[recipe.variant],
        "general.quantization_version": 2,
        keys.KEY_VARIANT: recipe.variant,
        keys.KEY_RECIPE: recipe.to_header(),
        **(header or {}),
    }
    assemble(weights, path, types, header=stated, imatrix=imatrix, scales=factors, on_progress=on_progress)
