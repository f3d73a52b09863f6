"""Options that several commands of `quantize` take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import WrongUsage


def require_number(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
    if any(number != number for number in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("nan is no number to compare with.")
    return value


def _require_size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(B|kB|MB|GB|KiB|MiB|GiB)", text or "", re.IGNORECASE)
    if text is not None and not match:
        raise click.BadParameter(f"{text!r} is no size; write 350MB or 1.2GB (--max-size).")
    return int(float(match[1]) * _UNITS[match[2].lower()]) if match else None


PATH = click.Path(path_type=Path)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, metal or cuda.")
LOCK = click.option("--lock", "lock_path", type=PATH, help="Another models.lock.")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_DRIFT = click.option(
    "--max-drift",
    type=click.FloatRange(0, 2, min_open=True),
    default=0.02,
    show_default=True,
    callback=require_number,
    help="The bound.",
)
POOLING = click.option("--pooling", help="last, mean or cls, for a checkpoint that does not state it.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
STOCK = click.option("--stock", is_flag=True, help="llama.cpp's plain recipe, whatever it drifts.")
MAX_SIZE = click.option(
    "--max-size", callback=_require_size, help="The least drift within this size of a file, such as 350MB or 1.2GB."
)
CALIBRATION = click.option("--calibration", type=PATH, help="Texts of your own to choose recipes with.")
IMATRIX = click.option("--imatrix", type=PATH, help="An importance matrix of your own (GGUF).")


def settle(model: str, pooling: str | None, lock_path: Path | None) -> Any:
    """The facts of MODEL, fetched where it is not here yet."""
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock

    return settle_found(*find_model(model, read_lock(lock_path)), pooling=pooling)


def settle_found(entry: Any, folder: Path | None, *, pooling: str | None) -> Any:
    """The facts of an entry of the lock, fetched where there is no `folder` yet."""
    from f2gguf.quantize.source.facts import settle_facts
    from f2gguf.quantize.source.fetch import fetch

    path = fetch(entry, folder)
    say(f"{entry.name}: {path}")
    return settle_facts(entry, path, pooling=pooling)


def refuse_together(**flags: object) -> None:
    """Raise `WrongUsage` where the first flag was given with one of the others, which it leaves nothing to do."""
    given = [name for name, value in flags.items() if value]
    if len(given) > 1 and given[0] == next(iter(flags)):
        raise WrongUsage(f"{given[0]} and {given[1]}: choose one.")
