"""The main job: a model becomes a folder of measured .gguf files, the same bytes every time, resumable at any point.

    fetch -> convert -> gate 1 -> F16.gguf -> calibrate -> recipe -> quantise -> measure -> variant.gguf -> card

Where a model does not fit F16, that file is F32. A file gets its final name only after it was measured.
drift.json (`Report`) grows with every file and states what each was made from, so that a run finds what is done
already: a stage is done again when what it is made from has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from f2gguf.evals.drift import MAX_DRIFT
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, claimed_texts, embed_timed, load_texts, quick_texts
from f2gguf.quantize.convert.gate import pass_gate_1
from f2gguf.quantize.convert.readback import read_back
from f2gguf.quantize.convert.reserved import stamp_golden, stamp_int8_steps
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.job import Job, drop_lost_recipes, has_imatrix, keep_current, start_report, variant_inputs
from f2gguf.quantize.outlook import Outlook, expect
from f2gguf.quantize.release.write import copy_legal_files, write_release
from f2gguf.quantize.repair.calibration import Calibration, load_calibration
from f2gguf.quantize.repair.plan import DEFAULT_VARIANTS, plan_variant, require_variant
from f2gguf.quantize.repair.recipe import Recipe
from f2gguf.quantize.repair.search import Evaluation, Made, embed_held_out, make_measured, make_within_bound
from f2gguf.quantize.repair.study import Study, study_source
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.quantize.report.report import (
    Conversion,
    Measured,
    Report,
    VariantInputs,
    described,
    read_report,
    write_report,
)
from f2gguf.quantize.source.facts import Facts, Stated, open_facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.files import format_size, locked, writing


def quantize_model(
    model: str | Path,
    *,
    out: str | Path = "dist",
    variants: str | Sequence[str] = DEFAULT_VARIANTS,
    max_drift: float = MAX_DRIFT,
    max_size: int | None = None,
    stock: bool = False,
    calibration: str | Path | None = None,
    column: str | None = None,
    imatrix: str | Path | None = None,
    pooling: str | None = None,
    eos_token: str | None = None,
    allowed_keys: Sequence[str] = (),
    name: str | None = None,
    device: str = "auto",
    lock: str | Path | None = None,
    force: bool = False,
    compensate: bool = True,
    tune: bool | None = None,
    quick: bool = False,
) -> Report:
    """Fetch, convert, quantise and measure `model`, write its release to `out`/NAME, and give the report of it.

    `model` is a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub. The arguments
    are the options of `quantize all`; `max_size` is in bytes, and `allowed_keys` is --allow-config-key.
    `report.variants["Q4_0"].holds` says whether a file holds the bound; one that does not was written all the same.
    Raises the errors of every step, all `F2ggufError`.
    """
    names = [require_variant(name.strip()) for name in (variants.split(",") if isinstance(variants, str) else variants)]
    calibration, imatrix, lock = (Path(path) if path else None for path in (calibration, imatrix, lock))
    facts = open_facts(str(model), stated=Stated(pooling, eos_token, tuple(allowed_keys), name), lock=lock)
    job = Job(
        facts,
        Path(out),
        max_drift,
        device,
        force,
        stock,
        max_size,
        calibration,
        column,
        imatrix,
        compensate,
        tune,
        quick,
    )
    return make_release(job, names)


def make_release(job: Job, variants: Sequence[str]) -> Report:
    """Make and measure the base file (F16, mostly) and `variants`, write the card and the sums; gives the report.

    What is there and was made from the same is kept. Raises `ConversionMismatch` where the base does not do what
    the checkpoint does, and `OutputError` where another run is at work in the folder.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with locked(job.folder):
        texts, claimed, calibration = _all_texts(job)
        report, outlook = start_report(job, texts, claimed), None
        if report.base not in report.files:
            outlook = expect(job, report.base, variants, texts, claimed, calibration)
            say(str(outlook))
            report = _make_base(job, report, texts, claimed, outlook)
        inputs = variant_inputs(job, report, calibration)
        report = keep_current(job, report, variants, inputs)
        missing = [name for name in variants if name not in report.variants]
        if missing or (calibration and not has_imatrix(job, report)):
            if outlook is None:
                outlook = expect(job, None, missing, texts, claimed, calibration)
                say(str(outlook))
            report = _make_variants(job, report, variants, claimed, calibration, inputs, outlook)
        if outlook:
            say(outlook.summary())
        copy_legal_files(job.facts.checkpoint.root, job.folder)
        for name in report.files.keys() - report.performances.keys():  # which an older version left
            report = report.with_performance(name, job.file(name), device=job.device)
        report = _saved(job, report)
        write_release(job.folder, report)
        shutil.rmtree(job.work, ignore_errors=True)
        return report


def forecast(job: Job, variants: Sequence[str]) -> Outlook | None:
    """What `make_release` takes for the files that are not there yet, or for all by `force`; None where all are."""
    base = job.facts.base.upper()
    names = [name for name in (base, *variants) if job.force or not job.file(name).exists()]
    missing = [name for name in names if name != base]
    return expect(job, base if base in names else None, missing, *_all_texts(job)) if names else None


def _all_texts(job: Job) -> tuple[tuple[EvalText, ...], tuple[EvalText, ...], Calibration | None]:
    """Those of gate 1, those that variants are judged on, and those that choose recipes."""
    texts, languages = quick_texts(load_texts()) if job.quick else load_texts(), job.facts.entry.languages
    calibration = None if job.stock else load_calibration(job.calibration, languages, job.column)
    return texts, claimed_texts(texts, languages), calibration


