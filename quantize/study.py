"""What is known of a model from its calibration texts, and how far a recipe drifts on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from f2gguf.evals.drift import bound_means, drift
from f2gguf.evals.texts import EvalText, embed_texts, texts_sha256
from f2gguf.quantize.assemble import Imatrix, Value, assemble
from f2gguf.quantize.calibration import MAX_TOKENS
from f2gguf.quantize.imatrix import Activations
from f2gguf.quantize.recipe import Recipe
from f2gguf.quantize.rescale import scaled_imatrix, scales
from f2gguf.quantize.tensors import Rows, Weights
from f2gguf.quantize.variants import FILE_TYPES, Plan, plan_variant
from f2gguf.runtime import Embedder
from f2gguf.runtime import header as keys
from f2gguf.runtime.console import Progress
from f2gguf.runtime.files import write_text


@dataclass(frozen=True)
class Drift:
    """Of a recipe on the calibration texts; fractions."""

    mean: float
    worst: float  # the highest of what the bound is over: upper end of the mean, mean of a language, mean of a kind


@dataclass(frozen=True)
class Study:
    """A 16-bit file with everything that the search for a recipe needs."""

    weights: Weights
    imatrix: Imatrix
    imatrix_sha256: str
    activations: Activations
    texts: Sequence[EvalText]
    reference: Rows  # the 16-bit file's vectors of `texts`, (n_texts, n_embd)
    work: Path  # where candidates are made and results are kept
    device: str
    progress: Progress

    @property
    def source(self) -> Path:
        return self.weights.header.path

    @cached_property
    def calibration_sha256(self) -> str:
        return texts_sha256(self.texts)

    def plan(self, variant: str) -> Plan:
        return plan_variant(self.source, variant)

    def recipe(self, variant: str, **choices: object) -> Recipe:
        """A recipe that uses the importance matrix, and what `choices` say."""
        return Recipe(
            variant,
            imatrix_sha256=self.imatrix_sha256,
            calibration_sha256=self.calibration_sha256,
            n_calibration_texts=len(self.texts),
            **choices,  # type: ignore[arg-type]
        )

    def measure(self, recipe: Recipe, label: str) -> Drift:
        """The drift of `recipe` on the calibration texts; what was measured once is kept."""
        plan = self.plan(recipe.variant)
        return self.measure_types(recipe, recipe.all_types(plan), label)

    def measure_types(
        self, recipe: Recipe, types: Mapping[str, str], label: str, *, n_texts: int | None = None
    ) -> Drift:
        """The drift of a file with the imatrix and scales of `recipe` and tensors of `types`, on evenly spread texts."""
        key = hashlib.sha256(repr([recipe.to_header(), sorted(types.items()), n_texts]).encode()).hexdigest()
        path = self.work / "measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            chosen = slice(None, None, max(1, len(self.texts) // n_texts) if n_texts else 1)
            known[key] = self._measure(recipe, types, chosen, label)
            write_text(path, json.dumps(known))
        return Drift(*known[key])

    def _measure(self, recipe: Recipe, types: Mapping[str, str], chosen: slice, label: str) -> tuple[float, float]:
        path = self.work / "candidate.gguf"
        texts = self.texts[chosen]
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.progress(label, len(types) + len(texts)) as advance:
            make(self.weights, path, recipe, types, self.imatrix, on_progress=advance)
            with Embedder(
                path, device=self.device, max_tokens=min(MAX_TOKENS, self.weights.header.max_tokens)
            ) as model:
                drifts = drift(embed_texts(model, texts, advance), self.reference[chosen])
        path.unlink()
        return float(drifts.mean()), max(bound_means(drifts, texts).values())


def make(
    weights: Weights,
    target: Path,
    recipe: Recipe,
    types: Mapping[str, str],
    imatrix: Imatrix,
    *,
    header: Mapping[str, Value] | None = None,
    on_progress: object = None,
) -> None:
    """Write the file of `recipe` with tensors of `types` to `target`."""
    used = imatrix if recipe.imatrix_sha256 else {}
    scaled = scales(weights, imatrix, recipe.exponents)
    stated = {"general.file_type": int(FILE_TYPES[recipe.variant]), "general.quantization_version": 2}
    assemble(
        weights,
        target,
        types,
        header={**stated, keys.KEY_RECIPE: recipe.to_header(), **(header or {})},
        imatrix=scaled_imatrix(used, scaled),
        scales=scaled,
        on_progress=on_progress,  # type: ignore[arg-type]
    )
