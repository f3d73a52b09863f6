"""Measurements as people read them: the drift table, the two gates, what is over the bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from f2gguf.evals.conversion import NOT_CHECKED
from f2gguf.evals.drift import label, percent
from f2gguf.runtime.console import text_table
from f2gguf.runtime.files import format_size

COLUMNS = ("file", "size", "mean drift", "95% interval", "p99", "worst", "top-10 kept", "nDCG@10", "verdict")
STOCK_NOTE = '"stock" is what llama.cpp\'s own recipe for the variant gives, measured on the same texts.'
N_WORST = 10
Table = tuple[Sequence[str], list[list[str]]]  # header, rows


def drift_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row a file, F16 first, in the order of COLUMNS; below a repaired one, llama.cpp's own recipe."""
    return [[name, format_size(size_bytes), *cells] for name, size_bytes, cells in _measured_files(report)]


def files_table(report: dict[str, Any]) -> Table:
    """The drift table with the bits that each weight takes, and what becomes of F16's nDCG@10."""
    bits_per_byte_weight = 8 / report["source"]["n_parameters"]
    verdicts = named_verdicts(report)
    rows = [
        [
            name,
            format_size(size_bytes),
            f"{size_bytes * bits_per_byte_weight:.2f}",
            *cells[:-1],
            ndcg_change(verdicts[name]) if name in verdicts else "",
            cells[-1],
        ]
        for name, size_bytes, cells in _measured_files(report)
    ]
    return (*COLUMNS[:2], "bits per weight", *COLUMNS[2:-1], "change", COLUMNS[-1]), rows


def ndcg_change(verdict: dict[str, Any]) -> str:
    """Of nDCG@10 against F16's: 0.261 of 0.263 -> '-0.76%'."""
    reference = verdict["ndcg10_reference"]
    return f"{verdict['ndcg10'] / reference - 1:+.2%}" if reference else ""


def groups_table(report: dict[str, Any], by: str) -> Table:
    """Mean drift of every group, the worst first; `by` is "language" or "kind"."""
    verdicts = named_verdicts(report)
    groups = {name: [verdict[f"{by}s"][name] for verdict in verdicts.values()] for name in _first(verdicts)[f"{by}s"]}
    worst = {name: max(ours[f"{by}s"][name]["mean"] for ours in report["variants"].values()) for name in groups}
    rows = []
    for name in sorted(groups, key=lambda name: -worst[name]):
        marks = [" OVER" if is_over(verdict, f"{by} {name}") else "" for verdict in verdicts.values()]
        means = [percent(group["mean"]) + mark for group, mark in zip(groups[name], marks, strict=True)]
        rows.append([name, str(groups[name][0]["n"]), *means])
    return (by, "texts", *verdicts), rows


def dims_table(report: dict[str, Any]) -> Table:
    """Mean drift at every Matryoshka width, which the bound does not ask about."""
    verdicts = named_verdicts(report)
    columns = [verdict["dims"].values() for verdict in verdicts.values()]
    dims = map(str, _first(verdicts)["dims"])
    return ("dimensions", *verdicts), [[dim, *map(percent, means)] for dim, *means in zip(dims, *columns, strict=True)]


def is_over(verdict: dict[str, Any], what: str) -> bool:
    """Whether the verdict names `what` ("language de") as at or over the bound."""
    return any(line.rsplit(" ", 1)[0] == what for line in verdict["over"])


def worst_texts(report: dict[str, Any], verdict: dict[str, Any]) -> Table:
    """The ids and drifts of the texts that drift most."""
    found = sorted(zip(verdict["drifts"], report["texts"]["ids"], strict=True), key=lambda item: -item[0])
    return ("text", "drift"), [[name, percent(drift)] for drift, name in found[:N_WORST]]


def named_verdicts(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything measured by its name in tables: Q4_0, then "Q4_0 stock" where llama.cpp's own recipe was repaired."""
    stock = report.get("stock", {})
    named = {}
    for variant, verdict in report["variants"].items():
        named[variant] = verdict
        if variant in stock:
            named[f"{variant} stock"] = stock[variant]
    return named


def recipe_lines(report: dict[str, Any]) -> dict[str, list[str]]:
    """How each variant was made, in words, where the report says."""
    recipes = {name: verdict.get("recipe") for name, verdict in report["variants"].items()}
    return {name: recipe["lines"] for name, recipe in recipes.items() if recipe}


def _measured_files(report: dict[str, Any]) -> Iterator[tuple[str, int, list[str]]]:
    """Name, size in bytes and measured cells of every row, F16's empty but for its nDCG."""
    verdicts = named_verdicts(report)
    ndcg = f"{_first(verdicts)['ndcg10_reference']:.3f}" if verdicts else ""
    yield "F16", report["files"]["F16"]["size_bytes"], ["reference", "", "", "", "", ndcg, ""]
    for name, verdict in verdicts.items():
        file = report["files"].get(name, verdict)  # the stock recipe's file was not kept: its verdict states the size
        yield name, file["size_bytes"], verdict_cells(verdict)


def _first(verdicts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return next(iter(verdicts.values()))


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
