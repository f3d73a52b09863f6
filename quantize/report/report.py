"""drift.json, typed: what the files of a release were made from, and what was measured of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from f2gguf.evals.conversion import ConversionCheck
from f2gguf.evals.drift import Verdict, json_text, rounded
from f2gguf.quantize.repair.corpus import CorpusDrift
from f2gguf.quantize.repair.recipe import Recipe
from f2gguf.runtime.errors import InputError, parsing
from f2gguf.runtime.files import sha256_file, write_text
from f2gguf.runtime.fit.devices import Work, work_of
from f2gguf.runtime.fit.memory import Memory, ModelMemory, memory_of, model_memory
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.hub.models import first_usual
from f2gguf.runtime.llama.library import backends, device_in_use
from f2gguf.runtime.llama.threads import cpu_name, default_threads

FILE_NAME = "drift.json"
BASE = "F16"  # unless a model does not fit it


@dataclass(frozen=True)
class Source:
    """What the base file is made from: the checkpoint, and every fact that its header and the card state."""

    repo: str | None
    revision: str | None
    sha256: str  # over every file of the checkpoint that shapes the result
    architecture: str
    n_parameters: int
    pooling: str
    prompts: Mapping[str, str]
    dims: tuple[int, ...]  # Matryoshka widths, the full one last
    max_tokens: int
    eos_token: str
    license: str | None
    languages: tuple[str, ...]
    cache_bytes: int  # of one token's keys and values in F16; 0 for models that see a text at once
    base: str | None = None  # type of the file that variants are made from, where that is not F16


@dataclass(frozen=True)
class Texts:
    """The evaluation texts: those that the model is judged on, and how many gate 1 compares."""

    n: int
    sha256: str
    ids: tuple[str, ...]
    languages: tuple[str, ...]
    n_conversion: int
    conversion_sha256: str
    quick: bool | None = None  # True where they are about a quarter of them all


@dataclass(frozen=True)
class File:
    """A file of the release, as its bytes were when it was measured."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Performance:
    """What a file takes, and how fast it was, where it was measured. Two runs differ in it."""

    memory: Memory  # of a process that embeds texts of up to fit.memory.MAX_TOKENS tokens
    work: Work
    texts_per_s: float | None = None  # of the evaluation texts; None where the file was measured by an older version
    machine: str | None = None  # that did so many


@dataclass(frozen=True)
class Conversion(ConversionCheck):
    """Gate 1, and how many of the texts stock llama.cpp splits differently."""

    n_stock_tokenizer_differs: int = 0


@dataclass(frozen=True)
class VariantInputs:
    """What a variant is made from. When any of it changes, the variant is made and measured again."""

    f16_sha256: str
    max_drift: float
    max_size: int | None = None  # bytes
    stock: bool = False  # llama.cpp's plain recipe, whatever it drifts
    calibration_sha256: str | None = None  # of the texts that the recipe is chosen with
    imatrix_sha256: str | None = None  # of an importance matrix of the user's own
    compensate: bool = False  # whether codes are chosen that compensate for each other's errors
    tune: bool | None = None  # whether scales and vectors are trained; None: where torch is there and it takes minutes
    held_out_sha256: str | None = None  # of the texts of the user's corpus that variants are measured on too


@dataclass(frozen=True)
class Measured(Verdict):
    """The verdict on a file, and how the file was made."""

    size_bytes: int
    recipe: Recipe
    recipe_lines: tuple[str, ...]  # the recipe in words
    inputs: VariantInputs
    corpus: CorpusDrift | None = None  # where the file was made for a corpus

    def as_dict(self) -> dict[str, Any]:
        document = super().as_dict()
        return {**document, "recipe": {"kind": self.recipe.kind, **document["recipe"]}}


