"""The figures of `f2gguf bench` as one picture: speed on every workload, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2gguf.evals.bench.sides import OURS
from f2gguf.evals.plot import OURS_COLOUR, frame, picture

_THEIR_COLOUR = "#c3cad0"
_PANEL_WIDTH, _BAR_HEIGHT = 3.6, 0.42  # inches
_ROOM = 1.6  # of the longest bar, so that the words behind it fit
_UNITS = {"queries": ("texts_per_s", "queries/s")}  # other workloads differ in length: tokens/s


def draw(report: dict[str, Any], path: Path, *, file_format: str) -> None:
    """Draw horizontal bars, f2gguf's first, with the ratios beside the others'."""
    names = list(report["sides"])
    panels = [_speed_panel(name, work) for name, work in report["work"].items()] + [_memory_panel(report["sides"])]
    size = (1.9 + _PANEL_WIDTH * len(panels), 0.95 + _BAR_HEIGHT * len(names))
    with picture(path, size=size, file_format=file_format) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, values, labels) in zip(all_axes, panels, strict=True):
            _draw_panel(axes, title, names, values, labels)
        all_axes[0].get_yticklabels()[0].set(fontweight="bold", color=OURS_COLOUR)
        figure.suptitle(_title(report) + "\n", fontsize=9, x=0.005, ha="left")


Panel = tuple[str, list[float], list[str]]  # title, a value and a label for every side


def _speed_panel(name: str, work: dict[str, Any]) -> Panel:
    key, unit = _UNITS.get(name, ("tokens_per_s", "tokens/s"))
    sides = work["sides"]
    labels = [
        f"{side[key]:,.0f}" + ("" if name == OURS else f"   f2gguf {side['ratio']:.2f}x")
        for name, side in sides.items()
    ]
    return f"{name}, {unit}", [side[key] for side in sides.values()], labels


def _memory_panel(sides: dict[str, Any]) -> Panel:
    megabytes = [(side["peak_rss_bytes"] or 0) / 1e6 for side in sides.values()]
    labels = [
        "not known" if not value else f"{value:,.0f}" + ("" if name == OURS else f"   f2gguf {side['rss_ratio']:.0%}")
        for value, (name, side) in zip(megabytes, sides.items(), strict=True)
    ]
    return "peak memory, MB", megabytes, labels


def _draw_panel(axes: Any, title: str, names: list[str], values: list[float], labels: list[str]) -> None:
    colours = [OURS_COLOUR if name == OURS else _THEIR_COLOUR for name in names]
    bars = axes.barh(range(len(names)), values, color=colours, height=0.62)
    axes.bar_label(bars, labels=labels, padding=4)
    frame(axes, title, "bottom")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first side on top
    axes.set_xlim(0, max(values) * _ROOM)
    axes.xaxis.set_visible(False)
    axes.tick_params(axis="y", length=0)


def _title(report: dict[str, Any]) -> str:
    model, machine = report["model"], report["machine"]
    return (
        f"{model['name']} {model['file_type']}, {machine['cpu']}, {machine['n_threads']} threads, "
        f"sides in turn, medians, rounds: {report['rounds']}"
    )
