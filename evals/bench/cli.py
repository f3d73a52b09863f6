"""The command `f2gguf bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from f2gguf.runtime.cli import COLUMN, DEVICE, FORCE, JSON, MODEL, POOLING, THREADS, require_model

_COUNT = click.IntRange(1)
_PATH = click.Path(path_type=Path)


@click.command()
@MODEL
@click.option("--work", default="documents,queries", show_default=True, help="Workloads: documents, queries, input.")
@click.option(
    "--texts",
    "n_texts",
    default=64,
    show_default=True,
    type=_COUNT,
    help="Number of documents; 4 times as many queries.",
)
@click.option("--rounds", default=5, show_default=True, type=_COUNT, help="Number of measured rounds.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed that picks the texts.")
@click.option("--input", "input_path", metavar="FILE", help="Your own documents, as one more workload: input.")
@COLUMN
@click.option("--llama-server", metavar="BINARY", help="Measure llama.cpp's server as well.")
@click.option("--server-flags", default="", help="Further flags for llama-server, in one string.")
@click.option("--checkpoint", type=_PATH, help="Measure sentence-transformers on this folder as well.")
@click.option(
    "--url", "urls", metavar="URL", multiple=True, help="Measure an OpenAI-compatible API as well; repeatable."
)
@click.option("--url-model", "url_models", metavar="NAME", multiple=True, help="Model that a URL is asked for.")
@click.option(
    "--api-key-env", "api_key_envs", metavar="NAME", multiple=True, help="Environment variable with the key of a URL."
)
@click.option("-o", "--output", type=_PATH, help="A .png, .svg or .json file to write.")
@FORCE
@POOLING
@DEVICE
@THREADS
@JSON
def bench(model: str | None, rounds: int, output: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Measure speed and memory against llama-cpp-python, llama-server, sentence-transformers and any URL.

    Each side runs in a process of its own, and all embed the same texts in turn: documents of 8 to 256 tokens, and
    queries of 4 to 16 behind the model's query prompt. --llama-server, --checkpoint and --url add sides to f2gguf and
    Llama.embed.
    """
    from f2gguf.evals.bench.report import json_text, report_lines, require_output, write_report
    from f2gguf.evals.bench.run import choose_sides, run_bench
    from f2gguf.evals.bench.texts import make_workloads, require_work
    from f2gguf.runtime.hub.models import open_header

    names = require_work(options.pop("work"), has_input=options["input_path"] is not None)
    if output:
        require_output(output, force=force)
    texts = {name: options.pop(name) for name in ("n_texts", "seed", "input_path", "column")}
    header = open_header(require_model(model))
    sides = choose_sides(header, **options)
    report = run_bench(header, sides, make_workloads(header, names, **texts), rounds=rounds)
    click.echo(json_text(report) if as_json else "\n".join(report_lines(report)))
    if output:
        write_report(output, report)
        click.echo(str(output), err=as_json)
