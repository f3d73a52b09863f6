"""The command `quantize`, and `f2gguf` with `quantize` in it."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from f2gguf.evals.cli import bench
from f2gguf.runtime.cli import COLUMN, f2gguf
from f2gguf.runtime.console import Commands, progress, say
from f2gguf.runtime.errors import InputError, OverBound, WrongUsage, parsing

_DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, metal or cuda.")
_LOCK = click.option("--lock", "lock_path", type=click.Path(path_type=Path), help="Another models.lock.")


def _require_number(_context: click.Context, _option: click.Parameter, value: Any) -> Any:
    if any(number != number for number in (value if isinstance(value, tuple) else (value,))):
        raise click.BadParameter("nan is no number to compare with.")
    return value


def _require_size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(B|kB|MB|GB|KiB|MiB|GiB)", text or "", re.IGNORECASE)
    if text is not None and not match:
        raise click.BadParameter(f"{text!r} is no size; write 350MB or 1.2GB (--max-size).")
    return int(float(match[1]) * _UNITS[match[2].lower()]) if match else None


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MAX_DRIFT = click.option(
    "--max-drift",
    type=click.FloatRange(0, 2, min_open=True),
    default=0.02,
    show_default=True,
    callback=_require_number,
    help="The bound.",
)
_POOLING = click.option("--pooling", help="last, mean or cls, for a checkpoint that does not state it.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
_PATH = click.Path(path_type=Path)
_STOCK = click.option("--stock", is_flag=True, help="llama.cpp's plain recipe, whatever it drifts.")
_MAX_SIZE = click.option(
    "--max-size", callback=_require_size, help="The least drift within this size of a file, such as 350MB or 1.2GB."
)
_CALIBRATION = click.option("--calibration", type=_PATH, help="Texts of your own to choose recipes with.")
_IMATRIX = click.option("--imatrix", type=_PATH, help="An importance matrix of your own (GGUF).")


@click.group(cls=Commands)
@click.version_option(package_name="f2gguf")
def quantize() -> None:
    """Turn embedding checkpoints into measured GGUF files.

    MODEL is a name in models.lock, a checkpoint folder, or org/name[@revision] on the Hugging Face Hub.
    """


@quantize.command("all")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--variants", default="Q8_0,Q4_K_M,Q4_0", show_default=True, help="What to make besides F16.")
@click.option("--out", type=_PATH, default="dist", show_default=True, help="Where the models' folders go.")
@_MAX_DRIFT
@_MAX_SIZE
@_STOCK
@_CALIBRATION
@_IMATRIX
@_POOLING
@_DEVICE
@_LOCK
@click.option("--force", is_flag=True, help="Make everything again.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@_JSON
def all_(
    models: tuple[str, ...],
    variants: str,
    out: Path,
    max_drift: float,
    max_size: int | None,
    stock: bool,
    calibration: Path | None,
    imatrix: Path | None,
    pooling: str | None,
    device: str,
    lock_path: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch, convert, calibrate, quantise, measure, write the card.

    Without MODEL, the default of models.lock. Stopped at any point, the same command goes on from there. Variants whose
    stock recipe is over the bound are repaired until they hold it. Exit code 3 where one drifts more all the same.
    """
    from f2gguf.evals.conversion import as_json as json_text
    from f2gguf.evals.report import report_lines
    from f2gguf.quantize.lock import read_lock
    from f2gguf.quantize.pipeline import Job, make_release
    from f2gguf.quantize.plan import require_variant
    from f2gguf.runtime.files import format_bound
    from f2gguf.runtime.llama import require_device

    _refuse_together(**{"--stock": stock, "--max-size": max_size, "--calibration": calibration, "--imatrix": imatrix})
    lock = read_lock(lock_path)
    chosen = [require_variant(name.strip()) for name in variants.split(",")]
    require_device(device)
    found = [_find(model, lock) for model in models or [lock.default]]
    if dry_run:
        for entry, folder in found:
            click.echo("\n".join(_dry_run_lines(entry, folder, out, chosen)))
        return
    over = []
    for entry, folder in found:
        facts = _settle(entry, folder, pooling)
        job = Job(
            facts,
            out,
            max_drift=max_drift,
            device=device,
            progress=progress,
            force=force,
            stock=stock,
            max_size=max_size,
            calibration=calibration,
            imatrix=imatrix,
        )
        report = make_release(job, chosen)
        over += [f"{job.name} {name}" for name in chosen if not report["variants"][name]["holds"]]
        click.echo(json_text(report) if as_json else "\n".join(report_lines(report)))
        for path in sorted(job.folder.iterdir()):
            click.echo(str(path), err=as_json)
    if over:
        raise OverBound(
            f"over the bound of {format_bound(max_drift)}: {', '.join(over)}. Every file was written, and says so."
        )


