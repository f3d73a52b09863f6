"""The selftest: embed a file's golden texts on this device, and compare the vectors with those of the file's maker.

Token ids are compared before vectors, and vectors are computed from the maker's ids, so that a fault shows its cause.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.errors import SelftestFailed
from f2gguf.runtime.gguf.golden import Golden, require_golden
from f2gguf.runtime.gguf.header import POOLING_IDS
from f2gguf.runtime.llama.encoder import Encoder, normalized
from f2gguf.runtime.llama.packing import Ids, leading_length
from f2gguf.runtime.llama.runner import Rows
from numpy.typing import NDArray

Compute = Callable[[list[Ids]], Rows]
CHECKS = ("tokenizer", "closing token", "prompt", "pooling", "vectors")
# A cosine may be lower than the maker's by this much and half of the drift that the maker measured. 16-bit files change
# by less than 1e-6 on the CPU; one published GPU gave 0.9998 (llama.cpp issue 26044). Quantised files change with the
# kernels, and more if they drift further: over 585 texts, alone instead of together, all-MiniLM-L6-v2's Q8_0 by up to
# 0.0004 and its Q4_K_M by 0.0023, and no text drifted 1.5 times as far; on the golden texts, its Q4_0 by 0.0003.
TOLERANCE, DRIFT_SHARE = 0.002, 0.5
_AGAIN = "Download the file again, or make it again with `quantize all`."


@dataclass(frozen=True)
class Fault:
    """The check that failed (one of CHECKS), and what is wrong, with the next step."""

    check: str
    message: str


@dataclass(frozen=True)
class Selftest:
    """The outcome of a selftest. The file is sound if there are no faults."""

    path: Path
    device: str
    n_texts: int
    min_cosine: float  # with the reference vectors, here and now; NaN where a text has no finite vector
    maker_min_cosine: float
    faults: tuple[Fault, ...]

    def require_sound(self) -> None:
        """Raise `SelftestFailed`, which carries the faults, if there are any."""
        if self.faults:
            words = "; ".join(f"{fault.check}: {fault.message}" for fault in self.faults)
            raise SelftestFailed(f"{self.path}: failed its selftest. {words}", self.faults)

    def lines(self) -> list[str]:
        """The outcome for people: one line for each check, then the cosines."""
        messages = {fault.check: fault.message for fault in self.faults}
        width = max(map(len, CHECKS))
        return [
            *(f"{check:<{width}}  {messages.get(check, 'ok')}" for check in CHECKS),
            f"{'cosine':<{width}}  at least {self.min_cosine:.6f} with the reference over {self.n_texts} texts, "
            f"{self.maker_min_cosine:.6f} where it was made; {self.device}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The outcome for machines."""
        cosine = self.min_cosine if np.isfinite(self.min_cosine) else None  # JSON has no NaN
        return {**asdict(self), "path": str(self.path), "min_cosine": cosine, "holds": not self.faults}


def selftest(encoder: Encoder, golden: Golden | None = None, *, compute: Compute | None = None) -> Selftest:
    """Compare token ids and vectors of the golden texts with the header's. Raises `SelftestMissing` if it has none.

    `golden` may be a part of them, and `compute` another way to the encoder's raw vectors.
    """
    golden = golden or require_golden(encoder.header)
    cosines = golden.cosines_of(probe_vectors(encoder, golden, compute=compute))
    faults = [*_token_faults(encoder, golden), *_vector_faults(encoder, golden, cosines)]
    return Selftest(
        path=encoder.header.path,
        device=encoder.engine.description,
        n_texts=len(golden.texts),
        min_cosine=float(cosines[golden.is_compared].min(initial=1)),
        maker_min_cosine=float(golden.cosines[golden.is_compared].min(initial=1)),
        faults=tuple(sorted(faults, key=lambda fault: CHECKS.index(fault.check))),
    )


