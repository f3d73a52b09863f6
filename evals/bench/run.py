"""`f2gguf bench`: f2gguf and other runtimes on the same texts, in turn, each in a process of its own."""

from __future__ import annotations

import math
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.bench.machine import cold_start, machine_facts, matmul_gflops, versions
from f2gguf.evals.bench.process import SideProcess, started
from f2gguf.evals.bench.sides import LLAMA_EMBED, LLAMA_SERVER, OURS, TRANSFORMERS, SideSettings
from f2gguf.evals.bench.texts import Workload
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import BenchFailed, ExtraMissing, WrongUsage
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.library import default_threads, require_device
from numpy.typing import NDArray

N_CTX = 512  # room of the other sides; more where a text is longer
PAUSE_S = 0.25  # before each measurement: LLVM's OpenMP threads spin for 0.2 s after their work (KMP_BLOCKTIME)
_PACKAGES = {"sentence_transformers": "sentence-transformers", "torch": "torch"}  # module -> what pip installs


def settle_sides(
    header: Header,
    *,
    pooling: str | None,
    device: str,
    n_threads: int | None,
    checkpoint: Path | None,
    llama_server: str | None,
    server_flags: str,
) -> SideSettings:
    """What every side is given, checked before anything starts."""
    require_device(device)
    if checkpoint:
        _require_checkpoint(checkpoint)
    return SideSettings(
        model=str(header.path),
        pooling=header.require_pooling(pooling),
        device=device,
        n_threads=n_threads or default_threads(),
        n_ctx=N_CTX,
        checkpoint=str(checkpoint) if checkpoint else None,
        llama_server=_require_server(llama_server, server_flags),
        server_flags=_split(server_flags),
    )


def run_bench(header: Header, settings: SideSettings, workloads: Sequence[Workload], *, rounds: int) -> dict[str, Any]:
    """Measure every side on every workload: the figures of `f2gguf bench --json`, times in seconds.

    A warm-up round, of which the vectors are compared, then `rounds` rounds in which the sides take turns. Raises
    `BenchFailed` for a side that ends, or whose vectors cannot be compared.
    """
    longest = max(workload.longest for workload in workloads)
    settings = replace(settings, n_ctx=max(N_CTX, math.ceil(longest / N_CTX) * N_CTX))
    names = [OURS, LLAMA_EMBED, *([LLAMA_SERVER] if settings.llama_server else [])]
    names += TRANSFORMERS if settings.checkpoint else []
    say(f"bench: {', '.join(names)}")
    with (
        started(names, settings) as sides,
        progress("bench", len(workloads) * len(names) * (1 + rounds)) as advance,
    ):
        setups = {name: side.answer()["setup"] for name, side in sides.items()}
        measured = [_measure(workload, sides, rounds, advance) for workload in workloads]
    say("bench: cold start and matmul peak")
    report = {
        "model": _model_facts(header, settings),
        "machine": machine_facts(settings),
        "versions": versions(settings),
        "cold_start": cold_start(settings),
        "matmul_gflops": matmul_gflops(settings.n_threads),
        "rounds": rounds,
        "sides": _side_figures(setups, [answers for answers, _ in measured]),
    }
    report["work"] = {
        workload.name: _work_figures(workload, answers, cosines, report)
        for workload, (answers, cosines) in zip(workloads, measured, strict=True)
    }
    return report


Answers = dict[str, list[dict[str, Any]]]  # side -> what it answered in each round


def _measure(
    workload: Workload, sides: dict[str, SideProcess], rounds: int, advance: Callable[[int], None]
) -> tuple[Answers, dict[str, float]]:
    """The answers of all rounds, and each side's smallest cosine with our vectors."""

    def ask(side: SideProcess, vectors_path: str | None = None) -> dict[str, Any]:
        time.sleep(PAUSE_S)
        answer = side.ask(texts=workload.texts, prompt=workload.prompt, vectors_path=vectors_path)
        advance(1)
        return answer

    vectors = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, side in sides.items():
            path = Path(folder) / "vectors.npy"
            ask(side, str(path))
            vectors[name] = np.load(path)
    cosines = {name: _min_cosine(name, vectors[OURS], theirs) for name, theirs in vectors.items()}
    answers: Answers = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(ask(side))
    return answers, cosines


