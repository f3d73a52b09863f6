"""drift.json as one picture: every text's drift, size against drift, and the mean by width and by language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from f2gguf.evals.plot import LINE_COLOUR, TEXT_COLOUR, frame, picture
from f2gguf.quantize.report.report import Measured, Report
from f2gguf.runtime.files import format_bound

# Okabe and Ito's colours, which colour-blind eyes tell apart; the markers say it again
LOOKS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#e69f00", "v"), ("#56b4e9", "P"))
FLOOR = 1e-6  # drift.json rounds to it, and a logarithm needs more than zero
_N_BINS = 64
_ROW_HEIGHT = 0.8  # of the space between two variants' rows


@dataclass(frozen=True)
class _Series:
    """A variant, and how it looks in every panel."""

    name: str
    verdict: Measured
    colour: str
    marker: str


def can_draw(report: Report) -> bool:
    """Whether there is something to draw, and matplotlib (the extra `plots`) to draw it with."""
    return bool(report.variants) and find_spec("matplotlib") is not None


def draw(report: Report, path: Path | IO[bytes], *, file_format: str) -> None:
    """Draw the report as `file_format` (png or svg), the same bytes for the same report."""
    series = [
        _Series(name, verdict, *LOOKS[i % len(LOOKS)]) for i, (name, verdict) in enumerate(report.variants.items())
    ]
    bound = report.max_drift
    layout = [["texts", "sizes"], ["dims", "sizes"], ["languages", "languages"]]
    if len(series[0].verdict.dims) < 2:
        del layout[1]
    with picture(path, size=(10, 2.6 * len(layout) + 0.4), file_format=file_format) as figure:
        axes = figure.subplot_mosaic(layout)
        _draw_texts(axes["texts"], series, bound)
        _draw_languages(axes["languages"], series, bound)
        if "dims" in axes:
            _draw_dims(axes["dims"], series, bound)
        _draw_title(figure, report, series)
        _draw_sizes(axes["sizes"], series, report)


def _draw_title(figure: Any, report: Report, series: Sequence[_Series]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=one.colour, marker=one.marker, linestyle="", label=one.name) for one in series]
    if report.stock:
        marks.append(Line2D([], [], color=TEXT_COLOUR, marker="o", mfc="none", linestyle="", label="stock recipe"))
    marks.append(Line2D([], [], color=TEXT_COLOUR, linestyle="--", label=f"bound, {format_bound(report.max_drift)}"))
    figure.legend(
        handles=marks,
        title=f"{report.model}: drift, 1 - cosine to the {report.base} file's vectors, of {report.texts.n} texts",
        title_fontsize=11,
        alignment="left",
        loc="outside upper left",
        ncols=len(marks),
        frameon=False,
    )


def _draw_texts(axes: Any, series: Sequence[_Series], bound: float) -> None:
    """A row a variant: how many texts drift how far, and the mean."""
    low, high = _span([drift for one in series for drift in one.verdict.drifts], bound)
    edges = np.geomspace(low, high, _N_BINS + 1)
    for row, one in enumerate(series):
        counts, _ = np.histogram(np.clip(one.verdict.drifts, low, high), edges)
        heights = _ROW_HEIGHT * counts / counts.max() - row
        axes.stairs(heights, edges, baseline=-row, fill=True, color=one.colour, alpha=0.45)
        axes.plot(_logged([one.verdict.mean]), [-row], one.marker, color=one.colour, clip_on=False, zorder=3)
    axes.axvline(bound, color=TEXT_COLOUR, linestyle="--", linewidth=1)
    axes.set_yticks([-row for row in range(len(series))], [one.name for one in series])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.75 - len(series), 1)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    log_axis(axes.xaxis, low, high)
    frame(axes, "Every text's drift (mark: the mean)", "left")


def _draw_languages(axes: Any, series: Sequence[_Series], bound: float) -> None:
    """Every language's mean, the worst first."""
    means = {name: [one.verdict.languages[name].mean for one in series] for name in series[0].verdict.languages}
    names = sorted(means, key=lambda name: (-max(means[name]), name))
    for i, one in enumerate(series):
        places = np.arange(len(names)) + 0.2 * (i - (len(series) - 1) / 2)  # equal means stand side by side
        axes.plot(places, _logged(means[name][i] for name in names), one.marker, color=one.colour, markersize=3.5)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    for label, name in zip(axes.get_xticklabels(), names, strict=True):
        over = any(not one.verdict.languages[name].mean < bound for one in series)
        label.set_fontweight("bold" if over else "normal")
    axes.set_xlim(-0.8, max(len(names), 16) - 0.2)
    _drift_axis(axes, [mean for row in means.values() for mean in row], bound)
    axes.grid(axis="x", color=LINE_COLOUR, alpha=0.25)
    frame(axes, "Mean drift of every language, the worst first (bold: over the bound)")


