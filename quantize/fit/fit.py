"""`f2gguf fit`: which file runs here, or on a device, in how much memory, how well, how fast, and at what price."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from f2gguf.quantize.fit.excerpt import sampled_speed
from f2gguf.quantize.fit.goal import Wish, choose, parse_goal
from f2gguf.quantize.fit.plan import Candidate, candidates, require_variants
from f2gguf.quantize.fit.quality import Quality, quality_of
from f2gguf.quantize.repair.plan import DEFAULT_VARIANTS
from f2gguf.quantize.source.facts import NOTHING, Stated
from f2gguf.quantize.source.lock import Lock, read_lock
from f2gguf.runtime.errors import OutOfReach, WrongUsage
from f2gguf.runtime.files import format_size
from f2gguf.runtime.fit.devices import Device, require_device, work_of
from f2gguf.runtime.fit.memory import MAX_TOKENS, Memory, ModelMemory, memory_of, model_memory
from f2gguf.runtime.fit.speed import Speed
from f2gguf.runtime.llama.threads import require_threads

N_TEXTS, N_TOKENS = 1e6, 128  # of a corpus, where the user does not say
_PRECISION_BITS = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}
_MOST = 1e15  # texts or tokens


@dataclass(frozen=True)
class Corpus:
    """What a corpus takes: hours, and money where there is a price."""

    hours: float
    cost: float | None


@dataclass(frozen=True)
class Fit:
    """What is known of one file. Figures are of this machine, or estimates of `device`."""

    model: str
    variant: str
    size_bytes: int
    is_made: bool
    quality: Quality | None
    memory: Memory
    fits: bool | None  # on the device; None for this machine
    speed: Speed | None  # None where nothing is measured or stated that it follows from
    corpus: Corpus | None
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}"

    @property
    def figures(self) -> dict[str, float | None]:
        """What wishes are compared with: of a range of drifts, the upper end; None for what is not known."""
        quality, speed, corpus = self.quality, self.speed, self.corpus
        return {
            "drift": quality.high if quality else None,
            "size": self.size_bytes,
            "memory": self.memory.total_bytes,
            "vram": self.memory.vram_bytes,
            "latency": speed.query_ms if speed else None,
            "speed": speed.tokens_per_s if speed else None,
            "cost": corpus.cost if corpus else None,
        }


@dataclass(frozen=True)
class Fits:
    """All files, and the one that a goal picks."""

    files: tuple[Fit, ...]
    max_tokens: int
    parallel: int
    n_texts: float
    n_tokens: float
    device: Device | None
    price: float | None  # of an hour
    goal: str | None = None
    chosen: str | None = None  # the file that grants all wishes
    closest: str | None = None  # where none does
    failing: dict[str, float | None] | None = None  # the wishes that the closest file fails, and its figures

    @property
    def best(self) -> Fit | None:
        """The file that grants all wishes; None where none does, or nobody wished."""
        return next((file for file in self.files if file.name == self.chosen), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the figures, and what memory is made of; what is not known is null."""
        document = asdict(self)
        for file, it in zip(document["files"], self.files, strict=True):
            file["memory"] |= {"total_bytes": it.memory.total_bytes, "required_bytes": it.memory.required_bytes}
            file["vectors"] = vectors(it.dims, it.corpus.cost if it.corpus else None)
        return document


def fit(
    models: str | Path | Sequence[str | Path],
    *,
    variants: str | Sequence[str] = DEFAULT_VARIANTS,
    goal: str | None = None,
    max_tokens: int | None = None,
    parallel: int = 1,
    device: str | None = None,
    price: float | None = None,
    n_texts: float = N_TEXTS,
    n_tokens: float | None = None,
    n_threads: int | None = None,
    sample: bool = True,
    lock: Path | None = None,
    stated: Stated = NOTHING,
) -> Fits:
    """What the files of `models` take and give: those that are there, and those that `quantize all` would make.

    A model is a .gguf file or a folder of them, a name of models.lock, a checkpoint folder, or org/name[@revision] on
    the Hub, of which only small files are downloaded. Memory is for texts of up to `max_tokens` and `parallel`
    requests. Speeds are sampled here (not with `sample=False`), or estimated for a `device` of runtime/devices.toml.
    `price` is of an hour; without it, the one that is known of the device.
    `goal` is such as "drift<1%,memory<3GB,latency<50ms".

    Raises `WrongUsage` and `UnknownName` for arguments that cannot work, and what opening a model raises.
    """
    named = [models] if isinstance(models, str | Path) else list(models)
    estimated = require_device(device) if device is not None else None
    question = _Question(
        variants=require_variants(variants if isinstance(variants, str) else ",".join(variants)),
        max_tokens=max_tokens,
        parallel=parallel,
        device=estimated,
        price=estimated.price if price is None and estimated else price,
        n_texts=n_texts,
        n_tokens=n_tokens,
        n_threads=require_threads(n_threads),
        sample=sample,
        stated=stated,
    )
    wishes = parse_goal(goal) if goal is not None else []
    _require_answerable(named, question, wishes)
    locked, files = read_lock(lock), list[Fit]()
    with tempfile.TemporaryDirectory(prefix="f2gguf-fit-") as name:
        for i, model in enumerate(named):
            files += _files(str(model), question, locked, Path(name, str(i)))
    names = [file.name for file in files]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise WrongUsage(f"{repeated}: two files are called so. Name each once.")
    found = Fits(
        files=tuple(files),
        max_tokens=max_tokens or MAX_TOKENS,
        parallel=parallel,
        n_texts=n_texts,
        n_tokens=n_tokens or N_TOKENS,
        device=question.device,
        price=question.price,
    )
    if not wishes:
        return found
    # what does not fit the device grants no wish
    index, failing = choose(
        wishes, [file.figures if file.fits is not False else dict.fromkeys(file.figures) for file in files]
    )
    granted, closest = (None, names[index]) if failing else (names[index], None)
    return replace(found, goal=goal, chosen=granted, closest=closest, failing=failing or None)


