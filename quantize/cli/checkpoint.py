"""Commands about checkpoints: `quantize fetch`, `lock` and `convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from f2gguf.quantize.cli import options as shared
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import CheckpointError, HubError, HubUnreachable, RateLimited


@click.command()
@click.argument("model")
@shared.LOCK
def fetch(model: str, lock: Path | None) -> None:
    """Download a checkpoint at its pinned revision, and print its folder."""
    from f2gguf.quantize.source.fetch import fetch as fetch_model
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock

    click.echo(str(fetch_model(*find_model(model, read_lock(lock)))))


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--check", is_flag=True, help="Change nothing, and say what has moved on the Hub.")
@shared.LOCK
def lock(models: tuple[str, ...], check: bool, lock: Path | None) -> None:
    """Pin models in models.lock: their commits, and their files' sizes and hashes.

    The models.lock of the current folder is read and written. Where there is none, it is begun as a copy of the one
    that came with f2gguf; in a checkout of f2gguf, its own is written.

    Without MODEL, all that come from the Hub. An entry keeps its revision, and gets the head of main where it has none;
    org/name@revision gives it that one, or adds an entry. --check compares the lock with the Hub: exit code 1 where the
    Hub no longer has what is locked; that main has moved on is only said.
    """
    from f2gguf.quantize.source.lock import default_path, read_lock
    from f2gguf.quantize.source.pin import check_model, find_targets, lock_model

    known = read_lock(lock)
    targets = find_targets(models, known)
    failed = []
    for target in targets:
        try:
            click.echo(check_model(target) if check else lock_model(target, lock))
        except (HubUnreachable, RateLimited):  # the next one would fail as well
            raise
        except (HubError, CheckpointError) as error:
            if len(targets) == 1:
                raise
            say(str(error))
            failed.append(target.name)
    if not check and len(failed) < len(targets):
        click.echo(str(lock or default_path()))
    if failed:
        outcome = "differ from it" if check else "not written"
        raise HubError(f"{known.path}: {', '.join(failed)} {outcome}. The reasons are in the lines before.")


@click.command()
@click.argument("model")
@click.option("--dtype", help="Type of the weights: f16, bf16 or f32 [default: f16 where the model fits it].")
@click.option("-o", "--output", type=shared.PATH, help="File to write [default: NAME-DTYPE.gguf].")
@shared.FORCE
@click.option("--check", is_flag=True, help="Compare token ids and vectors of a dozen texts with transformers.")
@shared.checkpoint_options
@shared.LOCK
def convert(
    model: str, dtype: str | None, output: Path | None, force: bool, check: bool, lock: Path | None, **stated: Any
) -> None:
    """Convert a checkpoint to one GGUF file, and check that llama.cpp splits texts as its tokenizer does.

    --check needs the extra 'evals'. Without it, nothing compares the vectors.
    """
    from f2gguf.evals.full_precision import require_transformers
    from f2gguf.evals.texts import load_texts
    from f2gguf.quantize.convert.gate import pass_sampled_gate_1
    from f2gguf.quantize.convert.write import require_dtype
    from f2gguf.quantize.pipeline import convert_checked
    from f2gguf.runtime.files import require_absent, writing

    if dtype is not None:
        require_dtype(dtype)
    if check:
        require_transformers()
    facts = shared.facts_of(model, lock, **stated)
    dtype = dtype or facts.base
    path = output or Path(f"{facts.name}-{dtype.upper()}.gguf")
    require_absent(path, force=force)
    with writing(path) as part:
        convert_checked(facts, part, dtype=dtype, texts=load_texts())
        if check:
            pass_sampled_gate_1(facts, part, load_texts())
    click.echo(str(path))
    if not check:
        pooling = ["--pooling", facts.pooling] if stated["pooling"] else []
        command = shlex.join(["quantize", "verify", str(path), "--against", model, *pooling])
        say(f"Nothing compared its vectors with the checkpoint's. Do it: {command} (with the extra 'evals')")