def _draw_dims(axes: Any, series: Sequence[_Series], bound: float) -> None:
    for one in series:
        widths, means = zip(*one.verdict.dims.items(), strict=True)  # side by side: 4096 and 5120 would overlap
        axes.plot(range(len(widths)), _logged(means), marker=one.marker, color=one.colour, markersize=4)
    axes.set_xticks(range(len(widths)), widths)
    _drift_axis(axes, [mean for one in series for mean in one.verdict.dims.values()], bound)
    frame(axes, "Mean drift by Matryoshka dimension")


def _draw_sizes(axes: Any, series: Sequence[_Series], report: Report) -> None:
    """Size against mean drift: below and left is better; an arrow comes from llama.cpp's own recipe."""
    points = []  # (MB, drift) of every mark
    for one in series:
        here = _point(one.verdict)
        axes.plot(*here, one.marker, color=one.colour, markersize=8)
        points.append(here)
        if one.name in report.stock:
            before = _point(report.stock[one.name])
            axes.plot(*before, one.marker, color=one.colour, markersize=8, mfc="none")
            arrow = {"arrowstyle": "->", "color": one.colour, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", here, before, arrowprops=arrow)
            points.append(before)
    _drift_axis(axes, [drift for _, drift in points], report.max_drift)
    axes.margins(x=0.2)
    axes.set_xlabel("size, MB")
    frame(axes, "Size against mean drift")
    _name_points(axes, series, report, points)


def _name_points(axes: Any, series: Sequence[_Series], report: Report, points: Sequence[Any]) -> None:
    """Each name at the first side of its point where it covers no mark and no other name."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in axes.transData.transform(points)]
    sides = {(9, 0): ("left", "center"), (-9, 0): ("right", "center"), (0, 8): ("center", "bottom")}
    sides |= {(0, -8): ("center", "top")}
    for one in series:
        here = _point(one.verdict)
        for offset, (ha, va) in sides.items():
            name = axes.annotate(one.name, here, offset, textcoords="offset points", ha=ha, va=va, color=one.colour)
            box = name.get_window_extent()
            if not box.count_overlaps(taken):
                break
            name.set_visible(False)
        name.set_visible(True)
        taken.append(box)


def _point(verdict: Measured) -> tuple[float, float]:
    return verdict.size_bytes / 1e6, max(verdict.mean, FLOOR)


def _drift_axis(axes: Any, drifts: Sequence[float], bound: float) -> None:
    low, high = _span(drifts, bound)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    log_axis(axes.yaxis, low, high)
    axes.axhline(bound, color=TEXT_COLOUR, linestyle="--", linewidth=1)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks at 1%, 10%; at 2% and 5% too where there would be too few."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * low else (1.0,)))
    axis.set_major_formatter(lambda drift, _: format_bound(drift))
    axis.set_minor_locator(NullLocator())
    axis.grid(True, color=LINE_COLOUR, alpha=0.25)
    axis.axes.set_axisbelow(True)


def _span(drifts: Sequence[float], bound: float) -> tuple[float, float]:
    """The ends of a logarithmic axis that holds `drifts` and the bound."""
    return min(*_logged(drifts), bound) / 1.6, max(*drifts, bound) * 1.6


def _logged(drifts: Iterable[float]) -> list[float]:
    return [max(drift, FLOOR) for drift in drifts]
