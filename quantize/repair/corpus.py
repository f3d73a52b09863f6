"""A sample of a corpus of any size, read once and in bounded memory; the order of the rows does not matter."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from f2gguf.evals.drift import Drifts
from f2gguf.evals.texts import KINDS, EvalText, load_texts
from f2gguf.runtime.console import say
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.tables.texts import iter_texts

# Chosen with scripts/bench-corpus, as is that they are added to f2gguf's own texts: alone, they leave MiniLM's Q4_0 a
# drift of 1.33% instead of 0.81% on the evaluation texts. Codes for 3,200 and our own took 15 GB of memory.
N_TEXTS = 800  # that recipes are chosen with
N_HELD_OUT = 300  # that choose nothing; or a third of all, if that is less
_HELD_OUT_SHARE = 3
# With fewer texts, columns of a wide matrix would get no weight. 64 texts of 100 tokens give twice as many rows as the
# 1.7B model has columns.
MIN_TEXTS = 64
MAX_CHARS = 2000  # of a text: what follows is not read, so that the sample has a size that is known before
PASSAGE_CHARS = 40  # characters in a row that two texts must not share


@dataclass(frozen=True)
class Corpus:
    """A sample of a file of the user's own."""

    path: Path
    texts: tuple[EvalText, ...]  # that recipes are chosen with
    held_out: tuple[EvalText, ...]  # that choose nothing: what files drift on them is reported

    @property
    def name(self) -> str:
        """What header and card call it."""
        return self.path.name


@dataclass(frozen=True)
class CorpusDrift(Drifts):
    """The drift of a file on the held-out texts of a corpus, which no bound is about."""

    name: str  # of the corpus


def sample_corpus(path: Path, *, column: str | None = None, n_texts: int = N_TEXTS) -> Corpus:
    """At most `n_texts` texts of `path`, which `iter_texts` reads by `column`, and others that are held out.

    The sample has the texts whose hashes are the smallest: a uniform sample of the different texts, where those that
    differ in white space and case alone count once. Texts with a passage of an evaluation text are left out. Rows may
    state `kind` ('query' gets the model's query prompt) and `language`. Raises `WrongUsage` for too few texts, and
    `InputError` for a file that does not parse.
    """
    sample = _with_smallest_hashes(_texts(path, column), n_texts + N_HELD_OUT)
    judged = _Passages(load_texts())
    kept = [text for text in sample if not judged.shares(text.text)]
    n_shared = len(sample) - len(kept)
    share = "shares a passage" if n_shared == 1 else "share a passage"
    if len(kept) < MIN_TEXTS:
        why = f", and {n_shared} more {share} with the evaluation texts" if n_shared else ""
        raise WrongUsage(
            f"{path}: holds {len(kept)} different texts{why}; calibration needs {MIN_TEXTS} (--calibration)."
        )
    if n_shared:
        n_sampled = f"{n_shared} of {len(sample)} sampled texts"
        say(f"{path}: warning: {n_sampled} {share} with the evaluation texts: left out, or the verdict proves nothing")
    n_held_out = min(N_HELD_OUT, len(kept) // _HELD_OUT_SHARE)
    say(f"{path}: {len(kept) - n_held_out} texts to choose recipes with, {n_held_out} held out")
    return Corpus(path, tuple(kept[n_held_out:]), tuple(kept[:n_held_out]))


def _texts(path: Path, column: str | None) -> Iterator[EvalText]:
    for i, row in enumerate(iter_texts(str(path), column=column), start=1):
        row_id = f"row {i}" if row.id is None else str(row.id)
        if (kind := row.kind or "document") not in KINDS:
            raise WrongUsage(f"{path}: {row_id} is of the kind {kind!r}; there are {', '.join(KINDS)}.")
        yield EvalText(row_id, kind, row.language or "und", row.text[:MAX_CHARS])


def _with_smallest_hashes(texts: Iterator[EvalText], n_texts: int) -> list[EvalText]:
    """Those of the different texts, by hash. No more than `n_texts` are in memory."""
    kept: dict[int, EvalText] = {}
    negated: list[int] = []  # the hashes of `kept`, so that the first of the heap is the largest
    for text in texts:
        if not (plain := " ".join(text.text.split()).casefold()):
            continue
        key = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=16).digest(), "big")
        if key in kept or (len(kept) == n_texts and key > -negated[0]):
            continue
        kept[key] = text
        heapq.heappush(negated, -key)
        if len(kept) > n_texts:
            del kept[-heapq.heappop(negated)]
    return [kept[key] for key in sorted(kept)]


class _Passages:
    """The passages of some texts. Edge texts are so short that they count as a whole alone."""

    def __init__(self, texts: Sequence[EvalText]) -> None:
        self._whole = {" ".join(text.text.split()) for text in texts}
        self._parts = {part for text in texts if text.kind != "edge" for part in _passages(text.text)}

    def shares(self, text: str) -> bool:
        """Whether `text` is one of the texts, or has PASSAGE_CHARS characters in a row of one."""
        return " ".join(text.split()) in self._whole or not self._parts.isdisjoint(_passages(text))


def _passages(text: str) -> Iterator[str]:
    """Every run of PASSAGE_CHARS characters of `text`, with white space folded."""
    plain = " ".join(text.split())
    return (plain[i : i + PASSAGE_CHARS] for i in range(len(plain) - PASSAGE_CHARS + 1))
