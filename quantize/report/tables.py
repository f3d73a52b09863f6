"""A report as tables: files, languages, kinds, dimensions, the worst texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from f2gguf.evals.conversion import MIN_COSINE
from f2gguf.evals.drift import Verdict, percent
from f2gguf.quantize.repair.corpus import CorpusDrift
from f2gguf.quantize.report.report import Measured, Report
from f2gguf.runtime.console import text_table
from f2gguf.runtime.files import format_size
from f2gguf.runtime.fit.devices import device_cell, devices

COLUMNS = ("file", "size", "mean drift", "95% interval", "p99", "worst", "top-10 kept", "nDCG@10", "verdict")
N_WORST = 10


@dataclass(frozen=True)
class Table:
    """Cells as people read them; the first cell of a row names it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def drift_rows(report: Report) -> list[list[str]]:
    """One row for each file, F16 first, in the order of COLUMNS; below a repaired one, llama.cpp's own recipe."""
    return [[name, format_size(size_bytes), *cells] for name, size_bytes, cells in _measured_files(report)]


def files_table(report: Report) -> Table:
    """The drift table with the bits that each weight takes, and the change of nDCG@10 against F16."""
    verdicts = report.named_verdicts
    rows = [
        [
            name,
            format_size(size_bytes),
            f"{8 * size_bytes / report.source.n_parameters:.2f}",
            *cells[:-1],
            ndcg_change(verdicts[name]) if name in verdicts else "",
            cells[-1],
        ]
        for name, size_bytes, cells in _measured_files(report)
    ]
    header = (*COLUMNS[:2], "bits per weight", *COLUMNS[2:-1], "change", COLUMNS[-1])
    return Table("Size and drift of every file", header, rows)


def ndcg_change(verdict: Verdict) -> str:
    """Change of nDCG@10 against F16's: 0.261 of 0.263 -> '-0.76%'."""
    if not verdict.ndcg10_reference or verdict.ndcg10 is None:
        return ""
    return f"{verdict.ndcg10 / verdict.ndcg10_reference - 1:+.2%}"


def groups_table(report: Report, by: str) -> Table:
    """Mean drift of every group, the worst first; `by` is "language" or "kind". The bound is about all of them."""
    verdicts = report.named_verdicts
    means = {name: verdict.means for name, verdict in verdicts.items()}
    counts = {name: group.n for name, group in next(iter(verdicts.values())).groups[by].items()}
    worst = {name: max(means[variant][f"{by} {name}"] for variant in report.variants) for name in counts}
    rows = [
        [name, str(counts[name]), *(_mean_cell(verdicts[v], means[v][f"{by} {name}"]) for v in verdicts)]
        for name in sorted(counts, key=lambda name: -worst[name])
    ]
    return Table(f"Mean drift by {by}, the worst first", (by, "texts", *verdicts), rows)


def dims_table(report: Report) -> Table:
    """Mean drift at every Matryoshka width, which the bound does not ask about."""
    verdicts = report.named_verdicts
    rows = [[str(dim), *(percent(verdict.dims[dim]) for verdict in verdicts.values())] for dim in report.source.dims]
    return Table("Mean drift by Matryoshka dimension", ("dimensions", *verdicts), rows)


def precisions_table(report: Report) -> Table:
    """Drift and ranks of every file with its vectors as int8 and binary, which the bound does not ask about."""
    rows = [
        [
            name,
            precision,
            percent(rounded.mean),
            "" if rounded.top10_overlap is None else f"{rounded.top10_overlap:.1%}",
            *("" if ndcg is None else f"{ndcg:.3f}" for ndcg in (rounded.ndcg10, rounded.ndcg10_rescored)),
        ]
        for name, verdict in report.named_verdicts.items()
        for precision, rounded in (verdict.precisions or {}).items()
    ]
    header = ("file", "vectors", "mean drift", "top-10 kept", "nDCG@10", "rescored")
    return Table("Vectors in fewer bits, of every file", header, rows)


def memory_table(report: Report) -> Table:
    """Memory of every file, on a processor and on a GPU."""
    rows = []
    for name, performance in report.performances.items():
        memory = performance.memory
        figures = (memory.total_bytes, memory.weights_bytes, memory.vram_bytes, memory.host_bytes)
        rows.append([name, *map(format_size, figures)])
    header = ("file", "on a processor", "mapped from the file", "GPU memory", "process beside a GPU")
    return Table("Memory of every file", header, rows)


