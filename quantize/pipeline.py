"""The main job: a model becomes a folder of measured .gguf files, resumable at any point, the same bytes every time.

    fetch -> convert -> gate 1 -> F16.gguf -> calibrate -> recipe -> quantise -> measure -> variant.gguf -> card

A file gets its final name only after it was measured. drift.json (`Report`) grows with every file and states what each
was made from, so that a run finds what is done already: a stage is done again when what it is made from has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from f2gguf.evals.conversion import ConversionCheck, can_check, check_conversion
from f2gguf.evals.drift import MAX_DRIFT, Verdict
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, claimed_texts, embed_texts, load_texts, texts_sha256
from f2gguf.quantize.convert.readback import read_back, reference_ids
from f2gguf.quantize.convert.reserved import stamp_golden
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.release.write import copy_legal_files, write_release
from f2gguf.quantize.repair.calibration import load_calibration
from f2gguf.quantize.repair.plan import VARIANTS, plan_variant, require_variant
from f2gguf.quantize.repair.recipe import Recipe, made_with
from f2gguf.quantize.repair.search import Evaluation, Made, make_measured, make_within_bound
from f2gguf.quantize.repair.study import Study, study_source
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.quantize.report.report import (
    FILE_NAME,
    Conversion,
    Measured,
    Report,
    Source,
    Texts,
    VariantInputs,
    described,
    differing,
    read_report,
    write_report,
)
from f2gguf.quantize.source.facts import Facts, settle_facts
from f2gguf.quantize.source.fetch import fetch, find_model
from f2gguf.quantize.source.lock import read_lock
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import Progress, progress, say
from f2gguf.runtime.errors import ConversionMismatch, InputError, WrongUsage
from f2gguf.runtime.files import format_size, locked, sha256_file, writing


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
    calibration: Path | None = None  # texts of the user's own
    imatrix: Path | None = None  # an importance matrix of the user's own
    progress: Progress = progress

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
        """Vectors of the F16 file, which variants are measured against."""
        return self.work / "reference.npy"

    @property
    def imatrix_path(self) -> Path:
        return self.folder / f"{self.name}.imatrix.gguf"

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.name}-{variant}.gguf"


def quantize_model(
    model: str | Path,
    *,
    out: str | Path = "dist",
    variants: Sequence[str] = tuple(VARIANTS),
    max_drift: float = MAX_DRIFT,
    max_size: int | None = None,
    stock: bool = False,
    calibration: Path | None = None,
    imatrix: Path | None = None,
    pooling: str | None = None,
    device: str = "auto",
    lock: Path | None = None,
    force: bool = False,
) -> Report:
    """Fetch, convert, quantise and measure `model`, write its release to `out`/NAME, and give the report of it.

    `model` is a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub. The arguments
    are the options of `quantize all`; `max_size` is in bytes. `report.variants["Q4_0"].holds` says whether a file holds
    the bound; one that does not was written all the same. Raises the errors of every step, all `F2ggufError`.
    """
    entry, folder = find_model(str(model), read_lock(lock))
    checkpoint = fetch(entry, folder)
    say(f"{entry.name}: {checkpoint}")
    facts = settle_facts(entry, checkpoint, pooling=pooling)
    job = Job(facts, Path(out), max_drift, device, force, stock, max_size, calibration, imatrix)
    return make_release(job, [require_variant(name) for name in variants])


def make_release(job: Job, variants: Sequence[str]) -> Report:
    """Make and measure the F16 file and `variants`, write the card and the sums; gives the report.

    What is there and was made from the same is kept. Raises `ConversionMismatch` where the F16 file does not do what
    the checkpoint does, and `OutputError` where another run is at work in the folder.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with locked(job.folder):
        texts = load_texts()
        claimed = claimed_texts(texts, job.facts.entry.languages)
        report = _start(job, texts, claimed)
        if "F16" not in report.files:
            report = _make_f16(job, report, texts, claimed)
        inputs = _variant_inputs(job, report)
        report = _keep_current(job, report, variants, inputs)
        if missing := [name for name in variants if name not in report.variants]:
            report = _make_variants(job, report, missing, claimed, inputs)
        copy_legal_files(job.facts.checkpoint.folder, job.folder)
        report = _saved(job, _drop_lost_recipes(report))
        write_release(job.folder, report)
        shutil.rmtree(job.work, ignore_errors=True)
        return report


