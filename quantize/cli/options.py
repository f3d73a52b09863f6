"""Options that several commands of `quantize` take, and how MODEL is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from f2gguf.runtime.errors import WrongUsage

PATH = click.Path(path_type=Path)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def require_number(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
    if any(number != number for number in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("nan is no number to compare with.")
    return value


def _require_size(_context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(B|kB|MB|GB|KiB|MiB|GiB)", text, re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"{text!r} is no size; write 350MB or 1.2GB ({option.opts[0]}).")
    return int(float(match[1]) * _UNITS[match[2].lower()])


DEVICE = click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu, metal or cuda.")
FORCE = click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
IMATRIX = click.option("--imatrix", type=PATH, help="Importance matrix of your own (a GGUF file).")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
LOCK = click.option("--lock", type=PATH, help="Lock file to use [default: models.lock here, or f2gguf's own].")
MAX_DRIFT = click.option(
    "--max-drift",
    type=click.FloatRange(0, 2, min_open=True),
    default=0.02,
    show_default=True,
    callback=require_number,
    help="Highest allowed mean drift (1 - cosine) from the F16 file.",
)
MAX_SIZE = click.option(
    "--max-size", callback=_require_size, help="Make the file that drifts least within this size: 350MB, 1.2GB."
)
FIT = click.option(
    "--fit", callback=_require_size, help="Make only the largest variant that runs within this memory: 350MB, 3GB."
)
COMPENSATE = click.option(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="Choose codes that compensate for each other's errors: a third of the drift or less, for minutes of work.",
)
TUNE = click.option(
    "--tune/--no-tune",
    default=None,
    help="Weigh tokens by gradients, and train scales, norms and biases on the drift, which takes torch. By default, "
    "each of the two where it takes minutes.",
)
STOCK = click.option("--stock", is_flag=True, help="Use llama.cpp's plain recipe, whatever it drifts.")


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name texts of the user's own."""
    for option in (
        click.option("--column", help="Key or column of the text in the --calibration file [default: text]."),
        click.option("--calibration", type=PATH, help="Corpus of your own that files are made for, of any size."),
    ):
        command = option(command)
    return command


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what a checkpoint leaves out."""
    for option in (
        click.option("--name", help="Name of the model and of its files [default: the folder's or repository's]."),
        click.option(
            "--allow-config-key",
            "allowed_keys",
            metavar="KEY",
            multiple=True,
            help="A key of config.json that changes no vector, though f2gguf does not know it; repeatable.",
        ),
        click.option("--eos-token", metavar="TOKEN", help="Token that closes every text, or none if no token does."),
        click.option("--pooling", help="Pooling of a checkpoint that does not state it: last, mean or cls."),
    ):
        command = option(command)
    return command


def facts_of(model: str, lock: Path | None, **stated: Any) -> Any:
    """The facts of MODEL, which is fetched if it is not here yet."""
    from f2gguf.quantize.source.facts import Stated, open_facts

    return open_facts(model, stated=Stated(**stated), lock=lock)


def require_tune(options: Mapping[str, object]) -> None:
    """Raise `WrongUsage` for --tune where there are no codes to tune, and `ExtraMissing` without torch."""
    from f2gguf.quantize.repair.codes.tune import require_torch

    if options["tune"]:
        refuse_together(options, "stock", "tune")
        if not options["compensate"]:
            raise WrongUsage("--no-compensate and --tune: choose one.")
        require_torch("--tune trains scales")


def refuse_together(options: Mapping[str, object], first: str, *others: str) -> None:
    """Raise `WrongUsage` if the option `first` was used with one of the others, which it leaves nothing to do."""
    for other in others if options[first] else ():
        if options[other]:
            flags = [f"--{name.replace('_', '-')}" for name in (first, other)]
            raise WrongUsage(f"{flags[0]} and {flags[1]}: choose one.")
