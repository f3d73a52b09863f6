"""The command `quantize all`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from f2gguf.quantize.cli import options as shared
from f2gguf.runtime.errors import OverBound, WrongUsage


@click.command("all")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--variants", default="Q8_0,Q4_K_M,Q4_0", show_default=True, help="Variants to make besides F16.")
@click.option(
    "-o", "--out", type=shared.PATH, default="dist", show_default=True, help="Folder that gets a folder for each model."
)
@shared.MAX_DRIFT
@shared.MAX_SIZE
@shared.FIT
@shared.STOCK
@shared.calibration_options
@shared.IMATRIX
@shared.COMPENSATE
@shared.TUNE
@click.option("--quick", is_flag=True, help="Measure on about a quarter of the evaluation texts; the files say so.")
@shared.checkpoint_options
@shared.DEVICE
@shared.LOCK
@click.option("--force", is_flag=True, help="Make everything again, even what is there.")
@click.option("--dry-run", is_flag=True, help="Say what would be made, and make nothing.")
@shared.JSON
def all_(models: tuple[str, ...], variants: str, fit: int | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Fetch, convert, calibrate, quantise, measure, write the card.

    Without MODEL, the default of models.lock is made. The same command goes on after a run that was stopped. A variant
    whose stock recipe is over the bound is repaired until it holds the bound. The exit code is 3 if a variant is over
    the bound all the same.
    """
    from f2gguf.quantize.pipeline import quantize_model
    from f2gguf.quantize.repair.plan import require_variant
    from f2gguf.quantize.report.tables import report_lines
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock
    from f2gguf.runtime.files import format_bound
    from f2gguf.runtime.llama.library import require_device

    shared.refuse_together(options, "stock", "max_size", "calibration", "column", "imatrix")
    shared.require_tune(options)
    lock = read_lock(options["lock"])
    names = [require_variant(name.strip()) for name in variants.split(",")]
    require_device(options["device"])
    models = models or (lock.default,)
    if options["name"] and len(models) > 1:
        raise WrongUsage(f"--name {options['name']}: names one model, and {len(models)} are to be made.")
    sources = [find_model(model, lock, name=options["name"]) for model in models]
    _require_different_names([entry.name for entry, _ in sources], models)
    made = {model: names if fit is None else [_within(fit, model, names, options)] for model in models}
    if dry_run:
        plans = [
            _plan(model, entry, folder, made[model], options)
            for model, (entry, folder) in zip(models, sources, strict=True)
        ]
        click.echo(_json(plans) if as_json else "\n".join(map(_plan_text, plans)), nl=not as_json)
        return
    reports = []
    for model in models:
        report = quantize_model(model, variants=made[model], **options)
        reports.append(report)
        if not as_json:
            click.echo("\n".join(report_lines(report)))
        for path in sorted((options["out"] / report.model).iterdir()):
            click.echo(str(path), err=as_json)
    if as_json:
        click.echo(_json([report.as_dict() for report in reports]), nl=False)
    over = [
        f"{report.model} {name}"
        for model, report in zip(models, reports, strict=True)
        for name in made[model]
        if not report.variants[name].holds
    ]
    if over:
        bound = format_bound(options["max_drift"])
        raise OverBound(f"over the bound of {bound}: {', '.join(over)}. Every file was written, and says so.")


def _require_different_names(names: list[str], models: tuple[str, ...]) -> None:
    """Refuse two models that would be written to one folder."""
    for i, name in enumerate(names):
        if name.lower() in map(str.lower, names[:i]):
            first = models[[earlier.lower() for earlier in names].index(name.lower())]
            raise WrongUsage(f"{first} and {models[i]}: both are called {name}. Run them with different --out folders.")


def _within(limit: int, model: str, variants: list[str], options: dict[str, Any]) -> str:
    """The largest of the variants that run within `limit` bytes of memory."""
    from f2gguf.quantize.fit.fit import largest_within
    from f2gguf.quantize.source.facts import Stated

    stated = Stated(**{name: options[name] for name in ("pooling", "eos_token", "allowed_keys", "name")})
    return largest_within(limit, model, variants, lock=options["lock"], stated=stated)


def _json(documents: list[dict[str, Any]]) -> str:
    """JSON of the document of each model: alone where there is one, else as a list."""
    from f2gguf.evals.drift import json_text

    return json_text(documents if len(documents) > 1 else documents[0])


def _plan(model: str, entry: Any, folder: Path | None, variants: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """What would be made; and, of a checkpoint that is here, what that takes, if a file is missing."""
    from f2gguf.quantize.job import Job
    from f2gguf.quantize.pipeline import forecast

    base, outlook, out = "F16", None, options["out"]
    if folder is not None:
        stated = {name: options[name] for name in ("pooling", "eos_token", "allowed_keys", "name")}
        facts = shared.facts_of(model, options["lock"], **stated)
        chosen = ("max_drift", "device", "force", "stock", "calibration", "column", "compensate", "tune", "quick")
        job = Job(facts, out, **{name: options[name] for name in chosen})
        base, outlook = facts.base.upper(), forecast(job, variants)
    unknown = "expected: no file is missing" if folder else "expected: known once the checkpoint is here"
    files = [out / entry.name / f"{entry.name}-{name}.gguf" for name in [base, *variants]]
    return {
        "model": entry.name,
        "source": str(folder or f"{entry.repo}@{entry.revision} on the Hub"),
        "files": [{"path": str(path), "is_kept": path.exists() and not options["force"]} for path in files],
        "expected": outlook.as_dict() if outlook else None,
        "summary": str(outlook or unknown),
    }


def _plan_text(plan: dict[str, Any]) -> str:
    state = {True: "there, would be checked", False: "would be made and measured"}  # by whether it is kept
    lines = [f"{plan['model']}: from {plan['source']}"]
    lines += [f"  {file['path']}: {state[file['is_kept']]}" for file in plan["files"]]
    return "\n".join([*lines, f"  {plan['summary']}"])
