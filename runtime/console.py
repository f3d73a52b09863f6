"""The output of commands: results on stdout, progress and errors on stderr, one exit code for each kind of error."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import click
from f2gguf.runtime.errors import F2ggufError

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Commands(click.Group):
    """A group of commands that prints every F2ggufError as its message and ends with its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        try:
            return super().invoke(ctx)
        except F2ggufError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # files raise OutputError or InputError: this is a closed or full stdout
            if isinstance(error, BrokenPipeError):
                raise
            reason = f"{error.filename or 'stdout'}: {error.strerror}" if error.strerror else str(error)
            click.echo(f"error: {reason}.", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\ninterrupted: nothing is half written, and finished files are kept.", err=True)
            os._exit(130)  # Python's own exit would wait for the call into llama.cpp that is under way

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of work, not of the alphabet


def say(line: str) -> None:
    """Print a line on stderr, for the person who waits."""
    click.echo(line, err=True)


@contextlib.contextmanager
def progress(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on stderr, if that is a terminal. Gives the function that advances it."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=False) as bar:
        yield bar.update


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)
