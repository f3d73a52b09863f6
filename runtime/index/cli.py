"""The commands `f2gguf index` and `f2gguf search`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from f2gguf.runtime.cli import (
    COLUMN,
    DIMS,
    INPUT_FILE,
    JSON,
    MODEL,
    open_embedder,
    opening_options,
)
from f2gguf.runtime.console import progress_by_size, say, sizes_of
from f2gguf.runtime.errors import InputError, WrongUsage


@click.command()
@click.argument("docs", metavar="DOCS...", nargs=-1, required=True)
@MODEL
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the index. Its ending says the kind: none (exact), .faiss, .usearch, .db (sqlite-vec) or .chroma.",
)
@click.option("--prune", is_flag=True, help="Take out documents that are no longer in DOCS.")
@COLUMN
@DIMS
@opening_options
def index(
    docs: tuple[str, ...],
    model: str | None,
    output: Path,
    prune: bool,
    column: str | None,
    dims: int | None,
    **opening: Any,
) -> None:
    """Make an index of documents for `f2gguf search --index`, or bring it up to date.

    DOCS are files, folders and quoted globs, read as --input of `f2gguf embed` is. Only new and changed texts are
    embedded. Documents are told apart by their ids, or without ids by their texts. The same command goes on after a
    stop. For FAISS, usearch and Chroma, the recall against exact search is printed.
    """
    from f2gguf.runtime.index.update import update_index

    with open_embedder(model, **opening) as embedder:
        changes = update_index(docs, output, embedder, truncate_dim=dims, column=column, prune=prune)
    say(f"{changes.n_new:,} new, {changes.n_changed:,} changed, {changes.n_unchanged:,} unchanged documents")
    if changes.n_missing:
        done = "taken out" if prune else "kept (--prune takes them out)"
        say(f"{changes.n_missing:,} documents of the index are not in DOCS any more: {done}")
    click.echo(str(output))


@click.command()
@click.argument("query")
@MODEL
@click.option("--docs", metavar="FILE", help=f"{INPUT_FILE} of documents.")
@click.option(
    "--index", "index_path", type=click.Path(path_type=Path), help="Folder that `f2gguf index` made, instead of --docs."
)
@COLUMN
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="How many documents to show.")
@DIMS
@opening_options
@JSON
def search(
    query: str,
    model: str | None,
    docs: str | None,
    index_path: Path | None,
    column: str | None,
    top: int,
    dims: int | None,
    as_json: bool,
    **opening: Any,
) -> None:
    """Rank the documents of --docs, or of an --index, by their similarity to QUERY.

    An index is searched with the file that made it, if -m names no other. Any file must give the same vectors.
    """
    if (docs is None) == (index_path is None):
        raise WrongUsage("--docs and --index: give one of them.")
    if index_path is not None:
        if column is not None or dims is not None:
            raise WrongUsage(
                f"{'--column' if column else '--dims'} and --index: the index has texts and width already."
            )
        source = click.get_current_context().get_parameter_source("model")
        named = None if source is ParameterSource.ENVIRONMENT else model  # $F2GGUF_MODEL is for what names no file
        hits = _search_index(index_path, query, named, top, opening)
    else:
        hits = _search_file(str(docs), query, model, top, dims, column, opening)
    for rank, (score, row_id, text) in enumerate(hits, start=1):
        if as_json:
            hit = {"rank": rank, "score": round(score, 6), "id": row_id, "text": text}
            click.echo(json.dumps(hit, ensure_ascii=False))
            continue
        line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
        shown = line if len(line) <= 100 else line[:97] + "..."
        click.echo(f"{rank:>3}  {score:.3f}  {'-' if row_id is None else row_id}  {shown}")


def _search_file(
    docs: str,
    query: str,
    model: str | None,
    top: int,
    dims: int | None,
    column: str | None,
    opening: dict[str, Any],
) -> list[tuple[float, Any, str]]:
    from f2gguf.runtime.tables.texts import read_texts

    rows = read_texts(docs, column=column)
    if not rows.texts:
        raise WrongUsage(f"{docs}: holds no documents (--docs).")
    with (
        open_embedder(model, **opening) as embedder,
        progress_by_size("embed", sizes_of(rows.texts, embedder.max_seq_length)) as advance,
    ):
        prompt = embedder.header.document_prompt
        documents = embedder.encode(rows.texts, prompt=prompt, on_progress=advance, truncate_dim=dims)
        scores = embedder.similarity(embedder.encode_query([query], truncate_dim=dims), documents)[0]
    best = (-scores).argsort(kind="stable")[:top]
    return [(float(scores[i]), rows.ids[i], rows.texts[i]) for i in best]


def _search_index(
    folder: Path, query: str, model: str | None, top: int, opening: dict[str, Any]
) -> list[tuple[float, Any, str]]:
    from f2gguf.runtime.index.search import search_index
    from f2gguf.runtime.index.store import Store

    with contextlib.closing(Store(folder)) as store:
        if model is None and (made := Path(store.facts["model"])).is_absolute() and not made.exists():
            raise InputError(
                f"{folder}: the model that made it, {made}, is not there any more. Name it with -m. (`f2gguf index` "
                f"with -m and -o {folder} notes where it is now.)"
            )
        if model is None or store.facts["model"] in (model, str(Path(model).absolute())):  # opened as it was then
            opening = {**opening, "pooling": opening["pooling"] or store.facts["pooling"]}
            opening["add_eos"] = opening["add_eos"] or store.facts["add_eos"]
        with open_embedder(model or store.facts["model"], **opening) as embedder:
            return search_index(store, embedder, [query], top=top)[0]