def convert_checked(
    facts: Facts, path: Path, *, dtype: str, progress: Progress, texts: Sequence[EvalText]
) -> list[str]:
    """Convert to `path`, read it back, and fill in its golden vectors.

    Gives the texts that stock llama.cpp splits differently.
    """
    with progress(f"convert {path.name}", 2 * facts.checkpoint.n_parameters) as advance:
        conversion = convert(facts, path, dtype=dtype, on_progress=advance)
    say(f"{dtype.upper()}: {conversion.n_tensors} tensors, {format_size(conversion.size_bytes)}")
    for loss in conversion.losses:
        if loss.n_overflow:
            say(f"  {loss.name}: {loss.n_overflow} values are beyond F16's 65504; kept as {loss.kept_as}")
    n_zeroed = sum(loss.n_zeroed for loss in conversion.losses)
    if n_zeroed:
        say(f"  {n_zeroed} values are too small for F16 and became zero, in {len(conversion.losses)} tensors")
    stock_differs = read_back(path, facts, texts)
    if n_without := stamp_golden(path):
        say(f"  {n_without} golden texts have no finite vector in {dtype.upper()}, and are not compared later")
    return stock_differs


def _start(job: Job, texts: Sequence[EvalText], claimed: Sequence[EvalText]) -> Report:
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
        say(f"F16: made again, because of another {', '.join(changes)}")
        return new
    was_checked = old.conversion is not None and old.conversion.holds is not None
    if _has_bytes(job.folder, old, "F16") and (was_checked or not can_check()):
        say(f"F16: {job.file('F16')} is there")
        return replace(old, max_drift=job.max_drift)
    if not was_checked:
        say("F16: made again, because gate 1 was not run then and can be now")
    variants = {name: file for name, file in old.files.items() if name != "F16"}  # they stay if F16 has the same bytes
    return replace(new, files=variants, imatrix=old.imatrix, stock=old.stock, variants=old.variants)


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
    )
    judged = Texts(
        n=len(claimed),
        sha256=texts_sha256(claimed),
        ids=tuple(text.id for text in claimed),
        languages=entry.languages or ("all that are shipped",),
        n_conversion=len(texts),
        conversion_sha256=texts_sha256(texts),
    )
    return Report(job.name, made_with(), source, judged, job.max_drift)


def _make_f16(job: Job, report: Report, texts: Sequence[EvalText], claimed: Sequence[EvalText]) -> Report:
    """Convert, read back, pass gate 1 on all texts; keep the vectors of the claimed ones for the variants."""
    path = job.file("F16")
    shutil.rmtree(job.work, ignore_errors=True)  # it was made with another F16 file
    with writing(path) as part:
        stock_differs = convert_checked(job.facts, part, dtype="f16", progress=job.progress, texts=texts)
        # apart, as a resumed run embeds the claimed ones: vectors move by 1e-7 with the texts that share their batches
        reference, is_claimed = _embed(job, part, claimed), np.array([text in claimed for text in texts])
        vectors = np.empty((len(texts), reference.shape[1]), dtype=np.float32)
        vectors[is_claimed] = reference
        vectors[~is_claimed] = _embed(job, part, [text for text in texts if text not in claimed])
        check = _gate_1(job, vectors, texts)
        with writing(job.reference_path) as cached, cached.open("wb") as file:
            np.save(file, reference)
        conversion = Conversion(**asdict(check), n_stock_tokenizer_differs=len(stock_differs))
        files = {"F16": described(part, name=path.name), **report.files}
        return _saved(job, replace(report, files=files, conversion=conversion))


def _gate_1(job: Job, vectors: Vectors, texts: Sequence[EvalText]) -> ConversionCheck:
    """Compare the F16 file with the checkpoint; `ConversionMismatch` where they do not do the same."""
    facts = job.facts
    with job.progress("gate 1", len(texts)) as advance:
        check = check_conversion(
            vectors,
            texts,
            folder=facts.checkpoint.folder,
            checkpoint_sha256=facts.checkpoint.sha256,
            n_parameters=facts.checkpoint.n_parameters,
            token_ids=lambda: reference_ids(facts, texts),
            pooling=facts.pooling,
            on_progress=advance,
        )
    if check.holds is False:
        raise ConversionMismatch(
            f"{job.file('F16')}: does not do what the checkpoint does: minimum cosine {check.min_cosine} against "
            f"{check.reference}, on {check.worst_text}. It was not kept. Please report the model."
        )
    say(f"gate 1, {check.reference}: " + (check.why or f"minimum cosine {check.min_cosine} over {check.n} texts"))
    return check


def _variant_inputs(job: Job, report: Report) -> VariantInputs:
    """What this run makes variants from."""
    f16 = report.files["F16"].sha256
    if job.stock:
        return VariantInputs(f16, job.max_drift, job.max_size, stock=True)
    texts = load_calibration(job.calibration, job.facts.entry.languages)
    imatrix = sha256_file(job.imatrix) if job.imatrix else None
    return VariantInputs(f16, job.max_drift, job.max_size, False, texts_sha256(texts), imatrix)


