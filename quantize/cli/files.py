"""Commands that take one file apart from its release: `quantize imatrix`, `variant` and `verify`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from f2gguf.quantize.cli.options import (
    CALIBRATION,
    DEVICE,
    IMATRIX,
    JSON,
    LOCK,
    MAX_DRIFT,
    MAX_SIZE,
    PATH,
    POOLING,
    STOCK,
    refuse_together,
    require_number,
    settle,
)
from f2gguf.runtime.cli import COLUMN
from f2gguf.runtime.console import progress, text_table
from f2gguf.runtime.errors import OverBound, WrongUsage


@click.command()
@click.argument("source", type=PATH)
@click.option("-o", "--output", type=PATH, help="The file to write [default: beside SOURCE].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@CALIBRATION
@DEVICE
def imatrix(source: Path, output: Path | None, force: bool, calibration: Path | None, device: str) -> None:
    """Write the importance matrix of the F16 file SOURCE, as llama-quantize reads it."""
    from f2gguf.quantize.repair.study import study_source
    from f2gguf.runtime.files import require_absent
    from f2gguf.runtime.gguf.header import read_header

    read_header(source)
    path = output or source.with_name(source.stem.removesuffix("-F16") + ".imatrix.gguf")
    require_absent(path, force=force)
    with _work_folder(path) as work:
        study_source(
            source,
            imatrix_path=path,
            work=work,
            calibration=calibration,
            given_imatrix=None,
            device=device,
            progress=progress,
        )
    click.echo(str(path))


@click.command()
@click.argument("source", type=PATH)
@click.argument("name", metavar="VARIANT")
@click.option("-o", "--output", type=PATH, help="The file to write [default: beside SOURCE].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.option("--recipe", "recipe_path", type=PATH, help="Make it by the recipe of this .gguf or .json file.")
@MAX_DRIFT
@MAX_SIZE
@STOCK
@CALIBRATION
@IMATRIX
@DEVICE
@JSON
def variant(
    source: Path,
    name: str,
    output: Path | None,
    force: bool,
    recipe_path: Path | None,
    max_drift: float,
    max_size: int | None,
    stock: bool,
    calibration: Path | None,
    imatrix: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Make one VARIANT (Q8_0, Q4_K_M, Q4_0) of the F16 file SOURCE, repaired until it holds the bound, and measured."""
    from f2gguf.evals.texts import claimed_texts, embed_texts, load_texts
    from f2gguf.quantize.repair.make import Measurement, settle
    from f2gguf.quantize.repair.plan import require_variant
    from f2gguf.quantize.repair.tensors import Weights
    from f2gguf.runtime import Embedder
    from f2gguf.runtime.files import require_absent

    choices = {"--max-size": max_size, "--calibration": calibration}
    refuse_together(**{"--recipe": recipe_path, "--stock": stock, **choices})
    refuse_together(**{"--stock": stock, **choices, "--imatrix": imatrix})
    name = require_variant(name)
    weights = Weights(source)  # no such file is said before its name is taken apart
    path = output or source.with_name(source.stem.removesuffix("-F16") + f"-{name}.gguf")
    require_absent(path, force=force)
    imatrix_path = path.with_suffix(".imatrix.gguf")
    with _work_folder(path) as work:
        options = {
            "imatrix_path": imatrix_path,
            "work": work,
            "calibration": calibration,
            "given_imatrix": imatrix,
            "device": device,
        }
        if not (recipe_path or stock):
            require_absent(imatrix_path, force=force or imatrix == imatrix_path)
        chosen, used = _recipes(weights, name, recipe_path, stock, (max_drift, max_size), options)
        with Embedder(source, device=device) as model:
            texts = claimed_texts(load_texts(), model.header.languages)
            with progress(f"measure {source.name}", len(texts)) as advance:
                reference = embed_texts(model, texts, advance)
        measurement = Measurement(texts, reference, max_drift, device, progress)
        verdict = settle(weights, path, chosen, used, measurement=measurement)
    _show_verdict(path, verdict.as_dict(), as_json)
    for written in [path] if recipe_path or stock else [imatrix_path, path]:
        click.echo(str(written), err=as_json)
    _require_bound(path, verdict)


