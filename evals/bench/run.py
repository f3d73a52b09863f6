"""`f2gguf bench`: f2gguf and other runtimes embed the same texts in turn, each in a process of its own."""

from __future__ import annotations

import math
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.bench.process import SideProcess, started
from f2gguf.evals.bench.sides import LLAMA_EMBED, LLAMA_SERVER, OURS, TRANSFORMERS, SideSettings
from f2gguf.evals.bench.texts import Workload
from f2gguf.evals.drift import drift
from f2gguf.evals.endpoint import open_endpoint, require_client, shown_url
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import BenchFailed, ExtraMissing, WrongUsage
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.library import require_device
from f2gguf.runtime.llama.runner import unusable
from f2gguf.runtime.llama.threads import cpu_name, default_threads, require_threads
from numpy.typing import NDArray

N_CTX = 512  # context of the other sides, or a multiple for longer texts
PAUSE_S = 0.25  # before each measurement: LLVM's OpenMP threads spin for 0.2 s after their work (KMP_BLOCKTIME)

Answers = dict[str, list[dict[str, Any]]]  # side -> its answer in each round


def choose_sides(
    header: Header,
    *,
    pooling: str | None = None,
    device: str = "auto",
    n_threads: int | None = None,
    checkpoint: Path | None = None,
    llama_server: str | None = None,
    server_flags: str = "",
    urls: Sequence[str] = (),
    url_models: Sequence[str] = (),
    api_key_envs: Sequence[str] = (),
) -> dict[str, SideSettings]:
    """Name -> settings of every side, f2gguf first. All settings are checked before a side starts."""
    require_device(device)
    common = SideSettings(str(header.path), header.require_pooling(pooling), device, require_threads(n_threads))
    sides = {OURS: common, LLAMA_EMBED: common}
    if server_flags and not llama_server:
        raise WrongUsage("--server-flags: name the program as well, with --llama-server BINARY.")
    if llama_server:
        server = _require_server(llama_server)
        sides[LLAMA_SERVER] = replace(common, llama_server=server, server_flags=_split(server_flags))
    if checkpoint:
        _require_checkpoint(checkpoint)
        sides |= dict.fromkeys(TRANSFORMERS, replace(common, checkpoint=str(checkpoint)))
    models = _for_each(urls, "--url-model", url_models)
    for url, model, key_env in zip(urls, models, _for_each(urls, "--api-key-env", api_key_envs), strict=True):
        open_endpoint(url, key_env=key_env)
        name = f"{shown_url(url)} {model or ''}".strip()
        sides[name] = replace(common, url=url, url_model=model, api_key_env=key_env)
    return sides


def run_bench(
    header: Header, sides: Mapping[str, SideSettings], workloads: Sequence[Workload], *, rounds: int
) -> dict[str, Any]:
    """Measure every side on every workload: the figures of `f2gguf bench --json`, times in seconds.

    The vectors of a warm-up round are compared. Then the sides take turns in `rounds` rounds. Raises `BenchFailed` for
    a side that ends, or whose vectors cannot be compared. Llama.embed, which nobody asked for, is left out where it
    cannot embed a first text, and a line says why.
    """
    n_ctx = math.ceil(max(workload.longest for workload in workloads) / N_CTX) * N_CTX
    say(f"bench: {', '.join(sides)}")
    with (
        started({name: replace(settings, n_ctx=n_ctx) for name, settings in sides.items()}) as processes,
        progress("bench", len(workloads) * len(sides) * (1 + rounds)) as advance,
    ):
        setups = _ready(processes)
        measured = [_measure(workload, processes, rounds, advance) for workload in workloads]
    return {
        "model": {
            "path": str(header.path),
            "name": header.name,
            "file_type": header.file_type,
            "size_bytes": header.path.stat().st_size,
            "pooling": sides[OURS].pooling,
            "checkpoint": next((side.checkpoint for side in sides.values() if side.checkpoint), None),
        },
        "machine": _machine_facts(sides[OURS]),
        "versions": _versions(sides),
        "rounds": rounds,
        "sides": _side_figures(setups, [work["answers"] for work in measured]),
        "work": {
            workload.name: _work_figures(workload, **work) for workload, work in zip(workloads, measured, strict=True)
        },
    }


def _ready(processes: dict[str, SideProcess]) -> dict[str, str]:
    """How each side is run, once it has embedded a first text. Takes Llama.embed out of `processes` if it cannot."""
    setups = {}
    for name, process in list(processes.items()):
        try:
            setup = process.answer()["setup"]
            process.ask(texts=["a"], prompt="", with_vectors=False)
        except BenchFailed as error:
            if name != LLAMA_EMBED:
                raise
            say(f"left out: {error}")
            del processes[name]
        else:
            setups[name] = setup
    return setups


