"""One run of the main job: what it is asked to make and where, and what of an earlier run still holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from f2gguf.evals.conversion import can_check
from f2gguf.evals.texts import EvalText, texts_sha256
from f2gguf.quantize.repair.calibration import Calibration
from f2gguf.quantize.repair.recipe import made_with
from f2gguf.quantize.report.report import (
    BASE,
    FILE_NAME,
    File,
    Report,
    Source,
    Texts,
    VariantInputs,
    differing,
    read_report,
)
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import InputError, WrongUsage
from f2gguf.runtime.files import sha256_file


@dataclass(frozen=True)
class Job:
    """One model, where its files go, and how they are made and measured."""

    facts: Facts
    out: Path
    max_drift: float
    device: str
    force: bool = False
    stock: bool = False  # llama.cpp's plain recipes, whatever they drift
    max_size: int | None = None  # bytes of each variant
    calibration: Path | None = None  # a corpus of the user's own
    column: str | None = None  # of its texts
    imatrix: Path | None = None  # an importance matrix of the user's own
    compensate: bool = True  # choose codes that compensate for each other's errors
    tune: bool | None = None  # train scales and vectors; None: where torch is there and it takes minutes
    quick: bool = False  # measure on some of the evaluation texts

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def work(self) -> Path:
        """Where a run keeps what only a resumed run needs; removed at the end."""
        return self.folder / ".work"

    @property
    def reference_path(self) -> Path:
        """Vectors of the base file, which variants are measured against."""
        return self.work / "reference.npy"

    @property
    def imatrix_path(self) -> Path:
        return self.folder / f"{self.name}.imatrix.gguf"

    @property
    def base_path(self) -> Path:
        """The file that variants are made from and measured against."""
        return self.file(self.facts.base.upper())

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.name}-{variant}.gguf"


def start_report(job: Job, texts: Sequence[EvalText], claimed: Sequence[EvalText]) -> Report:
    """The report of an earlier run as far as it still holds, or a new one without files."""
    new = _new_report(job, texts, claimed)
    if job.force or not (job.folder / FILE_NAME).exists():
        return new
    try:
        old = read_report(job.folder)
    except InputError as error:
        say(f"{error} All of it is made again.")
        return new
    if old.source.repo != new.source.repo:
        raise WrongUsage(
            f"{job.folder}: holds the release of {old.source.repo or 'a checkpoint folder'}, and this model comes from "
            f"{new.source.repo or 'a checkpoint folder'}. Choose another folder with --out, or replace it with --force."
        )
    if changes := old.origin_changes(new):
        say(f"{new.base}: made again, because of another {', '.join(changes)}")
        return new
    was_checked = old.conversion is not None and old.conversion.holds is not None
    if _has_bytes(job.folder, old.files.get(old.base)) and (was_checked or not can_check()):
        say(f"{old.base}: {job.file(old.base)} is there")
        return replace(old, max_drift=job.max_drift)
    if not was_checked:
        say(f"{old.base}: made again, because gate 1 was not run then and can be now")
    variants = {name: file for name, file in old.files.items() if name != old.base}  # they stay if its bytes do
    return replace(
        new,
        files=variants,
        imatrix=old.imatrix,
        stock=old.stock,
        variants=old.variants,
        performance=old.performance,
    )


def _new_report(job: Job, texts: Sequence[EvalText], claimed: Sequence[EvalText]) -> Report:
    facts, entry, checkpoint = job.facts, job.facts.entry, job.facts.checkpoint
    source = Source(
        repo=entry.repo,
        revision=entry.revision,
        sha256=checkpoint.sha256,
        architecture=facts.architecture.name,
        n_parameters=checkpoint.n_parameters,
        pooling=facts.pooling,
        prompts=dict(facts.prompts),
        dims=facts.dims,
        max_tokens=facts.max_tokens,
        eos_token=facts.vocabulary.eos_token,
        license=entry.license,
        languages=entry.languages,
        cache_bytes=facts.cache_bytes,
        base=None if (base := facts.base.upper()) == BASE else base,
    )
    judged = Texts(
        n=len(claimed),
        sha256=texts_sha256(claimed),
        ids=tuple(text.id for text in claimed),
        languages=entry.languages or ("all that are shipped",),
        n_conversion=len(texts),
        conversion_sha256=texts_sha256(texts),
        quick=job.quick or None,
    )
    return Report(job.name, made_with(), source, judged, job.max_drift)


def variant_inputs(job: Job, report: Report, calibration: Calibration | None) -> VariantInputs:
    """What this run makes variants from; `calibration` is None for llama.cpp's plain recipes."""
    inputs = VariantInputs(report.files[report.base].sha256, job.max_drift, job.max_size, stock=job.stock)
    if calibration is None:
        return inputs
    corpus = calibration.corpus
    return replace(
        inputs,
        calibration_sha256=texts_sha256(calibration.texts),
        imatrix_sha256=sha256_file(job.imatrix) if job.imatrix else None,
        compensate=job.compensate,
        tune=job.tune,
        held_out_sha256=texts_sha256(corpus.held_out) if corpus else None,
    )


def keep_current(job: Job, report: Report, names: Sequence[str], inputs: VariantInputs) -> Report:
    """Without the variants that are gone, that are to be made again, and that no longer compare with the others.

    llama.cpp's own recipes stay, if they were measured on the same texts: their drift does not depend on the bound,
    only the verdict does.
    """
    dropped = set()
    for name, verdict in report.variants.items():
        changes = differing(verdict.inputs, inputs)
        if not _has_bytes(job.folder, report.files.get(name)):
            dropped.add(name)
        elif name in names:
            say(f"{name}: made again, because of another {', '.join(changes)}" if changes else f"{name}: is there")
            dropped |= {name} if changes else set()
        elif {"f16_sha256", "max_drift"} & set(changes):
            words = f"was measured against another {report.base} file or bound: it is not listed any more"
            say(f"{name}: {job.file(name)} {words}")
            dropped.add(name)
    stock = {
        name: replace(verdict, max_drift=inputs.max_drift)
        for name, verdict in report.stock.items()
        if verdict.inputs.f16_sha256 == inputs.f16_sha256
        and (name not in names or verdict.inputs.held_out_sha256 == inputs.held_out_sha256)
    }
    return replace(report.without_variants(dropped), stock=stock)


def drop_lost_recipes(report: Report) -> Report:
    """Without the variants that were made with an importance matrix which the folder no longer holds."""
    known = ("", report.imatrix.sha256 if report.imatrix else "")
    lost = {name for name, verdict in report.variants.items() if verdict.recipe.imatrix_sha256 not in known}
    for name in lost:
        say(f"{name}: was made with another importance matrix than the folder holds now, and is not listed any more")
    return report.without_variants(lost)


def has_imatrix(job: Job, report: Report) -> bool:
    """Whether the importance matrix is there that the listed recipes name, if any does."""
    is_named = any(verdict.recipe.imatrix_sha256 for verdict in report.variants.values())
    return not is_named or _has_bytes(job.folder, report.imatrix)


def _has_bytes(folder: Path, file: File | None) -> bool:
    """Whether a file of the report is there with the bytes that were measured."""
    return bool(file and (folder / file.file).is_file() and sha256_file(folder / file.file) == file.sha256)
