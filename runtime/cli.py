"""The command `f2gguf`: embed, pull, list, inspect, selftest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from f2gguf.runtime.console import Commands, progress, progress_by_size, say, sizes_of, text_table
from f2gguf.runtime.errors import InputError, NoVector, WrongUsage

MODEL = click.option(
    "-m",
    "--model",
    envvar="F2GGUF_MODEL",
    metavar="MODEL",
    help="A .gguf file, or org/name[:VARIANT][@revision] on the Hub [default: $F2GGUF_MODEL].",
)
FILE = click.argument("model", envvar="F2GGUF_MODEL")
DEVICE = click.option("--device", default="auto", show_default=True, help="Where to compute: auto, cpu, metal or cuda.")
GPU_LAYERS = click.option(
    "--gpu-layers", "n_gpu_layers", type=click.IntRange(-1), default=-1, help="Layers to put on the GPU [default: all]."
)
THREADS = click.option(
    "--threads", "n_threads", type=click.IntRange(1), help="Number of threads [default: one for each physical core]."
)
POOLING = click.option("--pooling", help="Pooling of a file whose header does not state it: last, mean or cls.")
ADD_EOS = click.option(
    "--add-eos", is_flag=True, help="Close every text, where the header of somebody else's file does not say so."
)
MAX_TOKENS = click.option("--max-tokens", type=int, help="Cut texts to this many tokens [default: the model's limit].")
INPUT_FILE = "A .txt, .jsonl, .json, .csv, .tsv (packed as .gz, .bz2, .xz or .zst too) or .parquet file"
DIMS = click.option("--dims", type=int, help="Keep this many leading dimensions (Matryoshka).")
COLUMN = click.option(
    "--column", help="Key or column that holds the text [default: text, behind the row's title where it has one]."
)
FORCE = click.option("--force", is_flag=True, help="Overwrite the output file if it exists.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def opening_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a file is opened."""
    for option in (THREADS, GPU_LAYERS, DEVICE, ADD_EOS, POOLING, MAX_TOKENS):  # click lists the last one first
        command = option(command)
    return command


@click.group(cls=Commands)
@click.version_option(package_name="f2gguf")
def f2gguf() -> None:
    """Embed texts with GGUF files whose quality has been measured."""


@f2gguf.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@MODEL
@click.option(
    "--input",
    "inputs",
    metavar="PATH",
    multiple=True,
    help=f"{INPUT_FILE}, or - for lines on stdin. With a folder as -o also a folder or a quoted glob; repeatable.",
)
@COLUMN
@click.option("--query", is_flag=True, help="Put the model's query prompt before every text.")
@click.option("--prompt", help="Put this text before every text.")
@click.option("--prompt-name", help="Put this prompt of the model before every text.")
@click.option(
    "-o",
    "--output",
    help="A .npy, .jsonl or .safetensors file to write, or a folder of Parquet shards (without an ending, or NAME/).",
)
@click.option("--keep-text", is_flag=True, help="Write the texts into the Parquet shards too.")
@click.option("--shard-rows", type=click.IntRange(1), help="Rows of a Parquet shard [default: by the model's size].")
@click.option(
    "--processes",
    "n_processes",
    type=click.IntRange(1),
    help="Compute shards in as many processes, which share the threads [default: one a thread for small models].",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Compute shards on a Ray cluster: the running one, the one at ADDRESS, or 'local' for this machine.",
)
@FORCE
@DIMS
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Type of the vectors: float32, float16, int8, uint8, binary or ubinary.",
)
@click.option("--no-normalize", is_flag=True, help="Keep the vectors' lengths.")
@MAX_TOKENS
@POOLING
@ADD_EOS
@click.option(
    "--deterministic", is_flag=True, help="Give a text the same bytes whatever else is in the batch (slower)."
)
@DEVICE
@GPU_LAYERS
@THREADS
def embed(
    texts: tuple[str, ...],
    model: str | None,
    inputs: tuple[str, ...],
    column: str | None,
    query: bool,
    prompt: str | None,
    prompt_name: str | None,
    output: str | None,
    force: bool,
    dims: int | None,
    dtype: str,
    no_normalize: bool,
    **options: Any,
) -> None:
    """Turn texts into vectors: arguments, lines on stdin, or --input.

    Without -o, one JSON object for each text is printed: its id, its number of tokens, whether it was cut, its
    embedding. Texts are documents unless --query says otherwise. If texts have no finite vector, an error names them,
    and the vectors of all others are written.

    A folder as -o takes a corpus of any size: the same command goes on after a stop, and ends in the same bytes. Rows
    that cannot be embedded are written to _rejects-*.jsonl there, with the reason.
    """
    from f2gguf.runtime.tables.vectors import require_output

    flags = {"--query": query or None, "--prompt": prompt, "--prompt-name": prompt_name}
    chosen = [flag for flag, value in flags.items() if value is not None]
    if len(chosen) > 1:
        raise WrongUsage(f"{' and '.join(chosen)}: choose one.")
    _warn_of_backslash(prompt)
    shards = {name: options.pop(name) for name in ("keep_text", "shard_rows", "n_processes", "ray")}
    vectors = {"truncate_dim": dims, "precision": dtype, "normalize": False if no_normalize else None}
    prompts = {"prompt": prompt, "prompt_name": "query" if query else prompt_name} if chosen else None
    if output is not None and _is_folder(output):
        if texts or not inputs:
            raise WrongUsage(f"-o {output}: a folder takes the texts of files. Name them with --input.")
        _embed_corpus(inputs, Path(output), model, prompts, options, vectors, column=column, force=force, **shards)
    else:
        _require_one_file(inputs, shards)
        path = Path(output) if output is not None else None
        if path:
            require_output(path, force=force)
        rows = _texts(texts, inputs[0] if inputs else None, column)
        _embed_file(rows, path, model, prompts, options, vectors)


