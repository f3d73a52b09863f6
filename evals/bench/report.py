"""The figures of `f2gguf bench` as tables, as JSON and as a picture file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from f2gguf.evals.bench.machine import MATMUL_SIZE
from f2gguf.evals.bench.sides import OURS
from f2gguf.runtime.errors import ExtraMissing, UnknownName
from f2gguf.runtime.files import format_size, require_absent, write_text, writing

_WORK_COLUMNS = ("texts/s", "tokens/s", "median s", "ours/theirs", "min cosine", "matmul peak")
_MEMORY_COLUMNS = ("peak RSS", "ours/theirs")


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people: a table a workload, memory, then what it was measured on."""
    lines = []
    for name, work in report["work"].items():
        lines += [_work_title(name, work), *table(_WORK_COLUMNS, dict(_work_rows(work))), ""]
    rows = {name: _memory_row(name, side) for name, side in report["sides"].items()}
    lines += ["memory", *table(_MEMORY_COLUMNS, rows), ""]
    facts = _facts(report)
    width = max(len(label) for label, _ in facts)
    return lines + [f"{label:<{width}}  {value}" for label, value in facts]


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table: `columns` above, then each row behind its name."""
    first = max(map(len, rows))
    widths = [max(map(len, column)) for column in zip(columns, *rows.values(), strict=True)]
    return [
        (f"  {name:<{first}}" + "".join(f"  {c:>{width}}" for c, width in zip(cells, widths, strict=True))).rstrip()
        for name, cells in {"": columns, **rows}.items()
    ]


def json_text(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)


def require_output(path: Path, *, force: bool) -> None:
    """Refuse an output of unknown format, one that exists, or one that needs what is missing, before the work."""
    if path.suffix not in _WRITERS:
        raise UnknownName("output format", path.suffix or path.name, _WRITERS, " The file's ending decides (-o).")
    if path.suffix != ".json" and not find_spec("matplotlib"):
        raise ExtraMissing(f"-o {path}: matplotlib is not installed. Run: pip install 'f2gguf[plots]'")
    require_absent(path, force=force)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report in the format of the file's ending."""
    _WRITERS[path.suffix](path, report)


def _write_json(path: Path, report: dict[str, Any]) -> None:
    write_text(path, json_text(report) + "\n")


def _write_picture(path: Path, report: dict[str, Any]) -> None:
    from f2gguf.evals.bench.picture import draw

    with writing(path) as part:
        draw(report, part, file_format=path.suffix[1:])


_WRITERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    ".png": _write_picture,
    ".svg": _write_picture,
    ".json": _write_json,
}


def _work_title(name: str, work: dict[str, Any]) -> str:
    prompt = "with the model's prompt" if work["prompt"] else "no prompt"
    if name == "queries" and not work["prompt"]:
        prompt = "plain, for the file has no query prompt"
    return f"{name}: {work['n_texts']:,} texts, {work['n_tokens']:,} tokens, {prompt}"


def _work_rows(work: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, side in work["sides"].items():
        yield (
            name,
            (
                f"{side['texts_per_s']:,.1f}",
                f"{side['tokens_per_s']:,.0f}",
                f"{side['median_s']:.3f}",
                "" if name == OURS else f"{side['ratio']:.2f}x",
                "" if name == OURS else f"{side['min_cosine']:.7f}",
                f"{side['matmul_share']:.0%}",
            ),
        )


def _memory_row(name: str, side: dict[str, Any]) -> tuple[str, str]:
    if side["peak_rss_bytes"] is None:
        return "not known here", ""
    return f"{side['peak_rss_bytes'] / 1e6:,.0f} MB", "" if name == OURS else f"{side['rss_ratio']:.0%}"


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    model, machine, cold = report["model"], report["machine"], report["cold_start"]
    overheads = ", ".join(f"{name} {work['overhead']:.1%}" for name, work in report["work"].items())
    facts = [
        ("file", f"{model['path']} ({model['file_type']}, {format_size(model['size_bytes'])})"),
        (
            "machine",
            f"{machine['cpu']}, {machine['n_physical_cores']} physical cores; {machine['n_threads']} threads used",
        ),
        ("llama.cpp", machine["llama_cpp_system_info"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in report["versions"].items())),
        ("rounds", f"{report['rounds']} after a warm-up, the sides in turn; medians"),
        (
            "matmul peak",
            f"{report['matmul_gflops']:,.0f} GFLOP/s: numpy, float32, {MATMUL_SIZE} x {MATMUL_SIZE}. A side's share "
            f"counts {model['flops_per_token'] / 1e6:,.1f} MFLOP a token, the matrices of the layers",
        ),
        ("overhead", f"of f2gguf outside llama.cpp: {overheads} of the wall time"),
        (
            "cold start",
            f"{cold['command_s']:.2f} s for `f2gguf embed` with one text, {cold['load_s']:.2f} s for loading the model "
            f"alone: {cold['rest_s']:.2f} s more",
        ),
    ]
    return facts + [(name, side["setup"]) for name, side in report["sides"].items()]
