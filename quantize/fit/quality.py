"""The drift of a file: what was measured, or the range of other models' files of its variant, labelled as such."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from f2gguf.evals.drift import percent
from f2gguf.quantize.fit.plan import Candidate
from f2gguf.runtime.gguf.header import KEY_VERSION

PATH = Path(__file__).with_name("measured.toml")


@dataclass(frozen=True)
class Quality:
    """Mean drift of a file: from `low` to `high`, which are the same where it was measured."""

    low: float
    high: float
    is_measured: bool
    n_models: int = 0  # that the range is of

    def __str__(self) -> str:
        if self.is_measured:
            return "reference" if not self.high else percent(self.high)
        others = f"{self.n_models} other{'s' * (self.n_models > 1)}"
        span = percent(self.low) if self.low == self.high else f"{percent(self.low)} to {percent(self.high)}"
        return f"not measured; {others}: {span}"


def quality_of(candidate: Candidate) -> Quality | None:
    """None for what nobody measured, and for files from elsewhere, which f2gguf's own say nothing of."""
    if candidate.drift is not None:
        return Quality(candidate.drift.mean, candidate.drift.mean, is_measured=True)
    if candidate.is_reference:
        return Quality(0, 0, is_measured=True)
    measured = tomllib.loads(PATH.read_text(encoding="utf-8")).get(candidate.variant, {})
    if not measured or KEY_VERSION not in candidate.header.values:
        return None
    if candidate.is_listed and (drift := measured.get(candidate.model)) is not None:
        return Quality(drift, drift, is_measured=True)
    return Quality(min(measured.values()), max(measured.values()), is_measured=False, n_models=len(measured))
