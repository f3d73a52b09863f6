"""The output of commands: results on stdout, progress and errors on stderr, one exit code for each kind of error."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import click
from f2gguf.runtime.errors import F2ggufError

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

_SECONDS_A_LINE = 60  # at least, where progress is not drawn
_BYTES_A_TOKEN = 4  # of English text, about


class Advance(Protocol):
    """Advances progress by `n`; a `note`, such as the speed, is shown until the next one comes."""

    def __call__(self, n: int, note: str = "") -> None: ...


Progress = Callable[[str, int], AbstractContextManager[Advance]]


class Commands(click.Group):
    """A group of commands that prints every F2ggufError as its message and ends with its exit code.

    `elsewhere` names further commands, "module:name" each, whose modules are imported when one of them is asked for.
    """

    def __init__(self, *arguments: Any, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.elsewhere = dict(elsewhere or {})

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
        return [*self.commands, *self.elsewhere]  # in the order of work, not of the alphabet

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.elsewhere:
            return super().get_command(ctx, cmd_name)
        module, name = self.elsewhere[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command


def say(line: str) -> None:
    """Print a line on stderr, for the person who waits."""
    click.echo(line, err=True)


@contextlib.contextmanager
def progress(label: str, length: int) -> Iterator[Advance]:
    """Say on stderr how far work is: as a bar on a terminal, elsewhere as a line now and then.

    Gives the function that advances it. The time left is right if every unit of `length` takes equally long.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        bar: ProgressBar[str | None]
        with click.progressbar(
            length=length, label=label, file=sys.stderr, show_pos=False, item_show_func=lambda note: note
        ) as bar:
            yield lambda n, note="": bar.update(n, note)
    else:
        yield _in_lines(label, length)


@contextlib.contextmanager
def progress_by_size(label: str, sizes: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """`progress` over things of these sizes, in the order in which they end: its time left is right if a size tells how
    long each takes.

    Gives the function that takes how many have ended.
    """
    left = iter(sizes)
    with progress(label, sum(sizes)) as advance:
        yield lambda n: advance(sum(islice(left, n)))


def sizes_of(texts: Sequence[str], max_tokens: int) -> list[int]:
    """About the work of texts, which are cut at `max_tokens`, the longest first, as an `Embedder` computes them."""
    most = _BYTES_A_TOKEN * max_tokens
    return sorted((1 + min(len(text.encode(errors="replace")), most) for text in texts), reverse=True)


def _in_lines(label: str, length: int) -> Advance:
    begin = said = time.monotonic()
    done = 0

    def advance(n: int, note: str = "") -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        passed = now - begin
        if now - said >= max(_SECONDS_A_LINE, passed / 10) and 0 < done < length:
            said = now
            left = passed * (length / done - 1)
            pace = f", {note}" * bool(note)
            say(f"  {label}: {done / length:.0%} in {passed / 60:.0f} min{pace}, about {left / 60:.0f} left")

    return advance


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)
