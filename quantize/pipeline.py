"""The main job: a model becomes a folder of measured .gguf files, resumable at any point, the same bytes every time.

    fetch -> convert -> gate 1 -> F16.gguf -> calibrate -> recipe -> quantise -> measure -> variant.gguf -> card

A file gets its final name only after it was measured. drift.json grows with every variant, so that a run that was
stopped finds what is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.conversion import ConversionCheck, as_json, check_conversion
from f2gguf.evals.drift import Verdict
from f2gguf.evals.texts import EvalText, claimed_texts, embed_texts, load_texts, texts_sha256
from f2gguf.quantize.convert.probes import stamp_golden
from f2gguf.quantize.convert.readback import read_back, reference_ids
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.release.write import write_release
from f2gguf.quantize.repair.assemble import Imatrix
from f2gguf.quantize.repair.calibration import load_calibration
from f2gguf.quantize.repair.make import Measurement, Recipes, only, settle
from f2gguf.quantize.repair.plan import plan_variant
from f2gguf.quantize.repair.recipe import Recipe, made_with
from f2gguf.quantize.repair.search import recipes
from f2gguf.quantize.repair.study import Study, study_source
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import Progress, say
from f2gguf.runtime.errors import ConversionMismatch
from f2gguf.runtime.files import format_size, sha256_file, write_text, writing
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One model, where its files go, and how they are measured."""

    facts: Facts
    out: Path
    max_drift: float
    device: str
    progress: Progress
    force: bool = False
    stock: bool = False  # llama.cpp's plain recipes, whatever they drift
    max_size: int | None = None  # bytes of each variant
    calibration: Path | None = None  # texts of the user's own
    imatrix: Path | None = None  # an importance matrix of the user's own

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def report_path(self) -> Path:
        return self.folder / "drift.json"

    @property
    def work(self) -> Path:
        """Where a run keeps what only a resumed run needs; removed at the end."""
        return self.folder / ".work"

    @property
    def reference_path(self) -> Path:
        """Vectors of the F16 file on the texts that variants are measured with."""
        return self.work / "reference.npy"

    @property
    def imatrix_path(self) -> Path:
        return self.folder / f"{self.name}.imatrix.gguf"

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.name}-{variant}.gguf"


def make_release(job: Job, variants: Sequence[str]) -> dict[str, Any]:
    """Make and measure the F16 file and `variants`, write the card and the sums; gives the report (drift.json).

    What exists and was made from the same checkpoint, texts, bound and versions is kept. Raises `ConversionMismatch`
    where the F16 file does not do what the checkpoint does, besides the errors of every step.
    """
    texts = load_texts()
    claimed = claimed_texts(texts, job.facts.entry.languages)
    report = _start_report(job, texts, claimed)
    if _is_there(job, report, "F16"):
        say(f"F16: {job.file('F16')} is there")
    else:
        _make_f16(job, texts, claimed, report)
    missing = [variant for variant in variants if not _is_there(job, report, variant)]
    for variant in set(variants) - set(missing):
        say(f"{variant}: {job.file(variant)} is there")
    if missing:
        _make_variants(job, missing, claimed, report)
    report["variants"] = {name: report["variants"][name] for name in sorted(report["variants"], key=_by_size(report))}
    write_text(job.report_path, as_json(report))
    write_release(job.facts, job.folder, report)
    shutil.rmtree(job.work, ignore_errors=True)
    return report


def convert_checked(
    facts: Facts, path: Path, *, dtype: str, progress: Progress, texts: Sequence[EvalText]
) -> list[str]:
    """Convert to `path`, read it back, and fill in its golden vectors; gives the texts that stock llama.cpp splits
    differently."""
    with progress(f"convert {path.name}", 2 * facts.checkpoint.n_parameters) as advance:
        conversion = convert(facts, path, dtype=dtype, on_progress=advance)
    say(f"{dtype.upper()}: {conversion.n_tensors} tensors, {format_size(conversion.size_bytes)}")
    for loss in conversion.losses:
        if loss.n_overflow:
            say(f"  {loss.name}: {loss.n_overflow} values are beyond F16's 65504; kept as {loss.kept_as}")
    n_zeroed = sum(loss.n_zeroed for loss in conversion.losses)
    if n_zeroed:
        say(f"  {n_zeroed} values are too small for F16 and became zero, in {len(conversion.losses)} tensors")
    differing = read_back(path, facts, texts)
    if n_without := stamp_golden(path):
        say(f"  {n_without} golden texts have no finite vector in {dtype.upper()}, and are not compared later")
    return differing