@click.command()
@click.argument("candidate", type=PATH)
@click.option("--against", required=True, metavar="FILE|MODEL|URL", help="What the file is compared with.")
@click.option("--corpus", metavar="FILE", help="Texts of your own: .txt, .jsonl or .csv.")
@COLUMN
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(-1, 1),
    multiple=True,
    callback=require_number,
    help="A similarity at which you cut; again for more [default: quantiles].",
)
@click.option("--endpoint-model", metavar="NAME", help="The model that a URL is asked for.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="Environment variable that holds the URL's key [default for OpenAI: OPENAI_API_KEY].",
)
@MAX_DRIFT
@POOLING
@DEVICE
@LOCK
@JSON
def verify(
    candidate: Path,
    against: str,
    corpus: str | None,
    column: str,
    thresholds: tuple[float, ...],
    endpoint_model: str | None,
    api_key_env: str | None,
    max_drift: float,
    pooling: str | None,
    device: str,
    lock_path: Path | None,
    as_json: bool,
) -> None:
    """Measure the drift of a file against a baseline.

    --against takes another GGUF file; a MODEL, which transformers runs in float32, layer by layer where it does not fit
    the memory; a .npy or .safetensors file of vectors in the order of the texts; or the URL of an OpenAI-compatible
    endpoint. --corpus measures on texts of your own, and how far their similarity scores and thresholds move; rows with
    "kind": "query" are queries.
    """
    from f2gguf.evals.against import open_baseline
    from f2gguf.evals.conversion import as_json as json_text
    from f2gguf.evals.corpus import corpus_lines, judge_corpus, read_corpus
    from f2gguf.evals.drift import judge
    from f2gguf.evals.texts import claimed_texts, embed_texts, load_texts
    from f2gguf.runtime import Embedder
    from f2gguf.runtime.gguf.header import read_header

    if thresholds and not corpus:
        raise WrongUsage("--threshold: is measured on texts of your own. Name them with --corpus.")
    header = read_header(candidate)
    header.require_pooling()
    texts = read_corpus(corpus, column=column) if corpus else claimed_texts(load_texts(), header.languages)
    baseline = open_baseline(
        against,
        texts,
        header,
        run_checkpoint=lambda model: _checkpoint_baseline(model, texts, pooling, lock_path),
        device=device,
        endpoint_model=endpoint_model,
        api_key_env=api_key_env,
    )
    with Embedder(candidate, device=device) as model, progress(f"measure {candidate.name}", len(texts)) as advance:
        vectors = embed_texts(model, texts, advance)
    if corpus:
        on_corpus = judge_corpus(vectors, baseline(), texts, thresholds=thresholds, max_drift=max_drift)
        click.echo(json_text(on_corpus.as_dict()) if as_json else "\n".join(corpus_lines(candidate, on_corpus)))
        return _require_bound(candidate, on_corpus)
    verdict = judge(vectors, baseline(), texts, dims=header.dims, max_drift=max_drift)
    _show_verdict(candidate, verdict.as_dict(), as_json)
    return _require_bound(candidate, verdict)


def _checkpoint_baseline(model: str, texts: Any, pooling: str | None, lock_path: Path | None) -> Any:
    """The vectors of MODEL's checkpoint, as `open_baseline` takes them."""
    from f2gguf.evals.against import Baseline
    from f2gguf.evals.full_precision import choose_run, require_transformers
    from f2gguf.quantize.convert.readback import reference_ids

    require_transformers()
    facts = settle(model, pooling, lock_path)
    run, name = choose_run(facts.checkpoint.folder, facts.checkpoint.n_parameters)
    ids = reference_ids(facts, texts)

    def vectors() -> Any:
        with progress(f"run {facts.name}, {name}", len(texts)) as advance:
            return run(facts.checkpoint.folder, ids, pooling=facts.pooling, on_progress=advance)

    return Baseline(facts.n_embd, vectors)


@contextlib.contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """Where a command keeps what another run of it goes on from; removed when it ends well."""
    folder = path.with_name(path.name + ".work")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _recipes(
    weights: Any, variant: str, recipe_path: Path | None, stock: bool, bound: tuple[float, int | None], options: Any
) -> tuple[Any, Any]:
    """The recipes to try, and the importance matrix that they use."""
    from f2gguf.quantize.repair.imatrix import read_imatrix
    from f2gguf.quantize.repair.make import only
    from f2gguf.quantize.repair.recipe import Recipe, read_recipe, require_inputs
    from f2gguf.quantize.repair.search import recipes
    from f2gguf.quantize.repair.study import study_source

    if recipe_path:
        recipe = read_recipe(recipe_path)
        require_inputs(recipe, weights, variant, options["given_imatrix"], recipe_path)
        return only(recipe), read_imatrix(options["given_imatrix"], weights) if recipe.imatrix_sha256 else {}
    if stock:
        return only(Recipe(variant)), {}
    study = study_source(weights.header.path, progress=progress, **options)
    return recipes(study, variant, max_drift=bound[0], max_size=bound[1]), study.imatrix


def _require_bound(path: Path, verdict: Any) -> None:
    from f2gguf.runtime.files import format_bound

    if not verdict.holds:
        raise OverBound(f"{path}: over the bound of {format_bound(verdict.max_drift)}: {'; '.join(verdict.over[:5])}.")


def _show_verdict(path: Path, verdict: dict[str, Any], as_json: bool) -> None:
    from f2gguf.evals.conversion import as_json as json_text
    from f2gguf.quantize.report.tables import COLUMNS, verdict_cells
    from f2gguf.runtime.files import format_size

    row = [path.name, format_size(path.stat().st_size), *verdict_cells(verdict)]
    click.echo(json_text(verdict) if as_json else text_table(COLUMNS, [row]))