def _is_folder(output: str) -> bool:
    """Whether -o names a folder of shards: by a slash at its end, no ending, or because it is one."""
    from f2gguf.runtime.tables.vectors import WRITERS

    suffix = Path(output).suffix
    return output.endswith("/") or not suffix or (suffix not in WRITERS and Path(output).is_dir())


def _require_one_file(inputs: tuple[str, ...], shards: dict[str, Any]) -> None:
    """Refuse what only a folder of shards can take."""
    from f2gguf.runtime.corpus.inputs import is_plain_file

    if len(inputs) > 1 or not all(map(is_plain_file, inputs)):
        raise WrongUsage(f"--input {inputs[0]}: several files become a folder of Parquet shards. Name it: -o FOLDER/.")
    context = click.get_current_context()
    for option in context.command.params:
        if option.name in shards and context.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
            raise WrongUsage(f"{option.opts[0]}: is for a folder of Parquet shards. Name it: -o FOLDER/.")


def _embed_corpus(
    inputs: tuple[str, ...],
    folder: Path,
    model: str | None,
    prompts: dict[str, Any] | None,
    opening: dict[str, Any],
    vectors: dict[str, Any],
    **options: Any,
) -> None:
    from f2gguf.runtime.corpus.job import embed_corpus

    with open_embedder(model, **opening) as embedder:
        prompts = prompts or {"prompt": embedder.header.document_prompt}
        totals = embed_corpus(inputs, folder, embedder, **prompts, **vectors, **options)
    say(f"{totals.n_texts:,} vectors of {totals.n_tokens:,} tokens in {totals.n_shards:,} shards")
    if totals.n_truncated:
        say(f"{totals.n_truncated:,} texts are longer than the model's limit and were cut (column truncated)")
    if totals.n_repeated_ids:
        say(f"{totals.n_repeated_ids:,} rows have an id that an earlier row has")
    if totals.n_rejects:
        say(f"{totals.n_rejects:,} rows have no vector: {folder}/_rejects-*.jsonl says which, and why")
    click.echo(str(folder))
    if totals.broken:
        raise InputError(f"{', '.join(totals.broken)}: could not be read to the end. What was read has vectors.")


def _embed_file(
    rows: Any,
    output: Path | None,
    model: str | None,
    prompts: dict[str, Any] | None,
    opening: dict[str, Any],
    vectors: dict[str, Any],
) -> None:
    from f2gguf.runtime.tables.vectors import WRITERS, json_rows

    failure = None
    with (
        open_embedder(model, **opening) as embedder,
        progress_by_size("embed", sizes_of(rows.texts, embedder.max_seq_length)) as advance,
    ):
        prompts = prompts or {"prompt": embedder.header.document_prompt}
        try:
            embeddings = embedder.embed(rows.texts, **prompts, **vectors, on_progress=advance)
        except NoVector as error:
            failure, embeddings, rows = error, error.embeddings, rows.without(error.indices)
    for line in WRITERS[output.suffix](output, rows, embeddings) if output else json_rows(rows, embeddings):
        click.echo(line)
    if failure:
        raise failure


