"""Commands about a finished release: `quantize card` and `push`."""

from __future__ import annotations

from pathlib import Path

import click
from f2gguf.quantize.cli import options as shared
from f2gguf.runtime.console import progress, say


@click.command()
@click.argument("model")
@click.option(
    "-o", "--out", type=shared.PATH, default="dist", show_default=True, help="Folder that `quantize all` wrote to."
)
def card(model: str, out: Path) -> None:
    """Write the model card, picture, report.html, Modelfile and SHA256SUMS again, from drift.json."""
    from f2gguf.quantize.release.check import find_release
    from f2gguf.quantize.release.write import write_release
    from f2gguf.quantize.report.report import read_report
    from f2gguf.runtime.files import locked

    folder = find_release(model, out)
    with locked(folder):
        for path in write_release(folder, read_report(folder)):
            click.echo(str(path))


@click.command()
@click.argument("model")
@click.option("--repo", required=True, metavar="ORG/NAME", help="Repository on the Hub to push to.")
@click.option(
    "-o", "--out", type=shared.PATH, default="dist", show_default=True, help="Folder that `quantize all` wrote to."
)
@click.option("--tag", metavar="NAME", help="Tag of the commit [default: a name made from the release's content].")
@click.option("--create", is_flag=True, help="Make the repository if there is none.")
@click.option("--private", is_flag=True, help="Make it a private repository.")
@click.option("--allow-over-bound", is_flag=True, help="Push files over the bound too.")
@click.option("--yes", is_flag=True, help="Push. Without this flag the plan is printed and nothing is sent.")
@shared.JSON
def push(
    model: str,
    repo: str,
    out: Path,
    tag: str | None,
    create: bool,
    private: bool,
    allow_over_bound: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Send a release to the Hub in one commit, read every byte back, and tag it.

    MODEL is what `quantize all` was given, or the release's folder. What is unmeasured, has changed since, or is over
    the bound is refused. What the Hub holds is not sent again: a push that was stopped goes on from there, and one of
    an unchanged release only reads it back.
    """
    from f2gguf.evals.drift import json_text
    from f2gguf.quantize.release.check import find_release, read_release
    from f2gguf.quantize.release.plan import make_plan
    from f2gguf.quantize.release.push import push as push_release
    from huggingface_hub import constants

    folder = find_release(model, out)
    say(f"check {folder}")
    release = read_release(folder, allow_over_bound=allow_over_bound)
    plan = make_plan(release, repo, tag=tag, create=create, private=private)
    if not as_json:
        click.echo("\n".join(plan.lines()))
    commit = push_release(plan, progress) if yes else None
    if as_json:
        click.echo(json_text({**plan.as_dict(), "commit": commit}))
    if commit:
        click.echo(f"{constants.ENDPOINT}/{repo}/tree/{plan.tag}", err=as_json)
    else:
        say("nothing was sent. Pass --yes to do it.")
