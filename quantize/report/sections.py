"""What the card and the page both say of a report, as a list of blocks; each of them renders the blocks its own way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from f2gguf.evals.neighbours import TOP_K
from f2gguf.evals.precisions import RESCORED
from f2gguf.quantize.repair.corpus import MAX_CHARS
from f2gguf.quantize.report.report import Measured, Report
from f2gguf.quantize.report.tables import (
    Table,
    conversion_sentence,
    corpus_tables,
    devices_table,
    dims_table,
    files_table,
    groups_table,
    memory_table,
    over_lines,
    precisions_table,
    worst_texts,
)
from f2gguf.runtime.files import format_bound
from f2gguf.runtime.fit.devices import DEVICES_NOTE
from f2gguf.runtime.fit.memory import MAX_TOKENS

PICTURE = "Drift of every text, size against drift, and mean drift by dimension and language"
_CORPUS_NOTE = (
    "Other texts of the corpus were used to choose how the files are made. The held-out ones were only measured. They "
    f"are a uniform sample, each cut at {MAX_CHARS:,} characters. The bound is about the evaluation texts."
)
_PRECISIONS_NOTE = (
    "Weights and vectors rounded together, against float32 vectors of the base file; queries and documents are both "
    "rounded. Binary vectors have a bit for each dimension, so that their drift is high, and ranks tell more. "
    f'"Rescored" ranks the best {RESCORED * TOP_K} documents again, by the query in float32.'
)


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Bullets:
    title: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """The picture of the report, which needs matplotlib."""


@dataclass(frozen=True)
class Details:
    """What is shown only to those who ask for it."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Bullets | Picture | Details | Table


def sections(report: Report) -> Iterator[Block]:
    """Everything measured, in reading order."""
    yield Heading("Files")
    yield _files(report)
    if note := _files_note(report):
        yield Paragraph(note)
    yield Paragraph(_measurement(report))
    yield from (Paragraph(f"{line}.", is_warning=True) for line in over_lines(report))
    if on_corpus := corpus_tables(report):
        yield from on_corpus
        yield Paragraph(_CORPUS_NOTE)
    if report.performances:
        yield Heading("What fits where")
        yield memory_table(report)
        yield Paragraph(_memory_note(report))
        yield Details("On other devices, estimated", [devices_table(report), Paragraph(f"{DEVICES_NOTE}.")])
    if report.variants:
        yield Picture()
        yield Heading("Where it drifts")
        if len(report.source.dims) > 1:
            yield dims_table(report)
        if (precisions := precisions_table(report)).rows:
            yield precisions
            yield Paragraph(_PRECISIONS_NOTE)
        yield groups_table(report, "kind")
        yield Details("Mean drift by language", [groups_table(report, "language")])
        yield Details("The texts that drift most", [worst_texts(report, name) for name in report.variants])
        yield Heading("How they were made")
        for name, verdict in report.variants.items():
            yield from _recipe(name, verdict)
    yield Heading("Where it comes from")
    yield Table("The model", ("", ""), _properties(report))
    yield Table("Source, texts and versions", ("", ""), _provenance(report))
    yield Table("Checksums", ("file", "SHA-256"), [[file.file, file.sha256] for file in report.files.values()])


def _files(report: Report) -> Table:
    """The table of sizes and drifts, with the speed where it was measured, and the beginning of each hash."""
    table = files_table(report)
    rows = []
    for row in table.rows:
        file, speed = report.files.get(row[0]), report.performances.get(row[0])  # llama.cpp's own recipes have neither
        texts_per_s = f"{speed.texts_per_s:,.1f}" if speed and speed.texts_per_s else ""
        rows.append([*row, texts_per_s, file.sha256[:12] if file else ""])
    return Table(table.caption, (*table.header, "texts/s", "SHA-256"), rows)


def _files_note(report: Report) -> str:
    notes = []
    if report.stock:
        notes.append('"stock" is what llama.cpp\'s own recipe for the variant gives, measured on the same texts.')
    if machines := dict.fromkeys(it.machine for it in report.performances.values() if it.machine):
        notes.append(f"Texts/s: the evaluation texts, once, when the file was measured, on {' or '.join(machines)}.")
    return " ".join(notes)


