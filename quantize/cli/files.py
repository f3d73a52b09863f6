"""Commands that take one file apart from its release: `quantize imatrix`, `variant` and `verify`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from f2gguf.quantize.cli import options as shared
from f2gguf.runtime.cli import COLUMN, INPUT_FILE
from f2gguf.runtime.console import progress, text_table
from f2gguf.runtime.errors import OverBound, WrongUsage

IMATRIX = "imatrix.gguf"  # in the folder of a command's work


@click.command()
@click.argument("source", type=shared.PATH)
@click.option("-o", "--output", type=shared.PATH, help="File to write [default: beside SOURCE].")
@shared.FORCE
@shared.calibration_options
@shared.DEVICE
def imatrix(source: Path, output: Path | None, force: bool, device: str, **options: Any) -> None:
    """Write the importance matrix of the F16 file SOURCE, as llama-quantize reads it."""
    from f2gguf.quantize.repair.calibration import load_calibration
    from f2gguf.quantize.repair.study import study_source
    from f2gguf.runtime.files import require_absent
    from f2gguf.runtime.gguf.header import read_header

    languages = read_header(source).languages
    path = output or source.with_name(_without_type(source) + ".imatrix.gguf")
    require_absent(path, force=force)
    with _work_folder(path) as work:
        texts = load_calibration(options["calibration"], languages, options["column"]).texts
        study_source(source, imatrix_path=path, work=work, texts=texts, device=device)
    click.echo(str(path))


@click.command()
@click.argument("source", type=shared.PATH)
@click.argument("name", metavar="VARIANT")
@click.option("-o", "--output", type=shared.PATH, help="File to write [default: beside SOURCE].")
@shared.FORCE
@click.option("--recipe", type=shared.PATH, help="Make the file by the recipe of this .gguf or .json file.")
@shared.MAX_DRIFT
@shared.MAX_SIZE
@shared.STOCK
@shared.calibration_options
@shared.IMATRIX
@shared.COMPENSATE
@shared.TUNE
@shared.DEVICE
@shared.JSON
def variant(source: Path, name: str, output: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Make one VARIANT of the F16 file SOURCE, held to the bound, and measured.

    There are Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0, IQ4_NL and IQ4_XS.
    """
    from f2gguf.quantize.repair.plan import require_variant
    from f2gguf.quantize.repair.tensors import Weights
    from f2gguf.runtime.files import require_absent, writing

    shared.refuse_together(options, "recipe", "stock", "max_size")
    if options["recipe"] and not (options["compensate"] and options["tune"] is None):
        flag = "--no-compensate" if not options["compensate"] else "--tune" if options["tune"] else "--no-tune"
        raise WrongUsage(f"--recipe and {flag}: choose one. The recipe says how codes and scales are chosen.")
    shared.require_tune(options)
    shared.refuse_together(options, "stock", "max_size", "calibration", "column", "imatrix")
    name = require_variant(name)
    weights = Weights(source)  # a missing file is reported before its name is taken apart
    path = output or source.with_name(_without_type(source) + f"-{name}.gguf")
    require_absent(path, force=force)
    imatrix_path = path.with_suffix(".imatrix.gguf")
    needs_search = not (options["recipe"] or options["stock"])
    if needs_search:
        require_absent(imatrix_path, force=force or options["imatrix"] == imatrix_path)
    with _work_folder(path) as work, writing(path) as part:
        make = _searched if needs_search else _by_recipe
        made = make(weights, name, part, work, **options)
        if needs_search:  # only now, so that a run that was stopped can go on
            (work / IMATRIX).replace(imatrix_path)
    _show_verdict(path, made.verdict, as_json, made.corpus)
    for written in [imatrix_path, path] if needs_search else [path]:
        click.echo(str(written), err=as_json)
    _require_bound(path, made.verdict)