def _min_cosine(name: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if theirs.shape != ours.shape:
        raise BenchFailed(
            f"{name}: gives vectors of shape {theirs.shape}, f2gguf of {ours.shape}: these are different models."
        )
    products = np.sum(ours.astype(np.float64) * theirs, axis=1)
    cosines = products / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    if not np.isfinite(cosines).all():
        raise BenchFailed(f"{name}: gives vectors that are not finite, or zero. Try --device cpu, or another file.")
    return float(cosines.min())


def _work_figures(
    workload: Workload, answers: Answers, cosines: dict[str, float], report: dict[str, Any]
) -> dict[str, Any]:
    medians = {name: statistics.median(answer["seconds"] for answer in rounds) for name, rounds in answers.items()}
    peak_tokens_per_s = report["matmul_gflops"] * 1e9 / report["model"]["flops_per_token"]
    sides = {
        name: {
            "rounds_s": [answer["seconds"] for answer in answers[name]],
            "median_s": median_s,
            "texts_per_s": len(workload.texts) / median_s,
            "tokens_per_s": workload.n_tokens / median_s,
            "ratio": median_s / medians[OURS],
            "min_cosine": cosines[name],
            "matmul_share": workload.n_tokens / median_s / peak_tokens_per_s,
        }
        for name, median_s in medians.items()
    }
    outside = [1 - answer["compute_seconds"] / answer["seconds"] for answer in answers[OURS]]
    return {
        "n_texts": len(workload.texts),
        "n_tokens": workload.n_tokens,
        "longest": workload.longest,
        "prompt": workload.prompt,
        "overhead": statistics.median(outside),
        "sides": sides,
    }


def _side_figures(setups: dict[str, str], measured: Sequence[Answers]) -> dict[str, Any]:
    """How each side was run, its peak memory over all workloads, and our peak as a share of it."""
    peaks = {name: [answer["peak_rss_bytes"] for answers in measured for answer in answers[name]] for name in setups}
    highest = {name: None if None in found else max(found) for name, found in peaks.items()}
    return {
        name: {"setup": setup, "peak_rss_bytes": peak, "rss_ratio": highest[OURS] / peak if peak else None}
        for (name, setup), peak in zip(setups.items(), highest.values(), strict=True)
    }


def _model_facts(header: Header, settings: SideSettings) -> dict[str, Any]:
    layers = [t.shape for t in header.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return {
        "path": settings.model,
        "name": header.name,
        "file_type": header.file_type,
        "size_bytes": header.path.stat().st_size,
        "pooling": settings.pooling,
        "checkpoint": settings.checkpoint,
        "flops_per_token": 2 * sum(rows * columns for rows, columns in layers),  # of the layers' matrices alone
    }


def _require_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise WrongUsage(
            f"{folder}: is no checkpoint folder, it has no config.json (--checkpoint). Pass the folder that the file "
            "was made from."
        )
    if missing := [package for module, package in _PACKAGES.items() if not find_spec(module)]:
        raise ExtraMissing(f"--checkpoint: not installed: {', '.join(missing)}. Run: pip install {' '.join(missing)}")


def _require_server(binary: str | None, flags: str) -> str | None:
    if binary is None:
        if flags:
            raise WrongUsage("--server-flags: name the program as well, with --llama-server BINARY.")
        return None
    found = shutil.which(binary)
    if not found:
        raise WrongUsage(
            f"{binary}: no such program (--llama-server). Build llama-server from llama.cpp's source, or give its path."
        )
    return found


def _split(flags: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise WrongUsage(f"--server-flags {flags!r}: {error}.") from error