def devices_table(report: Report) -> Table:
    """Which files run on the devices of runtime/devices.toml, and how fast by estimate."""
    files, rows = report.performances, []
    for device in devices().values():
        memory = "" if device.memory_gb is None else f"{device.memory_gb:g} GB"
        rows.append([device.name, memory, *(device_cell(device, it.memory, it.work) for it in files.values())])
    return Table("Documents, tokens/s; the least time of a query", ("device", "memory", *files), rows)


def corpus_tables(report: Report) -> list[Table]:
    """Drift on the held-out texts of the corpus that files were made for, a table for each corpus."""
    drifts = {name: verdict.corpus for name, verdict in report.named_verdicts.items() if verdict.corpus}
    corpora = dict.fromkeys((corpus.n, corpus.name) for corpus in drifts.values())
    header = ("file", "mean drift", "95% interval", "p99", "worst", "worst text")
    return [
        Table(
            f"Drift on your corpus ({n} held-out texts of {corpus_name})",
            header,
            [[name, *corpus_cells(it)] for name, it in drifts.items() if (it.n, it.name) == (n, corpus_name)],
        )
        for n, corpus_name in corpora
    ]


def corpus_cells(drift: CorpusDrift) -> list[str]:
    """The measured cells of one file on a corpus."""
    interval = f"{percent(drift.lower)} to {percent(drift.upper)}"
    return [percent(drift.mean), interval, percent(drift.p99), percent(drift.worst), drift.worst_text]


def corpus_line(drift: CorpusDrift) -> str:
    """One file on a corpus, in one line."""
    mean, interval, *_ = corpus_cells(drift)
    return f"on your corpus: mean drift {mean} ({interval}) over {drift.n} held-out texts of {drift.name}"


def worst_texts(report: Report, name: str) -> Table:
    """The ids and drifts of the texts that drift most in one variant."""
    ranked = sorted(zip(report.variants[name].drifts, report.texts.ids, strict=True), key=lambda item: -item[0])
    return Table(f"Of {name}", ("text", "drift"), [[text, percent(drift)] for drift, text in ranked[:N_WORST]])


def verdict_cells(verdict: Verdict) -> list[str]:
    """The measured cells of one file, from "mean drift" to "verdict"."""
    return [
        percent(verdict.mean),
        f"{percent(verdict.lower)} to {percent(verdict.upper)}",
        percent(verdict.p99),
        percent(verdict.worst),
        "" if verdict.top10_overlap is None else f"{verdict.top10_overlap:.1%}",
        "" if verdict.ndcg10 is None else f"{verdict.ndcg10:.3f}",
        verdict.label,
    ]


def report_lines(report: Report) -> list[str]:
    """The whole report for a terminal."""
    lines = [text_table(COLUMNS, drift_rows(report)), ""]
    for table in corpus_tables(report):
        lines += [f"{table.caption}:", text_table(table.header, table.rows), ""]
    return [*lines, f"conversion: {conversion_sentence(report)}", *over_lines(report)]


def conversion_sentence(report: Report) -> str:
    """What gate 1 found, or why it was not run."""
    check = report.conversion
    if check is None or check.holds is None:
        return f"not checked ({check.why if check else 'no base file was made yet'})"
    found = f"cosine at least {check.min_cosine:.6f} (mean {check.mean_cosine:.6f}) over {check.n} texts"
    return f"{report.base} against {check.reference}: {found}; {MIN_COSINE} is required"


def over_lines(report: Report) -> list[str]:
    """One line for each variant over the bound, with what is over it."""
    lines = []
    for variant, verdict in report.variants.items():
        if not verdict.holds:
            more = len(verdict.over) - 5
            shown = "; ".join(verdict.over[:5]) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"{variant} is over the bound: {shown}")
    return lines


def _mean_cell(verdict: Verdict, mean: float) -> str:
    return percent(mean) + ("" if mean < verdict.max_drift else " OVER")


def _measured_files(report: Report) -> Iterator[tuple[str, int, list[str]]]:
    """Name, size in bytes and measured cells of every row; the base's are empty but for its nDCG."""
    verdicts = report.named_verdicts
    first: Measured | None = next(iter(verdicts.values()), None)
    ndcg = "" if first is None or first.ndcg10_reference is None else f"{first.ndcg10_reference:.3f}"
    yield report.base, report.files[report.base].size_bytes, ["reference", "", "", "", "", ndcg, ""]
    for name, verdict in verdicts.items():
        yield name, verdict.size_bytes, verdict_cells(verdict)
