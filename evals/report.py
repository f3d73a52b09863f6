"""Measurements as people read them: the drift table, the two gates, what is over the bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from f2gguf.evals.conversion import NOT_CHECKED
from f2gguf.runtime.files import format_bound, format_size

COLUMNS = ("file", "size", "mean drift", "95% interval", "p99", "worst", "top-10 kept", "nDCG@10", "verdict")


def drift_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a file, F16 first, in the order of COLUMNS."""
    rows = []
    for variant, file in sorted(report["files"].items(), key=lambda item: -item[1]["size_bytes"]):
        size = format_size(file["size_bytes"])
        measured = report["variants"].get(variant)
        ndcg = next((v["ndcg10_reference"] for v in report["variants"].values()), None)
        if measured:
            rows.append([variant, size, *verdict_cells(measured)])
        else:
            rows.append([variant, size, "reference", "", "", "", "", "" if ndcg is None else f"{ndcg:.3f}", ""])
    return rows


def verdict_cells(verdict: dict[str, Any]) -> list[str]:
    """The measured cells of one file, from "mean drift" to "verdict"."""
    return [
        percent(verdict["mean"]),
        f"{percent(verdict['lower'])} to {percent(verdict['upper'])}",
        percent(verdict["p99"]),
        percent(verdict["worst"]),
        f"{verdict['top10_overlap']:.1%}",
        f"{verdict['ndcg10']:.3f}",
        label(verdict),
    ]


def label(verdict: dict[str, Any]) -> str:
    return f"{'under' if verdict['holds'] else 'OVER'} {format_bound(verdict['max_drift'])}"


def percent(fraction: float) -> str:
    """0.00312 -> '0.312%'."""
    return f"{100 * fraction:.3f}%"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report_lines(report: dict[str, Any]) -> list[str]:
    """The whole report for a terminal."""
    lines = [text_table(COLUMNS, drift_rows(report)), "", f"conversion: {conversion_sentence(report)}"]
    return [*lines, *over_lines(report)]


def conversion_sentence(report: dict[str, Any]) -> str:
    """What gate 1 found, or why it was not run."""
    check = report["conversion"]
    if check["reference"] == NOT_CHECKED:
        return f"not checked ({check['why']})"
    return (
        f"F16 against {check['reference']}: cosine at least {check['min_cosine']:.6f} "
        f"(mean {check['mean_cosine']:.6f}) over {check['n']} texts; {check['required_min_cosine']} is required"
    )


def over_lines(report: dict[str, Any]) -> list[str]:
    """One line for each variant over the bound, with what is over it."""
    lines = []
    for variant, verdict in report["variants"].items():
        if not verdict["holds"]:
            shown = "; ".join(verdict["over"][:5])
            more = len(verdict["over"]) - 5
            lines.append(f"{variant} is over the bound: {shown}" + (f"; and {more} more" if more > 0 else ""))
    return lines