def largest_within(limit: int, model: str, variants: Sequence[str], *, lock: Path | None, stated: Stated) -> str:
    """The largest of the `variants` of a model that run within `limit` bytes of memory; `OutOfReach` if none does."""
    found = fit(model, variants=variants, sample=False, lock=lock, stated=stated).files
    files = [file for file in found if file.variant in variants]
    fitting = [file for file in files if file.memory.total_bytes <= limit]
    if not fitting:
        least = min(files, key=lambda file: file.memory.total_bytes)
        raise OutOfReach(
            f"{model}: no variant runs in {format_size(limit)} (--fit). {least.variant} takes "
            f"{format_size(least.memory.total_bytes)}, the least of {', '.join(variants)}."
        )
    return max(fitting, key=lambda file: file.size_bytes).variant


@dataclass(frozen=True)
class _Question:
    """The arguments of `fit`, looked up."""

    variants: list[str]
    max_tokens: int | None
    parallel: int
    device: Device | None
    price: float | None
    n_texts: float
    n_tokens: float | None
    n_threads: int
    sample: bool
    stated: Stated


def _require_answerable(named: Sequence[object], question: _Question, wishes: Sequence[Wish]) -> None:
    flags = {"--texts": question.n_texts, "--tokens": question.n_tokens, "--price": question.price}
    for flag, value in flags.items():
        if value is not None and not 0 < value <= _MOST:
            raise WrongUsage(f"{flag} {value:g}: pass a number above 0, at most {_MOST:g}.")
    if not named:
        raise WrongUsage("fit: names no model. Pass a .gguf file, a name of models.lock, a folder, or org/name.")
    if question.parallel < 1:
        raise WrongUsage(f"--parallel {question.parallel}: pass a whole number from 1.")
    asked = {wish.name for wish in wishes}
    if "cost" in asked and question.price is None:
        raise WrongUsage("--goal has a wish about cost, and no price is known: say what an hour costs, with --price.")
    if asked & {"latency", "speed", "cost"} and not question.sample and question.device is None:
        raise WrongUsage("--goal has a wish about speed, and --no-sample measures none: leave one of them out.")


def _files(model: str, question: _Question, lock: Lock, folder: Path) -> list[Fit]:
    """What is known of the files of one model. `folder` gets what is needed to find out."""
    folder.mkdir()
    found = candidates(model, question.variants, lock, folder, stated=question.stated)
    header = found[0].header
    pooling = header.require_pooling(question.stated.pooling)
    longest = min(header.require_max_tokens(question.max_tokens), question.max_tokens or MAX_TOKENS)
    memory = model_memory(header, max_tokens=longest, parallel=question.parallel, pooling=pooling)
    return [_fit(candidate, question, memory, pooling, folder) for candidate in found]


def _fit(candidate: Candidate, question: _Question, model: ModelMemory, pooling: str, folder: Path) -> Fit:
    header, device = candidate.header, question.device
    memory = memory_of(model, header, candidate.size_bytes)
    speed: Speed | None = None
    if device is not None:
        speed = device.speed(work_of(header))
    elif question.sample:
        n_tokens, path = question.n_tokens, folder / "excerpt.gguf"
        of_length = None if n_tokens is None else max(1, round(min(n_tokens, header.max_tokens)))
        speed = sampled_speed(candidate, path, pooling=pooling, n_threads=question.n_threads, n_tokens=of_length)
    return Fit(
        model=candidate.model,
        variant=candidate.variant,
        size_bytes=candidate.size_bytes,
        is_made=candidate.is_made,
        quality=quality_of(candidate),
        memory=memory,
        fits=None if device is None else device.holds(memory),
        speed=speed,
        corpus=_corpus(speed, question.n_texts, min(question.n_tokens or N_TOKENS, header.max_tokens), question.price),
        dims=header.dims,
    )


def vectors(dims: Sequence[int], cost_of_million: float | None) -> list[dict[str, Any]]:
    """What a million vectors take at each width and precision, and what computing a GB of them costs."""
    rows = []
    for width in dims:
        for precision, bits in _PRECISION_BITS.items():
            n_bytes = 1e6 * math.ceil(width * bits / 8)
            cost = None if cost_of_million is None else cost_of_million / (n_bytes / 1e9)
            rows.append({"width": width, "precision": precision, "gb_of_million": n_bytes / 1e9, "cost_of_gb": cost})
    return rows


def _corpus(speed: Speed | None, n_texts: float, n_tokens: float, price: float | None) -> Corpus | None:
    if speed is None or speed.tokens_per_s is None:
        return None
    seconds_a_text = n_tokens / speed.tokens_per_s
    cost = None if price is None else price * 1e6 * seconds_a_text / 3600
    return Corpus(n_texts * seconds_a_text / 3600, cost)