@dataclass(frozen=True)
class Report:
    """Everything that was measured of one model. drift.json holds it under the same names."""

    model: str
    made_with: Mapping[str, str]
    source: Source
    texts: Texts
    max_drift: float
    conversion: Conversion | None = None
    files: Mapping[str, File] = field(default_factory=dict)  # the base (F16), then the variants
    imatrix: File | None = None
    stock: Mapping[str, Measured] = field(default_factory=dict)  # llama.cpp's own recipes, where another one was chosen
    variants: Mapping[str, Measured] = field(default_factory=dict)
    model_memory: ModelMemory | None = None  # what any file of the model takes besides its weights
    performance: Mapping[str, Performance] | None = None  # of the files; None in reports of older versions

    @property
    def performances(self) -> dict[str, Performance]:
        """What is known of each file, in their order."""
        known = self.performance or {}
        return {name: known[name] for name in self.files if name in known}

    @property
    def base(self) -> str:
        """The file that variants are made from and measured against: 'F16' or 'F32'."""
        return self.source.base or BASE

    @property
    def named_verdicts(self) -> dict[str, Measured]:
        """Everything measured by its name in tables: Q4_0, then "Q4_0 stock" where another recipe was chosen."""
        named = {}
        for variant, verdict in self.variants.items():
            named[variant] = verdict
            if variant in self.stock:
                named[f"{variant} stock"] = self.stock[variant]
        return named

    @property
    def recommended(self) -> str:
        """The first usual variant that holds its bound; the base where none does."""
        holding = (name for name, verdict in self.variants.items() if verdict.holds)
        return first_usual(holding, self.files)

    def origin_changes(self, other: Report) -> list[str]:
        """What the base files of both are made from and judged on, where it differs: the names of those facts."""
        versions = [] if self.made_with == other.made_with else ["made_with"]
        return [*differing(self.source, other.source), *differing(self.texts, other.texts), *versions]

    def with_variant(self, name: str, file: File, verdict: Measured) -> Report:
        """The report with one variant more, the largest first."""
        files = {**self.files, name: file}
        variants = {**self.variants, name: verdict}
        order = sorted(variants, key=lambda variant: -files[variant].size_bytes)
        return replace(
            self,
            files={variant: files[variant] for variant in (self.base, *order)},
            variants={variant: variants[variant] for variant in order},
        )

    def with_performance(self, name: str, path: Path, texts_per_s: float | None = None, *, device: str) -> Report:
        """The report with what the file at `path` takes, and how many texts it did in a second on `device`."""
        header = read_header(path)
        model = self.model_memory or model_memory(header, pooling=header.require_pooling())
        memory, machine = memory_of(model, header, path.stat().st_size), _machine(device) if texts_per_s else None
        made = Performance(memory, work_of(header), texts_per_s, machine)
        return replace(self, model_memory=model, performance={**(self.performance or {}), name: made})

    def without_variants(self, names: set[str]) -> Report:
        """The report without the variants `names`."""
        known = self.performance
        return replace(
            self,
            performance=known and {name: it for name, it in known.items() if name not in names},
            files={name: file for name, file in self.files.items() if name not in names},
            variants={name: verdict for name, verdict in self.variants.items() if name not in names},
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, figures rounded to a millionth."""
        return {
            **rounded(asdict(self)),
            "conversion": self.conversion.as_dict() if self.conversion else None,
            "stock": {name: verdict.as_dict() for name, verdict in self.stock.items()},
            "variants": {name: verdict.as_dict() for name, verdict in self.variants.items()},
        }


def differing(ours: Any, theirs: Any) -> list[str]:
    """The fields in which two dataclasses of one type differ."""
    return [item.name for item in fields(ours) if getattr(ours, item.name) != getattr(theirs, item.name)]


def described(path: Path, *, name: str | None = None) -> File:
    """A file of the release as it is now; `name` is what it will be called."""
    return File(name or path.name, path.stat().st_size, sha256_file(path))


def _machine(device: str) -> str:
    """This machine in words: 'AMD EPYC 9654 96-Core Processor, 2 threads'."""
    n_threads = default_threads()
    on_cpu = f"{cpu_name()}, {n_threads} {'thread' if n_threads == 1 else 'threads'}"
    in_use = device_in_use(offloaded=device != "cpu" and backends() != ["CPU"])
    return on_cpu if in_use == "cpu" else f"{in_use}, beside {on_cpu}"


def write_report(folder: Path, report: Report) -> None:
    write_text(folder / FILE_NAME, json_text(report.as_dict()))


def read_report(folder: Path) -> Report:
    """The report of a release; `InputError` where there is none, or one that this version cannot read."""
    from pydantic import TypeAdapter

    path, again = folder / FILE_NAME, "Run `quantize all` for the model again."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. {again}") from error
    with parsing(path, InputError, again):
        report, document = TypeAdapter(Report).validate_json(content), json.loads(content)
        derived = json.loads(json_text(report.as_dict()))
        if (contradicted := _first_difference(document, derived)) is not None:
            raise ValueError(f"{contradicted} is not what follows from the rest of it")
    return report


def _first_difference(document: Any, derived: Any) -> str | None:
    """Where two JSON documents differ first, such as 'variants.Q8_0.holds'; None where they are the same.

    A key that is missing says null: an older version may not have known it.
    """
    if not (isinstance(document, dict) and isinstance(derived, dict)):
        return None if document == derived else ""
    for key in [*derived, *document]:
        if (place := _first_difference(document.get(key), derived.get(key))) is not None:
            return f"{key}.{place}".rstrip(".")
    return None
