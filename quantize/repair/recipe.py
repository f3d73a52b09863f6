"""How a variant is made. Its bytes depend on the F16 file, the importance matrix and the recipe, and nothing else."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from f2gguf.quantize.repair.assemble import Imatrix, Ready, assemble
from f2gguf.quantize.repair.codes import compiled
from f2gguf.quantize.repair.plan import VARIANTS, TypePlan, plan_variant, require_variant
from f2gguf.quantize.repair.rescale import Exponents, places, scaled_imatrix, scales
from f2gguf.quantize.repair.tensors import OnProgress, Weights
from f2gguf.runtime.errors import WrongRecipe, parsing
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.entries import Value
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.kernels import own
from f2gguf.runtime.llama.library import ggml_build
from threadpoolctl import threadpool_info


@dataclass(frozen=True)
class Recipe:
    """How a variant differs from what llama.cpp makes by default."""

    variant: str
    types: Mapping[str, str] = field(default_factory=dict)  # tensor -> type, where llama.cpp would choose another
    exponents: Mapping[str, Exponents] = field(default_factory=dict)  # place -> exponents of its scales
    imatrix_sha256: str = ""  # of the importance matrix; empty if none is used
    calibration_sha256: str = ""  # of the texts that the recipe was chosen with
    n_calibration_texts: int = 0
    compensated: str = ""  # library and processor that chose codes with feedback; empty for ggml's own codes
    weighed: str = ""  # library and device whose gradients weighed the tokens for these codes; empty for none
    tuned: str = ""  # library and device that trained scales and vectors; empty if nothing was trained
    versions: Mapping[str, str] = field(default_factory=lambda: made_with())

    @property
    def kind(self) -> str:
        """What the recipe uses: 'stock', 'imatrix', or what it adds to both, such as 'compensated, promoted'."""
        uses = {
            "compensated": self.compensated,
            "tuned": self.tuned,
            "rescaled": self.exponents,
            "promoted": self.types,
        }
        return ", ".join(name for name, used in uses.items() if used) or ("imatrix" if self.imatrix_sha256 else "stock")

    def all_types(self, plan: TypePlan) -> dict[str, str]:
        """The type of every tensor."""
        return {tensor.name: self.types.get(tensor.name, tensor.new_type) for tensor in plan.tensors}

    def lines(self, plan: TypePlan) -> list[str]:
        """The recipe for people."""
        lines = [f"llama.cpp's {self.variant} types" + (f", but for {len(self.types)} tensors" if self.types else "")]
        stock = {tensor.name: tensor.new_type for tensor in plan.tensors}
        changes = Counter((kind_of(name), stock[name], kind) for name, kind in self.types.items())
        lines += [f"{n} {name}: {old} to {new}" for (name, old, new), n in sorted(changes.items())]
        if self.imatrix_sha256:
            lines.append(f"importance matrix of {self.n_calibration_texts} texts, SHA-256 {self.imatrix_sha256[:12]}")
        if self.compensated:
            lines.append(f"codes that compensate for each other's errors, by {self.compensated}")
        if self.weighed:
            lines.append(f"tokens weighed for them by the gradients of their texts' vectors, by {self.weighed}")
        if self.tuned:
            lines.append(f"scales, norms and biases trained on the drift of those texts, by {self.tuned}")
        scaled = Counter((kind_of(place), exponents) for place, exponents in self.exponents.items())
        return lines + [
            f"channels of {n} {place} scaled by activation^{a:g} / weight^{w:g}"
            for (place, (a, w)), n in sorted(scaled.items())
        ]

    def to_header(self) -> str:
        """The recipe as JSON. Equal recipes give equal texts."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


def made_with() -> dict[str, str]:
    """The versions that the bytes of a file depend on."""
    return {"f2gguf": version("f2gguf"), "llama-cpp-python": version("llama-cpp-python"), "ggml": ggml_build()}


