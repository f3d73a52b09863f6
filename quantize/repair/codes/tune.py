"""Whether torch weighs tokens and trains scales: an optional package, which `gradients` and `training` import."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from f2gguf.quantize.repair.assemble import Ready
from f2gguf.quantize.repair.codes.blocks import Floats
from f2gguf.quantize.repair.codes.compensate import Compensation, vector_names
from f2gguf.quantize.repair.tensors import Rows, Weights
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import ExtraMissing
from f2gguf.runtime.files import sha256_file, sha256_text, writing
from f2gguf.runtime.llama.packing import Ids
from numpy.typing import NDArray

Estimate = Callable[[int, int], float]  # of seconds, by weights in matrices and tokens in texts
MAX_MINUTES = 5  # that training may take where nobody asked for it


@dataclass(frozen=True)
class Objective:
    """Token ids of texts, and the vectors that they should have, (n_texts, n_embd)."""

    ids: Sequence[Ids]
    vectors: Rows


def require_torch(what: str) -> None:
    """Raise `ExtraMissing` without torch."""
    if find_spec("torch") is None:
        raise ExtraMissing(f"{what}, which takes torch. Run: pip install 'f2gguf[evals]'")


def tuning_arithmetic() -> str:
    """What trained scales depend on beside the inputs."""
    from f2gguf.quantize.repair.codes.training import device

    return f"torch {version('torch')}, {device()}"


def training_seconds(n_weights: int, n_tokens: int) -> float:
    """How long scales are trained."""
    from f2gguf.quantize.repair.codes.training import estimated_seconds

    return estimated_seconds(n_weights, n_tokens)


def gradient_seconds(n_weights: int, n_tokens: int) -> float:
    """How long the gradients that weigh tokens take."""
    from f2gguf.quantize.repair.codes import gradients, training

    return training.estimated_seconds(n_weights, n_tokens, gradients.PASSES)


def is_worth(wanted: bool | None, seconds: Estimate, n_weights: int, n_tokens: int, *, without: str = "") -> bool:
    """Whether to do what takes `seconds`: as `wanted`, or for None where torch is there and they are few enough.

    That is MAX_MINUTES. Where they are more, says that the work goes on `without`. Raises `ExtraMissing` where it is
    wanted and torch is not there.
    """
    if wanted:
        require_torch("--tune trains scales")
    if wanted is not None or find_spec("torch") is None:
        return bool(wanted)
    minutes = seconds(n_weights, n_tokens) / 60
    if minutes > MAX_MINUTES and without:
        say(f"  {without}, which would take about {minutes:,.0f} minutes here (--tune)")
    return minutes <= MAX_MINUTES


def weighed(weights: Weights, fitting: Sequence[Ids], work: Path) -> dict[str, Floats]:
    """The `gradient_weights` of tokens, which are kept in `work` for all recipes of the model."""
    from f2gguf.quantize.repair.codes.gradients import gradient_weights, n_steps

    inputs = [
        sha256_file(weights.header.path),
        tuning_arithmetic(),
        sha256_text(str([ids.tolist() for ids in fitting])),
    ]
    path = work / f"gradients-{sha256_text(json.dumps(inputs))}.npz"
    if not path.exists():
        with progress("gradients", n_steps(fitting)) as advance:
            found = gradient_weights(weights, fitting, advance)
        with writing(path) as part, part.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def tuned(
    compensation: Compensation,
    types: Mapping[str, str],
    ready: Ready,
    fitting: Objective,
    judging: Objective,
    *,
    label: str,
) -> dict[str, NDArray[np.uint8]]:
    """`ready` with scales that are trained on `fitting`, and every vector of the layers, trained as well."""
    from f2gguf.quantize.repair.codes.training import n_steps, train

    trained = {
        name: ready[name].reshape(-1).view(np.float32) if name in ready else compensation.vector(name)
        for name in vector_names(compensation.weights.header)
    }
    with progress(label, n_steps(fitting)) as advance:
        return train(compensation.weights, types, ready, trained, fitting=fitting, judging=judging, on_progress=advance)
