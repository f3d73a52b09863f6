"""The command `f2gguf fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from f2gguf.quantize.cli import options as shared
from f2gguf.runtime.errors import OutOfReach


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--variants", default="Q8_0,Q4_K_M,Q4_0", show_default=True, help="Variants to plan besides F16.")
@click.option("--goal", metavar="WISHES", help="Pick the file for such as 'drift<1%,memory<3GB,latency<50ms'.")
@click.option("--max-tokens", type=int, help="Tokens of the longest text [default: 512, or what the model takes].")
@click.option("--parallel", default=1, show_default=True, type=click.IntRange(1), help="Requests at a time.")
@click.option("--device", metavar="NAME", help="Estimate a device of runtime/devices.toml instead of this machine.")
@click.option("--price", type=float, help="What an hour of the machine costs, for the cost of a million texts.")
@click.option("--texts", "n_texts", type=float, default=1e6, show_default=True, help="Texts of a corpus.")
@click.option("--tokens", "n_tokens", type=float, help="Tokens of each text [default: 128, and mixed lengths sampled].")
@click.option("--threads", "n_threads", type=click.IntRange(1), help="Number of threads [default: one a core].")
@click.option("--no-sample", is_flag=True, help="Measure no speed.")
@click.option("-o", "--output", type=shared.PATH, help="Draw the files into a .png or .svg file.")
@shared.FORCE
@shared.checkpoint_options
@shared.LOCK
@shared.JSON
def fit(
    models: tuple[str, ...],
    no_sample: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    lock: Path | None,
    **options: Any,
) -> None:
    """Say which file of a model runs here, in how much memory, how well, and how fast, before anything is made.

    MODEL is a .gguf file, a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub,
    of which only small files are downloaded. The exit code is 3 if no file grants the --goal.
    """
    from f2gguf.evals.drift import json_text
    from f2gguf.quantize.fit.fit import fit as fit_models
    from f2gguf.quantize.fit.picture import draw, require_picture
    from f2gguf.quantize.fit.table import failing_line, lines
    from f2gguf.quantize.source.facts import Stated

    if output:
        require_picture(output, force=force)
    stated = Stated(*(options.pop(name) for name in ("pooling", "eos_token", "allowed_keys", "name")))
    found = fit_models(models, lock=lock, stated=stated, sample=not no_sample, **options)
    click.echo(json_text(found.as_dict()) if as_json else "\n".join(lines(found)), nl=not as_json)
    if output:
        draw(found, output)
        click.echo(str(output), err=as_json)
    if found.failing:
        raise OutOfReach(failing_line(found))