def arithmetic() -> str:
    """What codes that are chosen with feedback depend on beside the inputs: one rounding more or less moves some."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    own_blas = [it for it in threadpool_info() if it["user_api"] == "blas" and "numpy" in it["filepath"]]
    kernels = [it.get("architecture", "") for it in own_blas]  # 'SkylakeX'
    words = [f"numpy {np.__version__}", f"{blas['name']} {blas['version']}".strip(), *kernels, platform.machine()]
    words += ["products on AMX"] * (own.units() == "AMX") + ["compiled loops"] * bool(compiled.library())
    return ", ".join(filter(None, words))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a .gguf file's header, or in a .json file with the same keys. Raises `WrongRecipe`."""
    from pydantic import TypeAdapter

    if path.suffix == ".gguf":
        text = read_header(path).values.get(keys.KEY_RECIPE)
        if text is None:
            raise WrongRecipe(f"{path}: its header has no recipe (--recipe). f2gguf writes one since 0.1.")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WrongRecipe(f"{path}: cannot be read: {error} (--recipe).") from error
    with parsing(path, WrongRecipe, "Pass a .gguf file that f2gguf made, or its recipe as JSON (--recipe)."):
        recipe = TypeAdapter(Recipe).validate_json(text)
        if unknown := set(json.loads(text)) - {"kind", "lines", *(field.name for field in fields(Recipe))}:
            raise ValueError(f"{min(unknown)!r} is no part of a recipe")
    return replace(recipe, variant=require_variant(recipe.variant))


def require_inputs(recipe: Recipe, weights: Weights, variant: str, imatrix: Path | None, path: Path) -> None:
    """Raise `WrongRecipe` unless the recipe was made for these inputs: with others it gives other bytes."""
    if recipe.variant != variant:
        raise WrongRecipe(f"{path}: is a recipe for {recipe.variant}, not for {variant} (--recipe).")
    place_names = {place.name for place in places(weights.header)}
    if unknown := recipe.types.keys() - weights.infos.keys() | recipe.exponents.keys() - place_names:
        raise WrongRecipe(f"{path}: names {min(unknown)}, which {weights.header.path} does not have (--recipe).")
    if recipe.imatrix_sha256 and (imatrix is None or sha256_file(imatrix) != recipe.imatrix_sha256):
        flaw = "none was given" if imatrix is None else f"{imatrix} is another"
        needed = f"the importance matrix with the SHA-256 {recipe.imatrix_sha256}"
        raise WrongRecipe(f"{path}: needs {needed}, and {flaw} (--imatrix).")


def make(
    weights: Weights,
    path: Path,
    recipe: Recipe,
    imatrix: Imatrix,
    *,
    types: Mapping[str, str] | None = None,
    ready: Ready | None = None,
    header: Mapping[str, Value] | None = None,
    on_progress: OnProgress = lambda _: None,
) -> None:
    """Write the file of `recipe` to `path`, with `header` values added. `types` replace those of the recipe.

    `ready` are the tensors that `Compensation` made, where the recipe is compensated.
    """
    types = types or recipe.all_types(plan_variant(weights.header.path, recipe.variant))
    factors = scales(weights, imatrix, recipe.exponents)
    imatrix = scaled_imatrix(imatrix, factors) if recipe.imatrix_sha256 else {}
    values = stated(recipe, header or {})
    assemble(weights, path, types, header=values, imatrix=imatrix, scales=factors, ready=ready, on_progress=on_progress)


def stated(recipe: Recipe, header: Mapping[str, Value]) -> dict[str, Value]:
    """What the header of a variant says besides that of its F16 file, with the values of `header`."""
    return {
        "general.file_type": VARIANTS[recipe.variant],
        "general.quantization_version": 2,
        keys.KEY_VARIANT: recipe.variant,
        keys.KEY_RECIPE: recipe.to_header(),
        **header,
    }


def kind_of(name: str) -> str:
    """'blk.3.ffn_down.weight' and 'blk.3.ffn_down.bias' -> 'ffn_down'."""
    return name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
