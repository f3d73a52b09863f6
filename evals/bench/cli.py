"""The command `f2gguf bench`."""

from __future__ import annotations

from pathlib import Path

import click
from f2gguf.runtime.cli import COLUMN, DEVICE, JSON, MODEL, POOLING, THREADS, require_model


@click.command()
@MODEL
@click.option("--work", default="documents,queries", show_default=True, help="Of documents, queries, input.")
@click.option(
    "--texts",
    "n_texts",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Documents; queries are 4 times as many.",
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Measured rounds.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the texts.")
@click.option("--input", "input_path", metavar="FILE", help="Documents of your own, as one more workload: input.")
@COLUMN
@click.option("--llama-server", metavar="BINARY", help="Measure llama.cpp's server as well.")
@click.option("--server-flags", default="", help="Further flags for it, in one string.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Measure sentence-transformers on this as well.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .png, .svg or .json file.")
@click.option("--force", is_flag=True, help="Overwrite the output file.")
@POOLING
@DEVICE
@THREADS
@JSON
def bench(
    model: str | None,
    work: str,
    n_texts: int,
    rounds: int,
    seed: int,
    input_path: str | None,
    column: str,
    llama_server: str | None,
    server_flags: str,
    checkpoint: Path | None,
    output: Path | None,
    force: bool,
    pooling: str | None,
    device: str,
    n_threads: int | None,
    as_json: bool,
) -> None:
    """Measure speed and memory against llama-cpp-python, llama-server and sentence-transformers.

    All sides embed the same texts in turn, each in a process of its own: documents of 8 to 256 tokens, and queries of
    4 to 16 behind the model's query prompt. --llama-server and --checkpoint add sides to f2gguf and Llama.embed.
    """
    from f2gguf.evals.bench.report import json_text, report_lines, require_output, write_report
    from f2gguf.evals.bench.run import run_bench, settle_sides
    from f2gguf.evals.bench.texts import make_workloads, require_work
    from f2gguf.runtime.hub.models import open_header

    names = require_work(work, has_input=input_path is not None)
    if output:
        require_output(output, force=force)
    header = open_header(require_model(model))
    settings = settle_sides(
        header,
        pooling=pooling,
        device=device,
        n_threads=n_threads,
        checkpoint=checkpoint,
        llama_server=llama_server,
        server_flags=server_flags,
    )
    workloads = make_workloads(header, names, n_texts=n_texts, seed=seed, input_path=input_path, column=column)
    report = run_bench(header, settings, workloads, rounds=rounds)
    click.echo(json_text(report) if as_json else "\n".join(report_lines(report)))
    if output:
        write_report(output, report)
        click.echo(str(output), err=as_json)