class SelftestInParts:
    """A selftest for a server, which is to answer soon: `begin`, then `finish` beside the first requests.

    `begin` tests the shortest text, and as long as there is time the shortest of every other prompt, then longer ones.
    Together the two compare what `selftest` does. Raises `SelftestMissing`.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._golden = require_golden(encoder.header)
        self.n_texts = len(self._golden.texts)
        self._left = sorted(range(self.n_texts), key=lambda i: len(self._golden.ids[i]))

    @property
    def n_left(self) -> int:
        """Texts that were not compared yet."""
        return len(self._left)

    def begin(self, budget_s: float) -> None:
        """Compare texts for about `budget_s` seconds. Raises `SelftestFailed`."""
        prompts = self._golden.prompts
        shortest = list({prompts[i]: i for i in reversed(self._left)}.values())
        begin, n_done = time.perf_counter(), 0
        for i in list(dict.fromkeys([*sorted(shortest, key=self._left.index), *self._left])):
            n_tokens, passed = len(self._golden.ids[i]), time.perf_counter() - begin
            if n_done and passed / n_done * (n_done + n_tokens) > budget_s:
                break
            self._compare([i])
            n_done += n_tokens

    def finish(self, compute: Compute | None = None) -> None:
        """Compare the other texts. Raises `SelftestFailed`."""
        self._compare(self._left, compute)

    def _compare(self, which: list[int], compute: Compute | None = None) -> None:
        if which:
            selftest(self._encoder, self._golden.part(which), compute=compute).require_sound()
        self._left = [i for i in self._left if i not in which]


def probe_vectors(encoder: Encoder, golden: Golden, *, compute: Compute | None = None) -> Rows:
    """L2-normalised vectors of the maker's token ids, (n_texts, n_embd) float32; NaN for a text without one.

    Texts of one prompt are one call, as a user would make it.
    """
    vectors = np.empty_like(golden.vectors)
    for name in dict.fromkeys(golden.prompts):
        rows = [i for i, prompt in enumerate(golden.prompts) if prompt == name]
        vectors[rows] = (compute or encoder.compute)([golden.ids[i] for i in rows])
    return normalized(vectors)


def _token_faults(encoder: Encoder, golden: Golden) -> Iterator[Fault]:
    header = encoder.header
    here = [
        encoder.tokenize([text], header.prompts.get(name, ""), max_tokens=header.max_tokens).ids[0]
        for name, text in zip(golden.prompts, golden.texts, strict=True)
    ]
    differing = [i for i, ids in enumerate(here) if not np.array_equal(ids, golden.ids[i])]
    closing = [i for i in differing if _differ_only_at_the_end(here[i], golden.ids[i])]
    others = [i for i in differing if i not in closing]
    if closing:
        ids, makers = here[closing[0]], golden.ids[closing[0]]
        yield Fault(
            "closing token",
            f"{len(closing)} of {len(here)} texts end with the token {ids[-1]} instead of {makers[-1]}, as where "
            f"tokenizer.ggml.add_eos_token is false. {_AGAIN}",
        )
    if not others:
        return
    first = others[0]
    at = leading_length(here[first], golden.ids[first])
    where = (
        f" First, text {first + 1} ({_shown(golden.texts[first])}) at token {at + 1}: "
        f"{here[first][at : at + 3].tolist()} instead of {golden.ids[first][at : at + 3].tolist()}. {_AGAIN}"
    )
    names = {golden.prompts[i] for i in others}
    if "" not in names and others == [i for i, name in enumerate(golden.prompts) if name in names]:
        known = {name: f"is {text!r}, not the one that the file was made with" for name, text in header.prompts.items()}
        words = (f"The {name} prompt {known.get(name, 'is missing')}." for name in sorted(names))
        yield Fault("prompt", " ".join(words) + where)
    else:
        yield Fault("tokenizer", f"{len(others)} of {len(here)} texts are split differently.{where}")


def _differ_only_at_the_end(here: Ids, makers: Ids) -> bool:
    return abs(len(here) - len(makers)) <= 1 and np.array_equal(here[: len(makers) - 1], makers[:-1])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _vector_faults(encoder: Encoder, golden: Golden, cosines: NDArray[np.float64]) -> Iterator[Fault]:
    margins = cosines - _floors(golden)
    bad = np.flatnonzero(golden.is_compared & ~(margins >= 0))
    if not len(bad):
        return
    pooling = encoder.settings.pooling
    for other in POOLING_IDS:
        if other != pooling and _gives_golden_vectors(encoder, golden, other):
            is_stated = encoder.header.pooling == other
            step = "The file states that itself: leave --pooling (pooling=) out." if is_stated else _AGAIN
            words = f"{pooling} pooling gives other vectors than the file was made with, {other} gives those. {step}"
            yield Fault("pooling", words)
            return
    i = int(bad[np.argmin(np.nan_to_num(margins[bad], nan=-np.inf))])
    value = f"the cosine {cosines[i]:.6f}" if np.isfinite(cosines[i]) else "no finite vector"
    yield Fault(
        "vectors",
        f"{len(bad)} of {len(cosines)} texts are off, at worst text {i + 1} ({_shown(golden.texts[i])}): {value}, "
        f"where the maker had {golden.cosines[i]:.6f} and {_floors(golden)[i]:.6f} is the least allowed. "
        f"Computed on {encoder.engine.description}. "
        + ("Try --device cpu." if encoder.engine.model.offloaded else f"The weights are damaged. {_AGAIN}"),
    )


def _floors(golden: Golden) -> NDArray[np.float64]:
    """The smallest cosine that each text may have, (n_texts,)."""
    return np.asarray(golden.cosines - TOLERANCE - DRIFT_SHARE * (1 - golden.cosines), dtype=np.float64)


def _gives_golden_vectors(encoder: Encoder, golden: Golden, pooling: str) -> bool:
    settings = replace(encoder.settings, pooling=pooling)
    other = Encoder(encoder.header, settings)
    with contextlib.closing(other.engine):
        cosines = golden.cosines_of(probe_vectors(other, golden))
    return bool((cosines >= _floors(golden))[golden.is_compared].all())
