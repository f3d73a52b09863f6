"""Room on the stack for the pre-tokenizers of llama.cpp that recurse (runtime/gguf/pretokenizers.py).

llama.cpp has code of its own for some split patterns and leaves the others to std::regex, which in libstdc++ calls
itself for every character of a match: 270 to 400 bytes of stack a character (GCC 12, x86-64, 30,000 equal
characters). The 8 MB of a usual thread end at 21,000 characters, and the process with them. So such a text is split
in a thread with more room.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from f2gguf.runtime.errors import TextError

Result = TypeVar("Result")

_ACROSS_BLANKS = ("exaone-moe",)  # its pattern matches words and the blanks between them at once
# What no pattern of the others matches across: a blank, then neither a blank nor the slash of "[\r\n/]*"
_BREAK = re.compile(r"(?<=[ \t\n\v\f\r])(?=[^\s/])")

_MIB = 1 << 20
_BYTES_A_CHARACTER = 1024  # 400 were measured
_LONGEST_RUN = 1 << 18  # characters: 256 MiB of stack, of which the system gives out what is used
_FITS = 200  # characters that any thread has room for; those of musl have 128 KiB
_size_is_set = threading.Lock()


def with_room(text: str, pre: str, split: Callable[[], Result]) -> Result:
    """Run `split`, which lets the recursive pre-tokenizer `pre` split `text`, where the stack holds it.

    Raises `TextError` for a text with more characters between two breaks than that.
    """
    if len(text) <= _FITS:
        return split()
    run = len(text) if pre in _ACROSS_BLANKS else max(map(len, _BREAK.split(text)))
    if run > _LONGEST_RUN:
        raise TextError(
            f"{run:,} of its characters have no blank between them. This file's pre-tokenizer {pre!r} takes at most "
            f"{_LONGEST_RUN:,}, as llama.cpp would end the process. Cut the text, or break it with blanks."
        )
    return _with_stack((2 + run * _BYTES_A_CHARACTER // _MIB) * _MIB, split)


def _with_stack(size_bytes: int, work: Callable[[], Result]) -> Result:
    """Run `work` in a thread that has `size_bytes` of stack."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _size_is_set:
        size_before = threading.stack_size(size_bytes)
        try:
            threading.Thread(target=run, name="f2gguf tokenizer").start()
        except RuntimeError as error:  # the system has no room
            raise TextError(f"splitting it takes {size_bytes:,} bytes of stack, which this system refuses") from error
        finally:
            threading.stack_size(size_before)
    return done.result()
