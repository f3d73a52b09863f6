"""How long a run of the main job takes on this machine, and how much memory and disk: said before the work starts.

It follows from the shapes of the tensors and half a second's sample of the machine; of a run that takes half a minute,
from a sample of some layers of every file too. It is corrected by every stage that ends. What the search does beyond
llama.cpp's own types is not in it, as nobody knows it before.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from f2gguf.evals.conversion import can_check
from f2gguf.evals.full_precision import available_memory_bytes, whole_bytes
from f2gguf.evals.texts import EvalText
from f2gguf.quantize.convert.reserved import N_STEP_TEXTS
from f2gguf.quantize.fit.excerpt import sampled_speed
from f2gguf.quantize.fit.plan import planned
from f2gguf.quantize.job import Job
from f2gguf.quantize.repair.assemble import WEIGHED
from f2gguf.quantize.repair.calibration import (
    Calibration,
    fitting,
    judging,
    layer_shapes,
    most_tokens,
    sampled,
    spliced,
    token_budget,
)
from f2gguf.quantize.repair.codes.compensate import COMPENSATED, N_CHECKED, cost
from f2gguf.quantize.repair.codes.parallel import all_cores, product
from f2gguf.quantize.repair.codes.tune import gradient_seconds, is_worth, training_seconds
from f2gguf.quantize.repair.tensors import quantize_rows, row_bytes
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.console import say
from f2gguf.runtime.files import format_size
from f2gguf.runtime.llama.threads import default_threads

_WORTH_SAYING = 120  # seconds
_WORTH_SAMPLING = 30  # seconds: without a sample, a run may take six times as long as was said
_BYTES_A_TOKEN = 3.5  # of text in UTF-8, where there is no tokenizer.json
_PASSES = 5  # over a checkpoint's bytes: hashed, cast, written, and read back
_FILES = 3  # of a variant that are on the disk at a time: codes, a candidate, and the file itself
_ARRAYS = 7  # of a number for each token and each of the widest columns, at a time
_SQUARES = 5  # of a number for each pair of the widest columns
# Products that each does in the time of one of large float32 matrices: 0.6B and 4B shapes, two cores, AVX-512. The
# stages of a kind that have ended correct this. Attention does about as many as numpy.
_SPEED = {"torch": 0.9, "llama.cpp": 1.9, "codes": 0.7}
_TYPE = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}  # of most weights of a variant, where it is called otherwise
Seconds = dict[str, float]  # by kind of work


@dataclass
class Outlook:
    """The stages of a run with what each is expected to take, and what those that ended took."""

    stages: dict[str, Seconds]
    memory_bytes: int
    disk_bytes: int
    begun: Collection[str] = ()  # stages that an earlier run did a part of: they tell nothing of the machine's pace
    took: dict[str, float] = field(default_factory=dict)  # seconds
    _pace: dict[str, float] = field(default_factory=dict)  # of a kind: seconds that passed for one that was expected

    @property
    def seconds_left(self) -> float:
        """Of the stages that have not ended."""
        return sum(self._expected(name) for name in self.stages if name not in self.took)

    def _expected(self, stage: str) -> float:
        return sum(seconds * self._pace.get(kind, 1) for kind, seconds in self.stages.get(stage, {}).items())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, correct what is expected of the others of its kinds, and say what is left."""
        begin = time.monotonic()
        yield
        passed, expected = time.monotonic() - begin, self._expected(name)
        for kind in self.stages.get(name, {}) if name not in self.begun else ():
            self._pace[kind] = self._pace.get(kind, 1) * passed / max(expected, 1e-9)
        self.took[name] = passed
        if self.seconds_left > _WORTH_SAYING:
            say(f"{name} took {_time(passed)}; about {_time(self.seconds_left)} left")

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_time(self._expected(name))}" for name in self.stages)
        memory, disk = format_size(self.memory_bytes), format_size(self.disk_bytes)
        return f"expected: {_time(self.seconds_left)} ({parts}), {memory} of memory beside the files, {disk} of disk"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds of each stage, and bytes."""
        seconds = {name: round(self._expected(name), 1) for name in self.stages}
        return {"seconds": seconds, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}

    def summary(self) -> str:
        """Where the time went."""
        parts = ", ".join(f"{name} {_time(seconds)}" for name, seconds in self.took.items())
        return f"took {_time(sum(self.took.values()))}: {parts}"


def expect(
    job: Job,
    base: str | None,
    variants: Sequence[str],
    texts: Sequence[EvalText],
    claimed: Sequence[EvalText],
    calibration: Calibration | None,
    *,
    speeds: Mapping[str, float] | None = None,
) -> Outlook:
    """What a run takes that makes `variants`, and before them the file `base` if it is named.

    Work with matrices is counted in products: one for each weight of the layers and each token. `speeds` are tokens/s
    of the files, by variant; without them, they are sampled where the run takes half a minute.
    """
    facts, machine, lengths = job.facts, _Machine.sample(), _counted(job.facts.checkpoint.tokenizer_path)
    shapes, n_all = layer_shapes(facts.tensors.items()), facts.checkpoint.n_parameters
    n_weights, widest = sum(map(math.prod, shapes)), max(n_cols for _, n_cols in shapes)
    n_attending = sum(it.shape[1] for name, it in facts.tensors.items() if name.endswith("attn_output.weight"))
    base_bytes = n_all * (2 if facts.base == "f16" else 4)
    stages: dict[str, Seconds] = {}
    memory_bytes, disk_bytes = 0.0, float(base_bytes if base else 0)

    def kept(calibrating: Sequence[EvalText]) -> list[float]:
        return lengths(calibrating, lambda text: most_tokens(text, facts.max_tokens))

    def through(name: str, some: Sequence[EvalText], calibrating: Sequence[EvalText] = ()) -> Seconds:
        kind = name if name in _SPEED else "llama.cpp"
        speed = (speeds or {}).get(name) or _SPEED[kind] * machine.products / n_weights
        n_tokens = [*lengths(some, lambda _: facts.max_tokens), *kept(calibrating)]
        return {kind: sum(n_tokens) / speed + n_attending * sum(n * n for n in n_tokens) / machine.products}

    base_file = facts.base.upper()
    if base:
        stages["convert"] = {"bytes": _PASSES * base_bytes / machine.bytes} | through(base_file, texts[:N_STEP_TEXTS])
        stages[f"measure {base}"] = through(base_file, texts)
        if can_check():
            stages["gate 1"] = through("torch", texts)
            memory_bytes = min(whole_bytes(n_all), available_memory_bytes())  # it runs in layers where there is less
    chosen: list[EvalText] = []
    judged: list[EvalText] = []
    codes, n_fitting, weighs = 0.0, 0, False
    if calibration:
        budget = token_budget(shapes)
        some = sampled(calibration.texts, budget)
        chosen, judged = fitting(some), judging(some)
        stages["calibrate"] = through(base_file, [], [*chosen, *judged])
        n_fitting = int(sum(kept([*chosen, *spliced(some, budget)])))
        n = n_fitting + min(sum(kept(judged)), 2 * N_CHECKED)
        if job.compensate and any(_TYPE.get(name, name) in COMPENSATED for name in variants):
            memory_bytes = max(memory_bytes, 4 * (_ARRAYS * n * widest + _SQUARES * widest**2))
        codes = sum(cost(shape, int(n)) for shape in shapes) / (_SPEED["codes"] * machine.own_products)
    for name in variants:
        kind = _TYPE.get(name, name)
        compensates = bool(calibration) and job.compensate and kind in COMPENSATED
        # llama.cpp's own recipe, then candidates and what they choose. Codes with feedback come ready.
        n_candidates = bool(calibration) + compensates
        n_files = 1 + (bool(calibration) and kind in WEIGHED)
        n_quantised = (1 + bool(calibration)) * n_all + 2 * compensates * (n_all - n_weights)
        stages[name] = {"quantise": n_quantised / _weights_a_second(kind)}
        stages[name] |= through(name, [*claimed] * n_files, judged * n_candidates)
        if compensates:
            stages[name]["codes"] = codes
            if is_worth(job.tune, training_seconds, n_weights, n_fitting):
                stages[name]["training"] = training_seconds(n_weights, n_fitting)
            if is_worth(job.tune, gradient_seconds, n_weights, n_fitting) and not weighs:
                weighs, stages[name]["gradients"] = True, gradient_seconds(n_weights, n_fitting)
        disk_bytes += _FILES * n_all * row_bytes(kind, 256) / 256
    begun = ("calibrate", *variants[:1]) if base is None and job.work.exists() else ()
    outlook = Outlook(stages, int(memory_bytes), int(disk_bytes), begun)
    if speeds is None and outlook.seconds_left >= _WORTH_SAMPLING:
        return expect(job, base, variants, texts, claimed, calibration, speeds=_speeds(facts, variants))
    return outlook


@dataclass(frozen=True)
class _Machine:
    """What this machine does in a second, on all cores."""

    products: float  # of float32 numbers, by numpy
    own_products: float  # as compensation multiplies
    bytes: float  # hashed

    @classmethod
    @cache
    def sample(cls) -> _Machine:
        square, data = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32), bytes(1 << 24)
        with all_cores():
            products, own = (1024**3 / _seconds(partial(product, square, right)) for right in (square, square.T))
        return cls(products, own, len(data) / _seconds(lambda: hashlib.sha256(data)))


@cache
def _weights_a_second(kind: str) -> float:
    rows = np.random.default_rng(0).standard_normal((64, 1024), dtype=np.float32)
    return default_threads() * rows.size / _seconds(lambda: quantize_rows(rows, kind, np.ones(1024, dtype=np.float32)))


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some runs."""
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return min(took)


