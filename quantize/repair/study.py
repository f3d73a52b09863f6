"""The importance matrix and activations of one model, and the drift of candidates on the calibration texts."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from f2gguf.evals.drift import drift, highest_mean
from f2gguf.evals.texts import EvalText, embed_texts, texts_sha256
from f2gguf.quantize.repair.assemble import Imatrix
from f2gguf.quantize.repair.calibration import MAX_TOKENS, load_calibration
from f2gguf.quantize.repair.imatrix import Activations, collect, read_imatrix, write_imatrix
from f2gguf.quantize.repair.plan import TypePlan, plan_variant
from f2gguf.quantize.repair.recipe import Recipe, make
from f2gguf.quantize.repair.tensors import Rows, Weights, size_as
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import TruncationWarning
from f2gguf.runtime.files import sha256_file, write_text, writing


@dataclass(frozen=True)
class Candidate:
    """A recipe, and the drift of its file on the calibration texts."""

    recipe: Recipe
    mean: float
    worst: float  # the highest of what the bound holds for: upper end of the mean, mean of a language, mean of a kind


@dataclass(frozen=True)
class Study:
    """A 16-bit file, and what the search for a recipe needs of it."""

    weights: Weights
    imatrix: Imatrix
    imatrix_sha256: str
    activations: Activations
    texts: Sequence[EvalText]
    reference: Rows  # the 16-bit file's vectors of `texts`, (n_texts, n_embd)
    work: Path  # folder of candidates and of results
    device: str
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

    def measure(self, recipe: Recipe, types: Mapping[str, str], label: str, *, n_texts: int | None = None) -> Candidate:
        """The drift of the file of `recipe` with `types` instead of its own, on all texts or `n_texts` of them.

        Results are saved and used again, by later runs too.
        """
        hashes = [sha256_file(self.weights.header.path), self.imatrix_sha256, texts_sha256(self.texts)]
        inputs = json.dumps([*hashes, recipe.to_header(), sorted(types.items()), n_texts])
        key = hashlib.sha256(inputs.encode()).hexdigest()
        path = self.work / "measured.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if key not in known:
            step = max(1, len(self.texts) // n_texts) if n_texts else 1
            known[key] = self._measure(recipe, types, slice(None, None, step), label)
            write_text(path, json.dumps(known))
        return Candidate(recipe, *known[key])

    def _measure(self, recipe: Recipe, types: Mapping[str, str], chosen: slice, label: str) -> tuple[float, float]:
        path, texts = self.work / "candidate.gguf", self.texts[chosen]
        max_tokens = min(MAX_TOKENS, self.weights.header.max_tokens)
        with progress(label, len(types) + len(texts)) as advance:
            make(self.weights, path, recipe, self.imatrix, types=types, on_progress=advance)
            with Embedder(path, device=self.device, max_tokens=max_tokens) as model, warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)  # texts are cut to save time
                drifts = drift(embed_texts(model, texts, advance), self.reference[chosen])
        path.unlink()
        return float(drifts.mean()), highest_mean(drifts, texts)


def study_source(
    source: Path,
    *,
    imatrix_path: Path,
    work: Path,
    calibration: Path | None,
    device: str,
    own_imatrix: Path | None = None,
) -> Study:
    """Run the calibration texts through `source`, and write the importance matrix to `imatrix_path`.

    `own_imatrix` is a file of the user that is used instead. A run that was stopped goes on from `work`.
    """
    weights = Weights(source)
    texts = load_calibration(calibration, weights.header.languages)
    if own_imatrix:
        read_imatrix(own_imatrix, weights)  # refuses a wrong file before the work
    work.mkdir(parents=True, exist_ok=True)
    with progress("calibrate", len(texts)) as advance:
        state_path = work / "activations.npz"
        activations, reference = collect(source, texts, device=device, state_path=state_path, on_progress=advance)
    if own_imatrix is None:
        write_imatrix(imatrix_path, activations, weights.header, texts)
    elif own_imatrix.resolve() != imatrix_path.resolve():
        with writing(imatrix_path) as part:
            shutil.copyfile(own_imatrix, part)
    say(f"importance matrix: {imatrix_path}, {len(texts)} calibration texts")
    imatrix, sha256 = read_imatrix(imatrix_path, weights), sha256_file(imatrix_path)
    return Study(weights, imatrix, sha256, activations, texts, reference, work, device)
