"""What `f2gguf fit` found, for people."""

from __future__ import annotations

from collections.abc import Iterator

from f2gguf.evals.drift import percent
from f2gguf.quantize.fit.fit import Fit, Fits, vectors
from f2gguf.runtime.console import text_table
from f2gguf.runtime.files import format_size
from f2gguf.runtime.fit.devices import DEVICES_NOTE, rounded


def lines(found: Fits) -> Iterator[str]:
    """The table of files, where its figures come from, the corpus, and the file that was picked."""
    header = ["file", "size", "memory", "not mapped", "VRAM", "drift", "documents, tokens/s", "query, ms"]
    header += [f"{found.n_texts:,.0f} texts of {found.n_tokens:,.0f} tokens"]
    header += ["cost of a million texts"] if found.price is not None else []
    yield text_table(header, [_row(file, found) for file in found.files])
    yield ""
    yield from _notes(found)
    if found.price is not None:
        yield from _vectors(found)
    if found.chosen:
        yield f"{found.goal}: {found.chosen}"


def failing_line(found: Fits) -> str:
    """Which wishes no file grants, and what comes closest."""
    failed = ", ".join(f"{wish} ({_figure(wish, value)})" for wish, value in (found.failing or {}).items())
    return f"no file grants {found.goal}. The closest is {found.closest}, which fails {failed}."


def _row(file: Fit, found: Fits) -> list[str]:
    memory, speed, corpus = file.memory, file.speed, file.corpus
    vram = format_size(memory.vram_bytes) + ("" if file.fits is not False else " TOO MUCH")
    estimate = "about " if found.device else ""
    row = [
        file.name + ("" if file.is_made else " (planned)"),
        format_size(file.size_bytes),
        format_size(memory.total_bytes),
        format_size(memory.required_bytes),
        vram,
        str(file.quality or "not measured"),
        f"{estimate}{rounded(speed.tokens_per_s)}" if speed and speed.tokens_per_s else "not known",
        f"{'at least ' if found.device else ''}{rounded(speed.query_ms)}" if speed and speed.query_ms else "not known",
        f"{estimate}{_duration(corpus.hours)}" if corpus else "not known",
    ]
    if found.price is not None:
        row.append(f"{estimate}{corpus.cost:,.4g}" if corpus and corpus.cost is not None else "not known")
    return row


def _notes(found: Fits) -> Iterator[str]:
    requests = "one request" if found.parallel == 1 else f"{found.parallel} requests"
    limit = f"texts of up to {found.max_tokens:,} tokens, or what the model takes, and single queries"
    yield f"memory: of a process that embeds {limit}, {requests} at a time, on a CPU"
    if device := found.device:
        kind = "shared by processor and GPU" if device.shared else "of the GPU"
        memory = f"{device.memory_gb:g} GB {kind}" if device.memory_gb else "the memory of its machine"
        yield f"{device.name}: {memory}, {device.bandwidth_gb_s:,g} GB/s ({device.source})"
        yield DEVICES_NOTE
        if found.price is not None and found.price == device.price:
            yield f"cost: at {found.price:g} US dollars an hour ({device.price_source})"
    elif any(file.speed for file in found.files):
        yield "speed: sampled here on some layers of each file's shapes and types; texts are cut at what a model takes"
    if any(file.quality and not file.quality.is_measured for file in found.files):
        yield "drift: where nobody measured, the range of the models in quantize/fit/measured.toml, which is no promise"


def _vectors(found: Fits) -> Iterator[str]:
    """Storage of a million vectors at each width and precision, and what a GB of them costs to compute."""
    file = next((file for file in found.files if file.corpus), None)
    if file is None or file.corpus is None:
        return
    rows = [
        [str(row["width"]), row["precision"], f"{row['gb_of_million']:.3g} GB", f"{row['cost_of_gb']:,.3g}"]
        for row in vectors(file.dims, file.corpus.cost)
    ]
    yield ""
    yield text_table(["dimensions", "vectors", "a million", f"cost of a GB, {file.variant}"], rows)
    yield ""


def _duration(hours: float) -> str:
    for unit, size in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:,.1f} {unit}"
    return f"{3600 * hours:,.0f} s"


def _figure(wish: str, value: float | None) -> str:
    if value is None:
        return "not known, or too large"
    if wish.startswith("drift"):
        return percent(value)
    if wish.startswith(("size", "memory", "vram")):
        return format_size(value)
    return f"{value:,.4g}" + (" ms" if wish.startswith("latency") else "")