@quantize.command()
@click.argument("model")
@_LOCK
def fetch(model: str, lock_path: Path | None) -> None:
    """Download a checkpoint at its pinned revision, and print its folder."""
    from f2gguf.quantize.fetch import fetch as fetch_model
    from f2gguf.quantize.lock import read_lock

    click.echo(str(fetch_model(*_find(model, read_lock(lock_path)))))


@quantize.command()
@click.argument("model")
@click.option("--dtype", default="f16", show_default=True, help="f16, bf16 or f32.")
@click.option("-o", "--output", type=_PATH, help="The file to write [default: NAME-DTYPE.gguf].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_POOLING
@_LOCK
def convert(
    model: str, dtype: str, output: Path | None, force: bool, pooling: str | None, lock_path: Path | None
) -> None:
    """Convert a checkpoint to one GGUF file, and check that llama.cpp splits texts as its tokenizer does."""
    from f2gguf.evals.texts import load_texts
    from f2gguf.quantize.convert import require_dtype
    from f2gguf.quantize.lock import read_lock
    from f2gguf.quantize.pipeline import convert_checked
    from f2gguf.runtime.files import require_absent, writing

    require_dtype(dtype)
    entry, folder = _find(model, read_lock(lock_path))
    facts = _settle(entry, folder, pooling)
    path = output or Path(f"{facts.name}-{dtype.upper()}.gguf")
    require_absent(path, force=force)
    with writing(path) as part:
        convert_checked(facts, part, dtype=dtype, progress=progress, texts=load_texts())
    click.echo(str(path))


@quantize.command()
@click.argument("source", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The file to write [default: beside SOURCE].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@_CALIBRATION
@_DEVICE
def imatrix(source: Path, output: Path | None, force: bool, calibration: Path | None, device: str) -> None:
    """Write the importance matrix of the F16 file SOURCE, as llama-quantize reads it."""
    from f2gguf.quantize.study import study_source
    from f2gguf.runtime.files import require_absent
    from f2gguf.runtime.header import read_header

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


@quantize.command()
@click.argument("source", type=_PATH)
@click.argument("name", metavar="VARIANT")
@click.option("-o", "--output", type=_PATH, help="The file to write [default: beside SOURCE].")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@click.option("--recipe", "recipe_path", type=_PATH, help="Make it by the recipe of this .gguf or .json file.")
@_MAX_DRIFT
@_MAX_SIZE
@_STOCK
@_CALIBRATION
@_IMATRIX
@_DEVICE
@_JSON
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
    from f2gguf.quantize.plan import require_variant
    from f2gguf.quantize.tensors import Weights
    from f2gguf.quantize.variants import Measurement, settle
    from f2gguf.runtime import Embedder
    from f2gguf.runtime.files import require_absent

    choices = {"--max-size": max_size, "--calibration": calibration}
    _refuse_together(**{"--recipe": recipe_path, "--stock": stock, **choices})
    _refuse_together(**{"--stock": stock, **choices, "--imatrix": imatrix})
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


@quantize.command()
@click.argument("candidate", type=_PATH)
@click.option("--against", required=True, metavar="FILE|MODEL|URL", help="The reference, as said above.")
@click.option("--corpus", metavar="FILE", help="Texts of your own: .txt, .jsonl or .csv.")
@COLUMN
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(-1, 1),
    multiple=True,
    callback=_require_number,
    help="A similarity at which you cut; again for more [default: quantiles].",
)
@click.option("--endpoint-model", metavar="NAME", help="The model that a URL is asked for.")
@click.option("--api-key-env", metavar="NAME", help="Environment variable of a URL's key [default: OPENAI_API_KEY].")
@_MAX_DRIFT
@_POOLING
@_DEVICE
@_LOCK
@_JSON
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
    """Measure the drift of a file against a reference.

    --against takes another GGUF file; a MODEL, which transformers runs in float32, layer by layer where it does not fit
    the memory; a .npy or .safetensors file of vectors in the order of the texts; or the URL of an OpenAI-compatible
    endpoint. --corpus measures on texts of your own, and how far their similarity scores and thresholds move; rows with
    "kind": "query" are queries.
    """
    from f2gguf.evals.against import open_reference
    from f2gguf.evals.conversion import as_json as json_text
    from f2gguf.evals.corpus import corpus_lines, judge_corpus, read_corpus
    from f2gguf.evals.drift import judge
    from f2gguf.evals.texts import claimed_texts, embed_texts, load_texts
    from f2gguf.runtime import Embedder
    from f2gguf.runtime.header import read_header

    if thresholds and not corpus:
        raise WrongUsage("--threshold: is measured on texts of your own. Name them with --corpus.")
    header = read_header(candidate)
    header.require_pooling()
    texts = read_corpus(corpus, column=column) if corpus else claimed_texts(load_texts(), header.languages)
    reference = open_reference(
        against,
        texts,
        header,
        run_checkpoint=lambda model: _checkpoint_reference(model, texts, pooling, lock_path),
        device=device,
        endpoint_model=endpoint_model,
        api_key_env=api_key_env,
    )
    with Embedder(candidate, device=device) as model, progress(f"measure {candidate.name}", len(texts)) as advance:
        vectors = embed_texts(model, texts, advance)
    if corpus:
        on_corpus = judge_corpus(vectors, reference(), texts, thresholds=thresholds, max_drift=max_drift)
        click.echo(json_text(on_corpus.as_dict()) if as_json else "\n".join(corpus_lines(candidate, on_corpus)))
        return _require_bound(candidate, on_corpus)
    verdict = judge(vectors, reference(), texts, dims=header.dims, max_drift=max_drift)
    _show_verdict(candidate, verdict.as_dict(), as_json)
    return _require_bound(candidate, verdict)


@quantize.command()
@click.argument("model")
@click.option("--out", type=_PATH, default="dist", show_default=True, help="Where `quantize all` wrote.")
@_POOLING
@_LOCK
def card(model: str, out: Path, pooling: str | None, lock_path: Path | None) -> None:
    """Write the model card, picture, report.html, Modelfile and SHA256SUMS again, from drift.json."""
    from f2gguf.quantize.card import write_release
    from f2gguf.quantize.checkpoint import read_json
    from f2gguf.quantize.lock import read_lock

    entry, folder = _find(model, read_lock(lock_path))
    facts = _settle(entry, folder, pooling)
    path = out / facts.name / "drift.json"
    if not path.exists():
        raise WrongUsage(f"{path}: no such file. Measure the model first: quantize all {model} --out {out}")
    report = read_json(path)
    with parsing(path, InputError, f"Measure the model again: quantize all {model} --out {out}"):
        paths = write_release(facts, path.parent, report)
    for path in paths:
        click.echo(str(path))


f2gguf.add_command(bench)
f2gguf.add_command(quantize)


def _find(model: str, lock: Any) -> Any:
    from f2gguf.quantize.fetch import find_model

    return find_model(model, lock)


def _settle(entry: Any, folder: Path | None, pooling: str | None) -> Any:
    from f2gguf.quantize.facts import settle_facts
    from f2gguf.quantize.fetch import fetch as fetch_model

    path = fetch_model(entry, folder)
    say(f"{entry.name}: {path}")
    return settle_facts(entry, path, pooling=pooling)


def _checkpoint_reference(model: str, texts: Any, pooling: str | None, lock_path: Path | None) -> Any:
    """The vectors of MODEL's checkpoint, as `open_reference` wants them."""
    from f2gguf.evals.against import Reference
    from f2gguf.evals.full_precision import choose_run, require_transformers
    from f2gguf.quantize.lock import read_lock
    from f2gguf.quantize.readback import reference_ids

    require_transformers()
    entry, folder = _find(model, read_lock(lock_path))
    facts = _settle(entry, folder, pooling)
    run, name = choose_run(facts.checkpoint.folder, facts.checkpoint.n_parameters)
    ids = reference_ids(facts, texts)

    def vectors() -> Any:
        with progress(f"run {facts.name}, {name}", len(texts)) as advance:
            return run(facts.checkpoint.folder, ids, pooling=facts.pooling, on_progress=advance)

    return Reference(facts.n_embd, vectors)


def _refuse_together(**flags: object) -> None:
    """Raise `WrongUsage` where the first flag was given with one of the others, which it leaves nothing to do."""
    given = [name for name, value in flags.items() if value]
    if len(given) > 1 and given[0] == next(iter(flags)):
        raise WrongUsage(f"{given[0]} and {given[1]}: choose one.")


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
    from f2gguf.quantize.imatrix import read_imatrix
    from f2gguf.quantize.recipe import Recipe, read_recipe, require_inputs
    from f2gguf.quantize.repair import recipes
    from f2gguf.quantize.study import study_source
    from f2gguf.quantize.variants import only

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
    from f2gguf.evals.report import COLUMNS, text_table, verdict_cells
    from f2gguf.runtime.files import format_size

    row = [path.name, format_size(path.stat().st_size), *verdict_cells(verdict)]
    click.echo(json_text(verdict) if as_json else text_table(COLUMNS, [row]))


def _dry_run_lines(entry: Any, folder: Path | None, out: Path, variants: list[str]) -> list[str]:
    source = folder or f"{entry.repo}@{entry.revision} on the Hub"
    lines = [f"{entry.name}: from {source}"]
    for variant_name in ["F16", *variants]:
        path = out / entry.name / f"{entry.name}-{variant_name}.gguf"
        lines.append(f"  {path}: {'there, would be checked' if path.exists() else 'would be made and measured'}")
    return lines