def convert_checked(facts: Facts, path: Path, *, dtype: str, texts: Sequence[EvalText]) -> list[str]:
    """Convert to `path`, read it back, and fill in its golden vectors and the steps of int8 vectors.

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
    stamp_int8_steps(path, load_calibration(None, facts.entry.languages).texts)
    if n_without := stamp_golden(path):
        say(f"  {n_without} golden texts have no finite vector in {dtype.upper()}, and are not compared later")
    return stock_differs


def _make_base(
    job: Job, report: Report, texts: Sequence[EvalText], claimed: Sequence[EvalText], outlook: Outlook
) -> Report:
    """Convert, read back, pass gate 1 on all texts; keep the vectors of the claimed ones for the variants."""
    path = job.base_path
    shutil.rmtree(job.work, ignore_errors=True)  # it was made with another base file
    with writing(path) as part:
        with outlook.stage("convert"):
            stock_differs = convert_checked(job.facts, part, dtype=job.facts.base, texts=texts)
        with outlook.stage(f"measure {report.base}"):
            # the claimed texts apart, as a resumed run embeds them: vectors move by 1e-7 with the rest of their batch
            (reference, texts_per_s), is_claimed = _embed(job, part, claimed), np.array([it in claimed for it in texts])
            vectors = np.empty((len(texts), reference.shape[1]), dtype=np.float32)
            vectors[is_claimed] = reference
            vectors[~is_claimed], _ = _embed(job, part, [text for text in texts if text not in claimed])
        with outlook.stage("gate 1"):
            check = pass_gate_1(job.facts, part, vectors, texts)
        with writing(job.reference_path) as cached, cached.open("wb") as file:
            np.save(file, reference)
        conversion = Conversion(**asdict(check), n_stock_tokenizer_differs=len(stock_differs))
        files = {report.base: described(part, name=path.name), **report.files}
        report = replace(report, files=files, conversion=conversion)
        return _saved(job, report.with_performance(report.base, part, texts_per_s, device=job.device))


def _make_variants(
    job: Job,
    report: Report,
    names: Sequence[str],
    texts: Sequence[EvalText],
    calibration: Calibration | None,
    inputs: VariantInputs,
    outlook: Outlook,
) -> Report:
    """Each by llama.cpp's plain recipe first, for comparison, then by the one that holds the bound."""
    held_out = embed_held_out(job.base_path, calibration.corpus if calibration else None, job.device)
    evaluation = Evaluation(texts, _reference(job, texts), job.max_drift, job.device, held_out, quick=job.quick)
    study = None
    if calibration:
        with outlook.stage("calibrate"):
            study = _study(job, calibration)
        # saved now, with nothing that was made with another matrix, so that a run that is stopped leaves no such file
        report = _saved(job, drop_lost_recipes(replace(report, imatrix=described(job.imatrix_path))))
    for name in [name for name in names if name not in report.variants]:
        say("\n".join(plan_variant(job.base_path, name).lines()))
        with outlook.stage(name):
            report = _make_variant(job, report, name, study, evaluation, inputs)
    return report


def _make_variant(
    job: Job, report: Report, name: str, study: Study | None, evaluation: Evaluation, inputs: VariantInputs
) -> Report:
    weights, target, stock = Weights(job.base_path), job.file(name), Recipe(name)

    def measured(path: Path, made: Made) -> Measured:
        lines = tuple(made.recipe.lines(plan_variant(weights.header.path, name)))
        size_bytes = path.stat().st_size
        return Measured(
            **vars(made.verdict),
            size_bytes=size_bytes,
            recipe=made.recipe,
            recipe_lines=lines,
            inputs=inputs,
            corpus=made.corpus,
        )

    with writing(target) as part:
        made = None
        if study is None or name not in report.stock:
            made = make_measured(weights, part, stock, {}, {}, evaluation=evaluation)
            report = _saved(job, replace(report, stock={**report.stock, name: measured(part, made)}))
        if study:
            made = make_within_bound(study, name, part, evaluation=evaluation, max_size=job.max_size, there=made)
        assert made
        verdict = measured(part, made)
        if made.recipe == stock:
            report = replace(report, stock={other: report.stock[other] for other in report.stock if other != name})
        report = report.with_variant(name, described(part, name=target.name), verdict)
        report = _saved(job, report.with_performance(name, part, made.texts_per_s, device=job.device))
        say("\n".join(f"  {line}" for line in verdict.recipe_lines))
    return report


def _study(job: Job, calibration: Calibration) -> Study:
    return study_source(
        job.base_path,
        imatrix_path=job.imatrix_path,
        work=job.work,
        texts=calibration.texts,
        own_imatrix=job.imatrix,
        device=job.device,
        compensate=job.compensate,
        tune=job.tune,
    )


def _reference(job: Job, claimed: Sequence[EvalText]) -> Vectors:
    """The base file's vectors, which every variant is measured against."""
    if job.reference_path.exists():
        return np.asarray(np.load(job.reference_path))
    return _embed(job, job.base_path, claimed)[0]


def _embed(job: Job, path: Path, texts: Sequence[EvalText]) -> tuple[Vectors, float]:
    with Embedder(path, device=job.device) as model:
        return embed_timed(model, texts, f"measure {path.name}")


def _saved(job: Job, report: Report) -> Report:
    """The report as drift.json holds it from now on."""
    write_report(job.folder, report)
    return read_report(job.folder)