@f2gguf.command()
@click.argument("model")
def pull(model: str) -> None:
    """Download a .gguf file from the Hugging Face Hub, verified.

    MODEL is org/name[:VARIANT][@revision]. VARIANT is the file's name, or how it ends (Q8_0 finds NAME-Q8_0.gguf).
    Without VARIANT, pull takes the first of Q4_K_M, Q8_0, Q4_0 that holds its bound by the repository's drift.json,
    else F16. If nobody measured, it prefers Q8_0 to F16. The bytes must have the hash that the Hub and the repository's
    SHA256SUMS state. Later, -m MODEL uses the file without asking the Hub. Another pull updates it.
    """
    from f2gguf.runtime.files import format_size
    from f2gguf.runtime.gguf.describe import describe_drift
    from f2gguf.runtime.gguf.header import read_header
    from f2gguf.runtime.hub.models import fetch_file, find_file, parse_model

    reference = parse_model(model)
    if reference is None:
        raise WrongUsage(f"{model}: is no repository on the Hub. Write org/name[:VARIANT][@revision].")
    listing, name = find_file(reference)
    size = format_size(listing.files[name].size_bytes)
    say(f"{listing}: {name}, {size}")
    header = read_header(fetch_file(listing, name))
    click.echo(f"{header.variant}, {size}, drift: {describe_drift(header)}")
    click.echo(str(header.path))