def _memory_note(report: Report) -> str:
    cache, longest = report.source.cache_bytes, min(MAX_TOKENS, report.source.max_tokens)
    more = f" Every 1,000 tokens more take {cache / 1000:.1f} MB (keys and values), and what passes need."
    return (
        f"A process that embeds texts of up to {longest:,} tokens and single queries, one request at a time. What is "
        "mapped from the file can be dropped and read again; the rest cannot. `f2gguf fit` says the same of other "
        f"lengths and numbers of requests.{more if cache else ''}"
    )


def _measurement(report: Report) -> str:
    n_stock = report.conversion.n_stock_tokenizer_differs if report.conversion else 0
    stock = (
        f" Stock llama.cpp leaves out the checkpoint's own text normaliser and splits {n_stock} of the test strings "
        "(such as decomposed Unicode) differently; f2gguf runs it."
    )
    return (
        f"Drift is 1 - cosine to the {report.base} file's vector, over {report.texts.n} texts{_quick(report)} in "
        f"the model's languages ({_languages(report)}): queries with the prompt, documents, code, "
        "long texts, edge cases. The bound holds when the upper end of the mean's 95% interval, and the mean of every "
        f"language and kind, are under {format_bound(report.max_drift)}. Conversion: {conversion_sentence(report)}."
        f"{stock if n_stock else ''}"
    )


def _languages(report: Report) -> str:
    """Those of the texts, and those of the model that no text is in."""
    judged = {name for verdict in report.variants.values() for name in verdict.languages}
    judged |= {name.partition("-")[0] for name in judged}
    stated = report.texts.languages
    known = judged | {"multilingual"} if judged else set(stated)
    missing = [name for name in report.source.languages if name not in known]
    measured = ", ".join(name for name in stated if name not in missing)
    return measured + f"; no text is in {', '.join(missing)}" * bool(missing)


def _quick(report: Report) -> str:
    return " (about a quarter of f2gguf's evaluation texts: `--quick`)" if report.texts.quick else ""


def _recipe(name: str, verdict: Measured) -> Iterator[Block]:
    yield Bullets(f"{name}: {verdict.recipe.kind}", verdict.recipe_lines)
    details = [f"{tensor}: {kind}" for tensor, kind in verdict.recipe.types.items()]
    details += [
        f"{place}: exponents {activation} of activations, {weight} of weights"
        for place, (activation, weight) in verdict.recipe.exponents.items()
    ]
    if details:
        yield Details(f"{name}: every tensor whose type differs, and every re-scaling", [Bullets("", details)])


def _properties(report: Report) -> list[list[str]]:
    source = report.source
    return [
        ["Architecture", source.architecture],
        ["Parameters", f"{source.n_parameters:,}"],
        ["Dimensions", ", ".join(map(str, source.dims))],
        ["Pooling", source.pooling],
        ["Longest input", f"{source.max_tokens:,} tokens"],
        ["Closing token", source.eos_token or "none"],
        ["Licence", source.license or "see the base model"],
    ]


def _provenance(report: Report) -> list[list[str]]:
    """What the files' bytes and figures follow from."""
    source, texts = report.source, report.texts
    rows = [
        ["Source", source.repo or "a checkpoint folder"],
        ["Commit", source.revision or "not stated"],
        ["SHA-256 of the checkpoint's files", source.sha256],
        ["Evaluation texts", f"{texts.n} of {texts.n_conversion}, SHA-256 {texts.sha256}"],
    ]
    for name, verdict in report.variants.items():
        recipe = verdict.recipe
        if recipe.calibration_sha256:
            words = f"{recipe.n_calibration_texts} texts, SHA-256 {recipe.calibration_sha256}"
            rows.append([f"{name}'s calibration", words])
        if recipe.imatrix_sha256:
            rows.append([f"{name}'s importance matrix", f"SHA-256 {recipe.imatrix_sha256}"])
    return rows + [[f"Made with {name}", number] for name, number in report.made_with.items()]
