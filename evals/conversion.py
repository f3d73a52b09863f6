"""Gate 1: does the converted file do what the checkpoint does? F16 vectors against full-precision references."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.drift import drift
from f2gguf.evals.full_precision import TRANSFORMERS, choose_run, require_transformers
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, texts_sha256
from f2gguf.runtime.errors import ExtraMissing, MemoryMissing
from numpy.typing import NDArray

# F16 rounds weights by up to 2**-11, which gave minimum cosines of 0.999997 on f2llm-nano and 0.999994 on
# all-MiniLM-L6-v2. An error of the implementation (wrong token, pooling or epsilon) costs far more than what is left.
MIN_COSINE = 0.9999
REFERENCES = Path(__file__).with_name("references")
STORED = f"stored vectors ({TRANSFORMERS})"
NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class ConversionCheck:
    """The outcome of gate 1. `reference` names the baseline, or says that nothing was checked, for the reason `why`."""

    reference: str
    why: str = ""
    n: int = 0
    min_cosine: float | None = None
    mean_cosine: float | None = None
    worst_text: str = ""

    @property
    def holds(self) -> bool | None:
        """None where nothing was checked."""
        return None if self.min_cosine is None else self.min_cosine >= MIN_COSINE

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "required_min_cosine": MIN_COSINE, "holds": self.holds}


def check_conversion(
    vectors: Vectors,
    texts: Sequence[EvalText],
    *,
    folder: Path,
    checkpoint_sha256: str,
    n_parameters: int,
    token_ids: Callable[[], list[NDArray[np.int32]]],
    pooling: str,
    dense: Sequence[Path] = (),
    on_progress: Callable[[int], None] | None = None,
) -> ConversionCheck:
    """Compare F16 vectors with the best reference at hand.

    This is transformers in float32 if it is installed, whole or layer by layer as the memory allows; else the vectors
    that are stored for this checkpoint and these texts; else nothing, and the outcome says so.
    """
    try:
        run, name = choose_run(folder, n_parameters)
    except (ExtraMissing, MemoryMissing) as error:
        stored = find_stored(checkpoint_sha256, texts)
        return ConversionCheck(NOT_CHECKED, str(error)) if stored is None else compare(vectors, stored, texts, STORED)
    reference = run(folder, token_ids(), pooling=pooling, dense=dense, on_progress=on_progress)
    return compare(vectors, reference, texts, name)


def can_check() -> bool:
    """Whether checkpoints can be run here, so that any conversion can be checked."""
    with contextlib.suppress(ExtraMissing):
        require_transformers()
        return True
    return False


def compare(vectors: Vectors, reference: Vectors, texts: Sequence[EvalText], name: str) -> ConversionCheck:
    """The outcome, from the cosine of every vector with its reference."""
    cosines = 1.0 - drift(vectors, reference)
    min_cosine, mean_cosine = (round(float(value), 6) for value in (cosines.min(), cosines.mean()))
    return ConversionCheck(name, "", len(texts), min_cosine, mean_cosine, worst_text=texts[int(cosines.argmin())].id)


def find_stored(checkpoint_sha256: str, texts: Sequence[EvalText]) -> Vectors | None:
    """The vectors that `scripts/references` stored for this checkpoint and these texts, or None."""
    from safetensors import safe_open

    for path in sorted(REFERENCES.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            if file.metadata() == _metadata(checkpoint_sha256, texts):
                return np.asarray(file.get_tensor("vectors"))
    return None


def store(path: Path, vectors: Vectors, checkpoint_sha256: str, texts: Sequence[EvalText]) -> None:
    """Write reference vectors as float16, which moves a cosine by less than 1e-7."""
    from safetensors.numpy import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({"vectors": vectors.astype(np.float16)}, path, metadata=_metadata(checkpoint_sha256, texts))


def _metadata(checkpoint_sha256: str, texts: Sequence[EvalText]) -> dict[str, str]:
    return {"checkpoint_sha256": checkpoint_sha256, "texts_sha256": texts_sha256(texts), "reference": TRANSFORMERS}