def _keep_current(job: Job, report: Report, names: Sequence[str], inputs: VariantInputs) -> Report:
    """Without the variants that are gone, that are to be made again, and that no longer compare with the others.

    llama.cpp's own recipes stay: their drift does not depend on the bound, only the verdict does.
    """
    dropped = set()
    for name, verdict in report.variants.items():
        changes = differing(verdict.inputs, inputs)
        if not _has_bytes(job.folder, report, name):
            dropped.add(name)
        elif name in names:
            say(f"{name}: made again, because of another {', '.join(changes)}" if changes else f"{name}: is there")
            dropped |= {name} if changes else set()
        elif {"f16_sha256", "max_drift"} & set(changes):
            say(f"{name}: {job.file(name)} was measured against another F16 file or bound: it is not listed any more")
            dropped.add(name)
    stock = {
        name: replace(verdict, max_drift=inputs.max_drift)
        for name, verdict in report.stock.items()
        if verdict.inputs.f16_sha256 == inputs.f16_sha256
    }
    return replace(report.without_variants(dropped), stock=stock)


def _make_variants(
    job: Job, report: Report, names: Sequence[str], texts: Sequence[EvalText], inputs: VariantInputs
) -> Report:
    """Each by llama.cpp's plain recipe first, for comparison, then by the one that holds the bound."""
    evaluation = Evaluation(texts, _reference(job, texts), job.max_drift, job.device)
    study = None if job.stock else _study(job)
    if study:
        report = replace(report, imatrix=described(job.imatrix_path))
    for name in names:
        say("\n".join(plan_variant(job.file("F16"), name).lines()))
        report = _make_variant(job, report, name, study, evaluation, inputs)
    return report


def _make_variant(
    job: Job, report: Report, name: str, study: Study | None, evaluation: Evaluation, inputs: VariantInputs
) -> Report:
    weights, target, stock = Weights(job.file("F16")), job.file(name), Recipe(name)

    def measured(path: Path, made: Made) -> Measured:
        lines = tuple(made.recipe.lines(plan_variant(weights.header.path, name)))
        facts = {field: getattr(made.verdict, field) for field in Verdict.__dataclass_fields__}
        return Measured(**facts, size_bytes=path.stat().st_size, recipe=made.recipe, recipe_lines=lines, inputs=inputs)

    with writing(target) as part:
        made = None
        if study is None or name not in report.stock:
            made = Made(stock, make_measured(weights, part, stock, {}, evaluation=evaluation))
            report = _saved(job, replace(report, stock={**report.stock, name: measured(part, made)}))
        if study:
            made = make_within_bound(study, name, part, evaluation=evaluation, max_size=job.max_size, there=made)
        assert made
        verdict = measured(part, made)
        if made.recipe == stock:
            report = replace(report, stock={other: report.stock[other] for other in report.stock if other != name})
        report = _saved(job, report.with_variant(name, described(part, name=target.name), verdict))
        say("\n".join(f"  {line}" for line in verdict.recipe_lines))
    return report


def _drop_lost_recipes(report: Report) -> Report:
    """Without the variants that were made with an importance matrix which the folder no longer holds."""
    known = ("", report.imatrix.sha256 if report.imatrix else "")
    lost = {name for name, verdict in report.variants.items() if verdict.recipe.imatrix_sha256 not in known}
    for name in lost:
        say(f"{name}: was made with another importance matrix than the folder holds now, and is not listed any more")
    return report.without_variants(lost)


def _study(job: Job) -> Study:
    return study_source(
        job.file("F16"),
        imatrix_path=job.imatrix_path,
        work=job.work,
        calibration=job.calibration,
        own_imatrix=job.imatrix,
        device=job.device,
    )


def _reference(job: Job, claimed: Sequence[EvalText]) -> Vectors:
    """The F16 file's vectors, which every variant is measured against."""
    if job.reference_path.exists():
        return np.asarray(np.load(job.reference_path))
    return _embed(job, job.file("F16"), claimed)


def _embed(job: Job, path: Path, texts: Sequence[EvalText]) -> Vectors:
    with Embedder(path, device=job.device) as model, job.progress("measure F16", len(texts)) as advance:
        return embed_texts(model, texts, advance)


def _saved(job: Job, report: Report) -> Report:
    """The report as drift.json holds it from now on."""
    write_report(job.folder, report)
    return read_report(job.folder)


def _has_bytes(folder: Path, report: Report, name: str) -> bool:
    """Whether a file of the report is there with the bytes that were measured."""
    file = report.files.get(name)
    return bool(file and (folder / file.file).is_file() and sha256_file(folder / file.file) == file.sha256)