def _start_report(job: Job, texts: Sequence[EvalText], claimed: Sequence[EvalText]) -> dict[str, Any]:
    """The report of an earlier run on the same inputs, or a new one."""
    new = {
        "model": job.name,
        "source": {
            "repo": job.facts.entry.repo,
            "revision": job.facts.entry.revision,
            "sha256": job.facts.checkpoint.sha256,
            "n_parameters": job.facts.checkpoint.n_parameters,
        },
        "made_with": made_with(),
        "texts": {
            "n": len(claimed),
            "sha256": texts_sha256(claimed),
            "ids": [text.id for text in claimed],
            "languages": list(job.facts.entry.languages) or ["all that are shipped"],
            "n_conversion": len(texts),
        },
        "calibration": _calibration_facts(job),
        "max_drift": job.max_drift,
        "max_size": job.max_size,
        "stock_only": job.stock,
    }
    try:
        old = json.loads(job.report_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no earlier report, or one that was never ours
        old = {}
    if not job.force and all(old.get(key) == value for key, value in new.items()):
        return dict(old)
    return {**new, "conversion": {}, "files": {}, "stock": {}, "variants": {}}


def _calibration_facts(job: Job) -> dict[str, Any]:
    """What recipes are chosen with."""
    if job.stock:
        return {}
    texts = load_calibration(job.calibration, job.facts.entry.languages)
    given = {"imatrix_sha256": sha256_file(job.imatrix)} if job.imatrix else {}
    return {"n": len(texts), "sha256": texts_sha256(texts), **given}


def _make_f16(job: Job, texts: Sequence[EvalText], claimed: Sequence[EvalText], report: dict[str, Any]) -> None:
    """Convert, read back, pass gate 1 on all texts; keep the vectors of the claimed ones for the variants."""
    path = job.file("F16")
    report["variants"], report["stock"] = {}, {}
    shutil.rmtree(job.work, ignore_errors=True)  # of another F16 file
    with writing(path) as part:
        differing = convert_checked(job.facts, part, dtype="f16", progress=job.progress, texts=texts)
        # apart, as a resumed run embeds the claimed ones: vectors move by 1e-7 with the texts that share their batches
        reference, is_claimed = _embed(job, part, claimed), np.array([text in claimed for text in texts])
        vectors = np.empty((len(texts), reference.shape[1]), dtype=np.float32)
        vectors[is_claimed] = reference
        vectors[~is_claimed] = _embed(job, part, [text for text in texts if text not in claimed])
        check = _check(job, vectors, texts)
        with writing(job.reference_path) as cached, cached.open("wb") as file:
            np.save(file, reference)
        report["files"]["F16"] = _described(part, path)
        report["conversion"] = {**check.as_dict(), "n_stock_tokenizer_differs": len(differing)}
        write_text(job.report_path, as_json(report))


def _reference(job: Job, claimed: Sequence[EvalText]) -> Vectors:
    """The F16 file's vectors, which every variant is measured against."""
    if job.reference_path.exists():
        return np.asarray(np.load(job.reference_path))
    return _embed(job, job.file("F16"), claimed)


def _check(job: Job, vectors: Vectors, texts: Sequence[EvalText]) -> ConversionCheck:
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


def _make_variants(job: Job, variants: Sequence[str], texts: Sequence[EvalText], report: dict[str, Any]) -> None:
    """Each by llama.cpp's plain recipe first, for comparison, then by the one that holds the bound."""
    measurement = Measurement(texts, _reference(job, texts), job.max_drift, job.device, job.progress)
    study = None if job.stock else _study(job, report)
    for variant in variants:
        say("\n".join(plan_variant(job.file("F16"), variant).lines()))
        if study is None:
            _make_variant(job, variant, only(Recipe(variant)), {}, measurement, report)
            continue
        if variant not in report["stock"]:
            _measure_stock(job, variant, measurement, report)
        chosen = recipes(study, variant, max_drift=job.max_drift, max_size=job.max_size)
        _make_variant(job, variant, chosen, study.imatrix, measurement, report)


def _study(job: Job, report: dict[str, Any]) -> Study:
    study = study_source(
        job.file("F16"),
        imatrix_path=job.imatrix_path,
        work=job.work,
        calibration=job.calibration,
        given_imatrix=job.imatrix,
        device=job.device,
        progress=job.progress,
    )
    report["imatrix"] = _described(job.imatrix_path, job.imatrix_path)
    return study


def _measure_stock(job: Job, variant: str, measurement: Measurement, report: dict[str, Any]) -> None:
    path = job.work / f"stock-{variant}.gguf"

    def record(part: Path, _recipe: Recipe, verdict: Verdict) -> None:
        report["stock"][variant] = {**verdict.as_dict(), "size_bytes": part.stat().st_size}

    settle(Weights(job.file("F16")), path, only(Recipe(variant)), {}, measurement=measurement, before_rename=record)
    path.unlink()
    write_text(job.report_path, as_json(report))


def _make_variant(
    job: Job, variant: str, chosen: Recipes, imatrix: Imatrix, measurement: Measurement, report: dict[str, Any]
) -> None:
    source, target = job.file("F16"), job.file(variant)

    def record(part: Path, recipe: Recipe, verdict: Verdict) -> None:
        lines = recipe.lines(plan_variant(source, variant))
        report["files"][variant] = _described(part, target)
        report["variants"][variant] = {**verdict.as_dict(), "recipe": {**recipe.as_dict(), "lines": lines}}
        write_text(job.report_path, as_json(report))
        say("\n".join(f"  {line}" for line in lines))

    settle(Weights(source), target, chosen, imatrix, measurement=measurement, before_rename=record)


def _is_there(job: Job, report: dict[str, Any], variant: str) -> bool:
    """Whether the file is there with the bytes that were measured."""
    path, described = job.file(variant), report["files"].get(variant)
    measured = variant == "F16" or variant in report["variants"]
    return bool(described and measured and path.exists() and sha256_file(path) == described["sha256"])


def _embed(job: Job, path: Path, texts: Sequence[EvalText]) -> Vectors:
    with Embedder(path, device=job.device) as model, job.progress("measure F16", len(texts)) as advance:
        return embed_texts(model, texts, advance)


def _described(part: Path, path: Path) -> dict[str, Any]:
    return {"file": path.name, "size_bytes": part.stat().st_size, "sha256": sha256_file(part)}


def _by_size(report: dict[str, Any]) -> Callable[[str], int]:
    return lambda variant: -int(report["files"][variant]["size_bytes"])