@click.command()
@click.argument("candidate", type=shared.PATH)
@click.option(
    "--against", required=True, metavar="FILE|MODEL|URL", help="What to compare with: the four kinds named above."
)
@click.option("--corpus", metavar="FILE", help=f"Measure on your own texts. {INPUT_FILE}.")
@COLUMN
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(-1, 1),
    multiple=True,
    callback=shared.require_number,
    help="Similarity from which you count a pair; repeatable [default: quantiles of the scores].",
)
@click.option("--endpoint-model", metavar="NAME", help="Model that a URL is asked for.")
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the key of a URL.")
@shared.MAX_DRIFT
@shared.checkpoint_options
@shared.DEVICE
@shared.LOCK
@shared.JSON
def verify(
    candidate: Path,
    against: str,
    corpus: str | None,
    column: str,
    thresholds: tuple[float, ...],
    endpoint_model: str | None,
    api_key_env: str | None,
    max_drift: float,
    device: str,
    lock: Path | None,
    as_json: bool,
    **stated: Any,
) -> None:
    """Measure the drift of a file against a baseline.

    --against takes another GGUF file; a MODEL, which transformers runs in float32, layer by layer where it does not fit
    the memory; a .npy or .safetensors file of vectors in the order of the texts; or the URL of an OpenAI-compatible
    endpoint. --corpus measures on texts of your own, and how far their similarity scores and thresholds move; rows with
    "kind": "query" are queries. Without --api-key-env, $OPENAI_API_KEY is used, for OpenAI's own host alone.
    """
    from f2gguf.evals.against import open_baseline
    from f2gguf.evals.corpus import corpus_lines, judge_corpus, read_corpus
    from f2gguf.evals.drift import json_text, judge
    from f2gguf.evals.texts import claimed_texts, embed_texts, load_texts
    from f2gguf.runtime import Embedder
    from f2gguf.runtime.gguf.header import read_header

    if thresholds and not corpus:
        raise WrongUsage("--threshold: is measured on texts of your own. Name them with --corpus.")
    header = read_header(candidate)
    header.require_pooling()
    texts = claimed_texts(load_texts(), header.languages)
    if corpus:
        texts = read_corpus(corpus, column=column)
    baseline = open_baseline(
        against,
        texts,
        header,
        run_checkpoint=lambda model: _checkpoint_baseline(model, texts, lock, **stated),
        device=device,
        endpoint_model=endpoint_model,
        api_key_env=api_key_env,
    )
    with Embedder(candidate, device=device) as model:
        vectors = embed_texts(model, texts, f"measure {candidate.name}")
    if corpus:
        on_corpus = judge_corpus(vectors, baseline(), texts, thresholds=thresholds, max_drift=max_drift)
        click.echo(json_text(on_corpus.as_dict()) if as_json else "\n".join(corpus_lines(candidate, on_corpus)))
        return _require_bound(candidate, on_corpus)
    ranges = header.ranges(header.n_embd)
    verdict = judge(vectors, baseline(), texts, dims=header.dims, ranges=ranges, max_drift=max_drift)
    _show_verdict(candidate, verdict, as_json)
    return _require_bound(candidate, verdict)


def _checkpoint_baseline(model: str, texts: Any, lock: Path | None, **stated: Any) -> Any:
    """The vectors of MODEL's checkpoint, as `open_baseline` takes them."""
    from f2gguf.evals.against import Baseline
    from f2gguf.evals.full_precision import choose_run, require_transformers
    from f2gguf.quantize.convert.readback import reference_ids

    require_transformers()
    facts = shared.facts_of(model, lock, **stated)
    run, name = choose_run(facts.checkpoint.folder, facts.checkpoint.n_parameters)
    ids = reference_ids(facts, texts)

    def vectors() -> Any:
        with progress(f"run {facts.name}, {name}", len(texts)) as advance:
            dense = facts.checkpoint.dense_paths
            return run(facts.checkpoint.folder, ids, pooling=facts.pooling, dense=dense, on_progress=advance)

    return Baseline(facts.n_embd, vectors)