@f2gguf.command("list")
@click.argument(
    "folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@JSON
def list_(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show the models on this disk, and their measured drift.

    The models are in the Hub's cache, and in every FOLDER [default: dist]. Pass the first column to -m.
    """
    from f2gguf.runtime.hub.inventory import COLUMNS, as_dict, find_models, table_row

    files = find_models(folders or [path for path in [Path("dist")] if path.is_dir()])
    models = [file for file in files if file.is_embedding_model]
    if as_json:
        click.echo(json.dumps([as_dict(model) for model in models], indent=2, ensure_ascii=False))
    elif models:
        click.echo(text_table(COLUMNS, [table_row(model) for model in models]))
    for model in models:
        if model.error:
            say(f"damaged: {model.error}")
    if n_others := len(files) - len(models):
        say(f"left out: {n_others} .gguf files that are no embedding models")
    if not files:
        say("no .gguf models here. Fetch one with `f2gguf pull org/name`, or make one with `quantize all f2llm-nano`.")


@f2gguf.command()
@FILE
@click.option("--check", is_flag=True, help="Say what is missing or suspicious, and what mends it.")
@POOLING
@ADD_EOS
@JSON
def inspect(model: str, check: bool, pooling: str | None, add_eos: bool, as_json: bool) -> None:
    """Print the header of a .gguf file: what it is, how it was made, how far it drifts.

    --check looks for what makes the vectors of other people's files wrong: errors (the file cannot be used), warnings
    (its vectors may be wrong) and notes. The exit code is 1 if anything is worse than a note. --pooling and --add-eos
    are taken as if the header stated them.
    """
    from f2gguf.runtime.gguf.describe import as_dict, describe
    from f2gguf.runtime.gguf.doctor import examine, is_sound
    from f2gguf.runtime.hub.models import open_header

    header = open_header(model)
    header = header.closing() if add_eos else header
    if check:
        found = examine(header, pooling)
        outcome = {"path": str(header.path), "holds": is_sound(found), "findings": [one.as_dict() for one in found]}
        lines = [f"{one.severity:<7}  {one.check}: {one}" for one in found] or [
            f"{header.path}: nothing is missing or suspicious"
        ]
        click.echo(json.dumps(outcome, indent=2, ensure_ascii=False) if as_json else "\n".join(lines))
        click.get_current_context().exit(0 if is_sound(found) else 1)
    from f2gguf.runtime.llama.kernels.choice import describe_kernels

    kernels = describe_kernels(header)
    words = {**as_dict(header), "kernels": kernels} if as_json else None
    click.echo(json.dumps(words, indent=2, ensure_ascii=False) if words else describe(header, kernels=kernels))


@f2gguf.command("repair-header")
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .gguf file to write.")
@click.option("--pooling", help="How a text's vector is made: last, mean or cls.")
@click.option("--add-eos/--no-add-eos", default=None, help="Whether every text is closed with the EOS token.")
@click.option("--add-bos/--no-add-bos", default=None, help="Whether every text is opened with the BOS token.")
@click.option("--eos-token", metavar="TOKEN", help="The EOS token, as the vocabulary spells it.")
@click.option("--causal/--no-causal", default=None, help="Whether tokens see only those before them.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer of llama.cpp, such as qwen2.")
@click.option("--lowercase/--no-lowercase", default=None, help="Whether WordPiece lower-cases texts.")
@click.option("--prompt", "prompts", metavar="NAME=TEXT", multiple=True, help="A prompt and its name; repeatable.")
@click.option("--max-tokens", type=int, help="Longest input in tokens, special tokens included.")
@click.option("--dims", metavar="N,N", help="Widths that the model was trained for (Matryoshka).")
@click.option("--normalize/--no-normalize", default=None, help="Whether vectors have the length 1.")
@FORCE
def repair_header_(
    source: Path, output: Path, force: bool, prompts: tuple[str, ...], dims: str | None, **stated: Any
) -> None:
    """Write a copy of FILE with a mended header; its tensors stay as they are, byte for byte.

    For files that somebody else made, of which `f2gguf inspect FILE --check` says what is missing. The copy states what
    was changed. Where other vectors come of it, golden vectors and measured drift are left out.
    """
    from f2gguf.runtime.mend import Changes, parse_dims, parse_prompts, repair_header

    changes = Changes(prompts=parse_prompts(prompts), dims=parse_dims(dims), **stated)
    for prompt in prompts:
        _warn_of_backslash(prompt)
    with progress(f"copy {source.name}", source.stat().st_size if source.is_file() else 1) as advance:
        mended = repair_header(source, output, changes, force=force, on_progress=advance)
    for line in mended.changes:
        say(line)
    if mended.dropped:
        say(f"left out, because it was measured with other vectors: {', '.join(mended.dropped)}")
    for finding in mended.findings:
        if finding.severity != "note":
            say(f"{finding.severity}: {finding}")
    click.echo(str(mended.path))


@f2gguf.command()
@FILE
@ADD_EOS
@DEVICE
@GPU_LAYERS
@THREADS
@JSON
def selftest(model: str, as_json: bool, **opening: Any) -> None:
    """Embed a file's golden texts on this device, and compare the vectors with those that its maker measured.

    Says what is wrong: the tokenizer, the closing token, a prompt, the pooling, or the vectors of this device. The exit
    code is then 1.
    """
    with open_embedder(model, **opening) as embedder:
        outcome = embedder.selftest()
    click.echo(json.dumps(outcome.as_dict(), indent=2) if as_json else "\n".join(outcome.lines()))
    outcome.require_sound()


def _warn_of_backslash(prompt: str | None) -> None:
    """Say so where a shell passed on what its user took for a new line: such vectors are others (f2llm-nano: 0.978)."""
    if prompt and r"\n" in prompt:
        words = r"has a backslash and an n, and no new line. In bash, write $'...\n...' for one."
        say(f"warning: --prompt {prompt!r} {words}")


def _texts(arguments: tuple[str, ...], input_path: str | None, column: str | None) -> Any:
    from f2gguf.runtime.tables.texts import Row, Texts, read_texts

    if arguments and input_path is not None:
        raise WrongUsage("TEXT and --input: give one of them.")
    if arguments:
        return Texts.of([Row(text) for text in arguments])
    next_step = "Give TEXT arguments, --input FILE, or lines on stdin."
    if input_path is None and (sys.stdin is None or sys.stdin.isatty()):
        raise WrongUsage(f"no text. {next_step}")
    rows = read_texts("-" if input_path is None else input_path, column=column)
    if not rows.texts:
        raise WrongUsage(f"{input_path or 'stdin'}: holds no text. {next_step}")
    return rows


def open_embedder(model: str | None, **options: Any) -> Any:
    """The model that -m names. Says on a terminal how it computes."""
    from f2gguf.runtime.embedder import Embedder

    embedder = Embedder(require_model(model), **options)
    if sys.stderr is not None and sys.stderr.isatty():
        say(embedder.description)
    return embedder


def require_model(model: str | None) -> str:
    if not model:
        raise WrongUsage("no model: pass -m MODEL, or set F2GGUF_MODEL. Make one with `quantize all f2llm-nano`.")
    return model
