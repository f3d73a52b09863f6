"""The command `quantize`, and `f2gguf` with `quantize` in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from f2gguf.evals.bench.cli import bench
from f2gguf.quantize.cli import files as cli_file
from f2gguf.quantize.cli import hub as cli_hub
from f2gguf.quantize.cli import push as cli_push
from f2gguf.quantize.cli.options import (
    CALIBRATION,
    DEVICE,
    IMATRIX,
    JSON,
    LOCK,
    MAX_DRIFT,
    MAX_SIZE,
    PATH,
    POOLING,
    STOCK,
    refuse_together,
    settle,
    settle_found,
)
from f2gguf.runtime.cli import f2gguf
from f2gguf.runtime.console import Commands, progress
from f2gguf.runtime.errors import InputError, OverBound, WrongUsage, parsing
from f2gguf.runtime.server.cli import serve


@click.group(cls=Commands)
@click.version_option(package_name="f2gguf")
def quantize() -> None:
    """Turn embedding checkpoints into measured GGUF files.

    MODEL is a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub.
    """


@quantize.command("all")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--variants", default="Q8_0,Q4_K_M,Q4_0", show_default=True, help="What to make besides F16.")
@click.option("--out", type=PATH, default="dist", show_default=True, help="Where the models' folders go.")
@MAX_DRIFT
@MAX_SIZE
@STOCK
@CALIBRATION
@IMATRIX
@POOLING
@DEVICE
@LOCK
@click.option("--force", is_flag=True, help="Make everything again.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@JSON
def all_(
    models: tuple[str, ...],
    variants: str,
    out: Path,
    max_drift: float,
    max_size: int | None,
    stock: bool,
    calibration: Path | None,
    imatrix: Path | None,
    pooling: str | None,
    device: str,
    lock_path: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch, convert, calibrate, quantise, measure, write the card.

    Without MODEL, the default of models.lock. Stopped at any point, the same command goes on from there. Variants whose
    stock recipe is over the bound are repaired until they hold it. Exit code 3 where one drifts more all the same.
    """
    from f2gguf.evals.conversion import as_json as json_text
    from f2gguf.quantize.pipeline import Job, make_release
    from f2gguf.quantize.repair.plan import require_variant
    from f2gguf.quantize.report.tables import report_lines
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock
    from f2gguf.runtime.files import format_bound
    from f2gguf.runtime.llama.library import require_device

    refuse_together(**{"--stock": stock, "--max-size": max_size, "--calibration": calibration, "--imatrix": imatrix})
    lock = read_lock(lock_path)
    chosen = [require_variant(name.strip()) for name in variants.split(",")]
    require_device(device)
    found = [find_model(model, lock) for model in models or [lock.default]]
    if dry_run:
        for entry, folder in found:
            click.echo("\n".join(_dry_run_lines(entry, folder, out, chosen)))
        return
    over = []
    for entry, folder in found:
        facts = settle_found(entry, folder, pooling=pooling)
        job = Job(
            facts,
            out,
            max_drift=max_drift,
            device=device,
            progress=progress,
            force=force,
            stock=stock,
            max_size=max_size,
            calibration=calibration,
            imatrix=imatrix,
        )
        report = make_release(job, chosen)
        over += [f"{job.name} {name}" for name in chosen if not report["variants"][name]["holds"]]
        click.echo(json_text(report) if as_json else "\n".join(report_lines(report)))
        for path in sorted(job.folder.iterdir()):
            click.echo(str(path), err=as_json)
    if over:
        raise OverBound(
            f"over the bound of {format_bound(max_drift)}: {', '.join(over)}. Every file was written, and says so."
        )


@click.command()
@click.argument("model")
@click.option("--dtype", default="f16", show_default=True, help="f16, bf16 or f32.")
@click.option("-o", "--output", type=PATH, help="The file to write [default: NAME-DTYPE.gguf].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@POOLING
@LOCK
def convert(
    model: str, dtype: str, output: Path | None, force: bool, pooling: str | None, lock_path: Path | None
) -> None:
    """Convert a checkpoint to one GGUF file, and check that llama.cpp splits texts as its tokenizer does."""
    from f2gguf.evals.texts import load_texts
    from f2gguf.quantize.convert.write import require_dtype
    from f2gguf.quantize.pipeline import convert_checked
    from f2gguf.runtime.files import require_absent, writing

    require_dtype(dtype)
    facts = settle(model, pooling, lock_path)
    path = output or Path(f"{facts.name}-{dtype.upper()}.gguf")
    require_absent(path, force=force)
    with writing(path) as part:
        convert_checked(facts, part, dtype=dtype, progress=progress, texts=load_texts())
    click.echo(str(path))


@click.command()
@click.argument("model")
@click.option("--out", type=PATH, default="dist", show_default=True, help="Where `quantize all` wrote.")
@POOLING
@LOCK
def card(model: str, out: Path, pooling: str | None, lock_path: Path | None) -> None:
    """Write the model card, picture, report.html, Modelfile and SHA256SUMS again, from drift.json."""
    from f2gguf.quantize.checkpoint.folder import read_json
    from f2gguf.quantize.release.write import write_release

    facts = settle(model, pooling, lock_path)
    path = out / facts.name / "drift.json"
    if not path.exists():
        raise WrongUsage(f"{path}: no such file. Measure the model first: quantize all {model} --out {out}")
    report = read_json(path)
    with parsing(path, InputError, f"Measure the model again: quantize all {model} --out {out}"):
        paths = write_release(facts, path.parent, report)
    for path in paths:
        click.echo(str(path))


for command in (
    cli_hub.fetch,
    cli_hub.lock,
    convert,
    cli_file.imatrix,
    cli_file.variant,
    cli_file.verify,
    card,
    cli_push.push,
):
    quantize.add_command(command)
f2gguf.add_command(bench)
f2gguf.add_command(serve)
f2gguf.add_command(quantize)


def _dry_run_lines(entry: Any, folder: Path | None, out: Path, variants: list[str]) -> list[str]:
    source = folder or f"{entry.repo}@{entry.revision} on the Hub"
    lines = [f"{entry.name}: from {source}"]
    for variant_name in ["F16", *variants]:
        path = out / entry.name / f"{entry.name}-{variant_name}.gguf"
        lines.append(f"  {path}: {'there, would be checked' if path.exists() else 'would be made and measured'}")
    return lines