def _without_type(source: Path) -> str:
    """'model-F16.gguf' -> 'model'"""
    base, _, kind = source.stem.rpartition("-")
    return base if kind in ("F16", "BF16", "F32") else source.stem


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """Where a command keeps what a later run of it goes on from; no other run may use it; removed when it ends well."""
    from f2gguf.runtime.files import locked

    folder = path.with_name(path.name + ".work")
    with locked(folder):
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing is in it
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _searched(weights: Any, variant: str, path: Path, work: Path, **options: Any) -> Any:
    """Make `path` by the recipe that a search chooses; gives it and what was measured."""
    from f2gguf.quantize.repair.calibration import load_calibration
    from f2gguf.quantize.repair.search import make_within_bound
    from f2gguf.quantize.repair.study import study_source

    calibration = load_calibration(options["calibration"], weights.header.languages, options["column"])
    study = study_source(
        weights.header.path,
        imatrix_path=work / IMATRIX,
        work=work,
        texts=calibration.texts,
        own_imatrix=options["imatrix"],
        device=options["device"],
        compensate=options["compensate"],
        tune=options["tune"],
    )
    evaluation = _evaluation(weights.header.path, options["max_drift"], options["device"], calibration.corpus)
    return make_within_bound(study, variant, path, evaluation=evaluation, max_size=options["max_size"])


def _by_recipe(weights: Any, variant: str, path: Path, work: Path, **options: Any) -> Any:
    """Make `path` by the recipe of a file, or by llama.cpp's own; gives it and what was measured."""
    from f2gguf.quantize.repair.calibration import load_calibration
    from f2gguf.quantize.repair.imatrix import read_imatrix
    from f2gguf.quantize.repair.recipe import Recipe, read_recipe, require_inputs
    from f2gguf.quantize.repair.search import make_measured
    from f2gguf.quantize.repair.study import compensated

    recipe = Recipe(variant)
    imatrix: Any = {}
    ready: Any = {}
    calibration = load_calibration(options["calibration"], weights.header.languages, options["column"])
    if options["recipe"]:
        recipe = read_recipe(options["recipe"])
        require_inputs(recipe, weights, variant, options["imatrix"], options["recipe"])
        imatrix = read_imatrix(options["imatrix"], weights) if recipe.imatrix_sha256 else {}
        if recipe.compensated:
            ready = compensated(weights, recipe, imatrix, calibration, work, options["recipe"], options["device"])
    evaluation = _evaluation(weights.header.path, options["max_drift"], options["device"], calibration.corpus)
    return make_measured(weights, path, recipe, imatrix, ready, evaluation=evaluation)


def _evaluation(source: Path, max_drift: float, device: str, corpus: Any) -> Any:
    """The evaluation texts that the model answers for, the held-out ones of a corpus, and the F16 file's vectors."""
    from f2gguf.evals.texts import claimed_texts, embed_texts, load_texts
    from f2gguf.quantize.repair.search import Evaluation, embed_held_out
    from f2gguf.runtime import Embedder

    with Embedder(source, device=device) as model:
        texts = claimed_texts(load_texts(), model.header.languages)
        reference = embed_texts(model, texts, f"measure {source.name}")
    return Evaluation(texts, reference, max_drift, device, embed_held_out(source, corpus, device))


def _require_bound(path: Path, verdict: Any) -> None:
    from f2gguf.runtime.files import format_bound

    if not verdict.holds:
        raise OverBound(f"{path}: over the bound of {format_bound(verdict.max_drift)}: {'; '.join(verdict.over[:5])}.")


def _show_verdict(path: Path, verdict: Any, as_json: bool, on_corpus: Any = None) -> None:
    from f2gguf.evals.drift import json_text, rounded
    from f2gguf.quantize.report.tables import COLUMNS, corpus_line, verdict_cells
    from f2gguf.runtime.files import format_size

    if as_json:
        of_corpus = {"corpus": rounded(vars(on_corpus))} if on_corpus else {}
        click.echo(json_text({**verdict.as_dict(), **of_corpus}))
        return
    row = [path.name, format_size(path.stat().st_size), *verdict_cells(verdict)]
    click.echo("\n".join([text_table(COLUMNS, [row]), *([corpus_line(on_corpus)] if on_corpus else [])]))
