"""The figures of `f2gguf bench` as tables, as JSON and as a picture file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from f2gguf.evals.bench.sides import OURS
from f2gguf.runtime.console import text_table
from f2gguf.runtime.errors import ExtraMissing, UnknownName
from f2gguf.runtime.files import format_size, require_absent, write_text, writing

FORMATS = (".png", ".svg", ".json")
_COLUMNS = ("", "texts/s", "tokens/s", "median s", "ours/theirs", "min cosine")
_UNITS = {"queries": ("texts_per_s", "queries/s")}  # other workloads differ in length: tokens/s
_THEIR_COLOUR = "#c3cad0"
_PANEL_WIDTH, _BAR_HEIGHT = 3.6, 0.42  # inches
_ROOM = 1.6  # width of a panel in lengths of its longest bar, so that the words behind the bar fit


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people: a table for each workload, memory, then what it was measured on."""
    lines = []
    for name, work in report["work"].items():
        rows = [_speed_row(*side) for side in work["sides"].items()]
        lines += [_work_title(name, work), text_table(_COLUMNS, rows), ""]
    memory = [_memory_row(*side) for side in report["sides"].items()]
    return [*lines, text_table(["memory", "peak RSS", "ours/theirs"], memory), "", *_facts(report)]


def json_text(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)


def require_output(path: Path, *, force: bool) -> None:
    """Before the work, refuse an output of unknown format, one that exists, or a picture without matplotlib."""
    if path.suffix not in FORMATS:
        raise UnknownName("output format", path.suffix or path.name, FORMATS, " The file's ending decides (-o).")
    if path.suffix != ".json" and not find_spec("matplotlib"):
        raise ExtraMissing(f"-o {path}: matplotlib is not installed. Run: pip install 'f2gguf[plots]'")
    require_absent(path, force=force)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report in the format of the file's ending."""
    if path.suffix == ".json":
        return write_text(path, json_text(report) + "\n")
    with writing(path) as part:
        return _draw(report, part, file_format=path.suffix[1:])


def _work_title(name: str, work: dict[str, Any]) -> str:
    no_prompt = "plain, for the file has no query prompt" if name == "queries" else "no prompt"
    prompt = "with the model's prompt" if work["prompt"] else no_prompt
    return f"{name}: {work['n_texts']:,} texts, {work['n_tokens']:,} tokens, {prompt}"


def _speed_row(name: str, side: dict[str, Any]) -> list[str]:
    ratios = ("", "") if name == OURS else (f"{side['ratio']:.2f}x", f"{side['min_cosine']:.7f}")
    return [name, f"{side['texts_per_s']:,.1f}", f"{side['tokens_per_s']:,.0f}", f"{side['median_s']:.3f}", *ratios]


def _memory_row(name: str, side: dict[str, Any]) -> tuple[str, str, str]:
    if side["peak_rss_bytes"] is None:
        return name, "not known here", ""
    return name, f"{side['peak_rss_bytes'] / 1e6:,.0f} MB", "" if name == OURS else f"{side['rss_ratio']:.0%}"


def _facts(report: dict[str, Any]) -> list[str]:
    model, machine = report["model"], report["machine"]
    cores = f"{machine['n_physical_cores']} physical cores; {machine['n_threads']} threads used"
    facts = {
        "file": f"{model['path']} ({model['file_type']}, {format_size(model['size_bytes'])})",
        "machine": f"{machine['cpu']}, {cores}",
        "llama.cpp": machine["llama_cpp_system_info"],
        "versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        "rounds": f"{report['rounds']} after a warm-up, the sides in turn; medians",
    }
    facts |= {name: side["setup"] for name, side in report["sides"].items()}
    width = max(map(len, facts))
    return [f"{name:<{width}}  {fact}" for name, fact in facts.items()]


def _draw(report: dict[str, Any], path: Path, *, file_format: str) -> None:
    """Horizontal bars, f2gguf's first: speed on every workload, and memory. The other bars show f2gguf's ratio."""
    from f2gguf.evals.plot import OURS_COLOUR, frame, picture

    names, model, machine = list(report["sides"]), report["model"], report["machine"]
    panels = list(_panels(report))
    colours = [OURS_COLOUR if name == OURS else _THEIR_COLOUR for name in names]
    size = (1.9 + _PANEL_WIDTH * len(panels), 0.95 + _BAR_HEIGHT * len(names))
    with picture(path, size=size, file_format=file_format) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, bars) in zip(all_axes, panels, strict=True):
            values = [value for value, _ in bars]
            labels = [f"{value:,.0f}   {ratio}" if value else "not known" for value, ratio in bars]
            axes.bar_label(axes.barh(names, values, color=colours, height=0.62), labels=labels, padding=4)
            frame(axes, title, "bottom")
            axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, max(values) * _ROOM))  # the first side on top
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_visible(False)
        title = f"{model['name']} {model['file_type']}, {machine['cpu']}, {machine['n_threads']} threads, sides in turn"
        figure.suptitle(f"{title}, medians, rounds: {report['rounds']}\n", fontsize=9, x=0.005, ha="left")


def _panels(report: dict[str, Any]) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """A title, and for every side a value and f2gguf's ratio to it."""
    for name, work in report["work"].items():
        key, unit = _UNITS.get(name, ("tokens_per_s", "tokens/s"))
        bars = [(side[key], _ratio(other, f"{side['ratio']:.2f}x")) for other, side in work["sides"].items()]
        yield f"{name}, {unit}", bars
    peaks = [(name, side["peak_rss_bytes"] or 0, side["rss_ratio"] or 0) for name, side in report["sides"].items()]
    bars = [(peak / 1e6, _ratio(name, f"{ratio:.0%}")) for name, peak, ratio in peaks]
    yield "peak memory, MB", bars


def _ratio(name: str, ratio: str) -> str:
    return "" if name == OURS else f"f2gguf {ratio}"