def _measure(
    workload: Workload, processes: Mapping[str, SideProcess], rounds: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """The answers of all rounds, and each side's smallest cosine with our vectors."""

    def ask(name: str, *, with_vectors: bool = False) -> dict[str, Any]:
        time.sleep(PAUSE_S)
        answer = processes[name].ask(texts=list(workload.texts), prompt=workload.prompt, with_vectors=with_vectors)
        advance(1)
        return answer

    vectors = {name: ask(name, with_vectors=True)["vectors"] for name in processes}
    cosines = {name: _min_cosine(name, vectors[OURS], theirs) for name, theirs in vectors.items()}
    turns = [{name: ask(name) for name in processes} for _ in range(rounds)]
    return {"answers": {name: [turn[name] for turn in turns] for name in processes}, "cosines": cosines}


def _min_cosine(name: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if theirs.shape != ours.shape:
        shapes = f"{theirs.shape}, f2gguf of {ours.shape}"
        raise BenchFailed(f"{name}: gives vectors of shape {shapes}: these are different models.")
    if unusable(theirs):
        raise BenchFailed(f"{name}: gives vectors that are not finite, or zero. Try --device cpu, or another file.")
    return float(1 - drift(theirs, ours).max())


def _work_figures(workload: Workload, answers: Answers, cosines: dict[str, float]) -> dict[str, Any]:
    medians = {name: statistics.median(answer["seconds"] for answer in rounds) for name, rounds in answers.items()}
    return {
        "n_texts": len(workload.texts),
        "n_tokens": workload.n_tokens,
        "longest": workload.longest,
        "prompt": workload.prompt,
        "sides": {
            name: {
                "rounds_s": [answer["seconds"] for answer in answers[name]],
                "median_s": median_s,
                "texts_per_s": len(workload.texts) / median_s,
                "tokens_per_s": workload.n_tokens / median_s,
                "ratio": median_s / medians[OURS],
                "min_cosine": cosines[name],
            }
            for name, median_s in medians.items()
        },
    }


def _side_figures(setups: dict[str, str], measured: Sequence[Answers]) -> dict[str, Any]:
    """How each side was run, its peak memory over all workloads, and our peak as a share of it."""
    peaks = {name: max(answers[name][-1]["peak_rss_bytes"] or 0 for answers in measured) for name in setups}
    shares = {name: peaks[OURS] / peak if peak else None for name, peak in peaks.items()}
    return {
        name: {"setup": setup, "peak_rss_bytes": peaks[name] or None, "rss_ratio": shares[name]}
        for name, setup in setups.items()
    }


def _machine_facts(settings: SideSettings) -> dict[str, Any]:
    """Processor and threads, and the instructions that this llama.cpp was built for."""
    import llama_cpp

    return {
        "cpu": cpu_name(),
        "n_physical_cores": default_threads(),
        "n_threads": settings.n_threads,
        "device": settings.device,
        "llama_cpp_system_info": llama_cpp.llama_print_system_info().decode().strip(" |\n"),
    }


def _versions(sides: Mapping[str, SideSettings]) -> dict[str, str]:
    """Name -> version of what takes part."""
    packages = ["f2gguf", "llama-cpp-python", "numpy"]
    packages += ["sentence-transformers", "transformers", "torch"] if TRANSFORMERS.keys() & sides.keys() else []
    numbers = {"python": platform.python_version()} | {name: version(name) for name in packages}
    if LLAMA_SERVER in sides:
        printed = re.findall("version:(.*)", _output(str(sides[LLAMA_SERVER].llama_server), "--version"))
        numbers[LLAMA_SERVER] = (printed or ["unknown"])[0].strip()
    return numbers


def _output(*command: str) -> str:
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return process.stdout + process.stderr


def _require_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        hint = "Pass the folder that the file was made from."
        raise WrongUsage(f"{folder}: is no checkpoint folder, it has no config.json (--checkpoint). {hint}")
    if missing := [name for name in ("sentence-transformers", "torch") if not find_spec(name.replace("-", "_"))]:
        raise ExtraMissing(f"--checkpoint: not installed: {', '.join(missing)}. Run: pip install {' '.join(missing)}")


def _require_server(binary: str) -> str:
    if path := shutil.which(binary):
        require_client("--llama-server")
        return path
    hint = "Build llama-server from llama.cpp's source, or give its path."
    raise WrongUsage(f"{binary}: no such program (--llama-server). {hint}")


def _split(flags: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(flags))
    except ValueError as error:
        raise WrongUsage(f"--server-flags {flags!r}: {error}.") from error


def _for_each(urls: Sequence[str], flag: str, values: Sequence[str]) -> Sequence[str | None]:
    """The value of `flag` for every URL: none, one for all, or one each."""
    if values and (not urls or len(values) not in (1, len(urls))):
        raise WrongUsage(f"{flag}: give it once for all URLs, or once for each --url, in their order.")
    return values if len(values) == len(urls) else [values[0] if values else None] * len(urls)
