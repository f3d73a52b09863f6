"""Whether scales are trained, which takes torch: an optional package, which `training` alone imports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
from f2gguf.quantize.repair.assemble import Ready
from f2gguf.quantize.repair.codes.compensate import Compensation
from f2gguf.quantize.repair.tensors import Rows
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import ExtraMissing
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.packing import Ids
from numpy.typing import NDArray

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


def should_tune(wanted: bool | None, header: Header, fitting: Sequence[Ids]) -> bool:
    """Whether to train: as `wanted`, or for None where torch is there and it takes at most MAX_MINUTES."""
    if wanted is not None or find_spec("torch") is None:
        return bool(wanted)
    from f2gguf.quantize.repair.codes.training import estimated_seconds

    n_weights = sum(math.prod(t.shape) for t in header.tensors if len(t.shape) == 2 and t.name.startswith("blk."))
    minutes = estimated_seconds(n_weights, sum(map(len, fitting))) / 60
    if minutes <= MAX_MINUTES:
        return True
    say(f"  scales are not trained, which would take about {minutes:,.0f} minutes here (--tune)")
    return False


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

    header = compensation.weights.header
    names = [t.name for t in header.tensors if len(t.shape) == 1 and t.name.startswith(("blk.", "output_norm."))]
    trained = {
        name: ready[name].reshape(-1).view(np.float32) if name in ready else compensation.vector(name) for name in names
    }
    with progress(label, n_steps(fitting)) as advance:
        return train(compensation.weights, types, ready, trained, fitting=fitting, judging=judging, on_progress=advance)