@cache
def _counted(path: Path) -> Callable[[Sequence[EvalText], Callable[[EvalText], int]], list[float]]:
    """What counts the tokens of texts, each up to the most that are kept: nearly, as it knows nothing of prompts."""
    if not path.is_file():
        return lambda texts, most: [min(len(text.text.encode()) / _BYTES_A_TOKEN, most(text)) for text in texts]
    tokenizer, known = tokenizers.Tokenizer.from_file(str(path)), dict[str, int]()
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def lengths(texts: Sequence[EvalText], most: Callable[[EvalText], int]) -> list[float]:
        new = list({text.text: None for text in texts if text.text not in known})
        known.update(zip(new, map(len, tokenizer.encode_batch(new)), strict=True))
        return [min(known[text.text], most(text)) for text in texts]

    return lengths


def _speeds(facts: Facts, variants: Sequence[str]) -> dict[str, float]:
    """Tokens/s of the base file and the variants, by a sample of their layers."""
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="f2gguf-outlook-") as name:
        for candidate in planned(facts, variants, Path(name)):
            path = Path(name, "excerpt.gguf")
            speed = sampled_speed(candidate, path, pooling=facts.pooling, n_threads=default_threads())
            speeds[candidate.variant] = speed.tokens_per_s or 0.0
    return speeds


def _time(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
