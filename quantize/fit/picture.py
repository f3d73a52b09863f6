"""What `f2gguf fit` found as one picture: memory against drift, and against speed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from f2gguf.evals.plot import TEXT_COLOUR, frame, picture
from f2gguf.quantize.fit.fit import Fit, Fits
from f2gguf.quantize.report.picture import FLOOR, LOOKS, log_axis
from f2gguf.runtime.errors import ExtraMissing, UnknownName
from f2gguf.runtime.files import require_absent, writing

FORMATS = (".png", ".svg")


def require_picture(path: Path, *, force: bool) -> None:
    """Before the work, refuse an output of unknown format, one that exists, or a picture without matplotlib."""
    if path.suffix not in FORMATS:
        raise UnknownName("picture format", path.suffix or path.name, FORMATS, " The file's ending decides (-o).")
    if not find_spec("matplotlib"):
        raise ExtraMissing(f"-o {path}: matplotlib is not installed. Run: pip install 'f2gguf[plots]'")
    require_absent(path, force=force)


def draw(found: Fits, path: Path) -> None:
    """Draw the files into a .png or .svg file. A range of drifts is a line with a hollow mark at its upper end."""
    known = [file for file in found.files if file.speed and file.speed.tokens_per_s]
    with writing(path) as part, picture(part, size=(10, 3.6), file_format=path.suffix[1:]) as figure:
        left, *right = figure.subplots(1, 1 + bool(known), squeeze=False)[0]
        for file, look in zip(found.files, itertools.cycle(LOOKS), strict=False):
            _draw_drift(left, file, *look)
        drifts = [drift for file in found.files if file.quality for drift in (file.quality.low, file.quality.high)]
        left.set_yscale("log")
        low, high = max(min(drifts, default=FLOOR), FLOOR) / 2, max([*drifts, FLOOR * 10]) * 2
        left.set_ylim(low, high)
        log_axis(left.yaxis, low, high)
        frame(left, "Memory against mean drift (hollow: other models' files)")
        for axes in right:
            _draw_speeds(axes, known, found)
        for axes in (left, *right):
            axes.set_xlabel("memory, GB")
            axes.set_xlim(0, 1.3 * max(map(_gb, found.files)))


def _draw_speeds(axes: Any, known: Sequence[Fit], found: Fits) -> None:
    speeds = [file.figures["speed"] or 0.0 for file in known]
    looks = dict(zip((file.name for file in found.files), itertools.cycle(LOOKS), strict=False))
    for file, speed in zip(known, speeds, strict=True):
        colour, marker = looks[file.name]
        axes.plot(_gb(file), speed, marker, color=colour, markersize=8)
        _name(axes, file, speed)
    axes.set_ylim(0, 1.2 * max(speeds))
    frame(axes, f"Memory against tokens/s of documents, {'estimated' if found.device else 'sampled here'}")


def _draw_drift(axes: Any, file: Fit, colour: str, marker: str) -> None:
    if file.quality is None:
        return
    low, high = max(file.quality.low, FLOOR), max(file.quality.high, FLOOR)
    axes.plot([_gb(file)] * 2, [low, high], color=colour)
    fill = {} if file.quality.is_measured else {"mfc": "none"}
    axes.plot(_gb(file), high, marker, color=colour, markersize=8, **fill)
    _name(axes, file, high)


def _name(axes: Any, file: Fit, height: float) -> None:
    is_reference = file.quality is not None and file.quality.is_measured and not file.quality.high
    name = f"{file.variant}, reference" if is_reference else file.variant
    axes.annotate(name, (_gb(file), height), (8, 0), textcoords="offset points", va="center", color=TEXT_COLOUR)


def _gb(file: Fit) -> float:
    return file.memory.total_bytes / 1e9
