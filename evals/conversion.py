"""Gate 1: does the converted file do what the checkpoint does? F16 vectors against full-precision references."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import EvalText, texts_sha256
from f2gguf.runtime.errors import ExtraMissing
from numpy.typing import NDArray

# F16 rounds weights by up to 2**-11. Measured on f2llm-nano and all-MiniLM-L6-v2: minimum cosine 0.999997 and 0.999994;
# an implementation error (wrong token, wrong pooling, wrong epsilon) costs far more than the room that is left.
MIN_COSINE = 0.9999
REFERENCES = Path(__file__).with_name("references")
TRANSFORMERS = "transformers float32"
STORED = "stored vectors (transformers float32)"
NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class ConversionCheck:
    """The outcome of gate 1; `reference` always says against what, or that it was not checked, and `why`."""

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
    vectors: NDArray[np.float32],
    texts: Sequence[EvalText],
    *,
    folder: Path,
    checkpoint_sha256: str,
    n_parameters: int,
    token_ids: Callable[[], list[NDArray[np.int32]]],
    pooling: str,
    on_progress: Callable[[int], None] | None = None,
) -> ConversionCheck:
    """Compare F16 vectors with the strongest reference at hand.

    transformers in float32 where it is installed and the weights fit the memory, else vectors stored for this very
    checkpoint and these very texts, else nothing, said so.
    """
    missing = _missing_packages()
    needed_bytes = 5 * n_parameters  # float32 weights, and room for activations
    if not missing and needed_bytes < available_memory_bytes():
        reference = transformers_vectors(folder, token_ids(), pooling=pooling, on_progress=on_progress)
        return compare(vectors, reference, texts, TRANSFORMERS)
    stored = find_stored(checkpoint_sha256, texts)
    if stored is not None:
        return compare(vectors, stored, texts, STORED)
    if missing:
        why = f"{' and '.join(missing)} not installed: pip install 'f2gguf[evals]'"
    else:
        free = available_memory_bytes() / 1e9
        why = f"float32 weights need {needed_bytes / 1e9:.0f} GB of memory, {free:.0f} GB are free"
    return ConversionCheck(NOT_CHECKED, why=why)


def compare(
    vectors: NDArray[np.float32], reference: NDArray[np.floating[Any]], texts: Sequence[EvalText], name: str
) -> ConversionCheck:
    """Cosine of every vector with its reference, summed up."""
    cosines = 1.0 - drift(vectors, reference)
    return ConversionCheck(
        reference=name,
        n=len(texts),
        min_cosine=round(float(cosines.min()), 6),
        mean_cosine=round(float(cosines.mean()), 6),
        worst_text=texts[int(cosines.argmin())].id,
    )


def transformers_vectors(
    folder: Path,
    token_ids: Sequence[NDArray[np.int32]],
    *,
    pooling: str,
    on_progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Vectors of the checkpoint run by transformers in float32, text by text, (n_texts, n_embd), L2-normalised."""
    import torch

    model = _load(folder)
    rows = []
    with torch.inference_mode():
        for ids in token_ids:
            states = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
            vector = {"last": states[-1], "cls": states[0], "mean": states.mean(dim=0)}[pooling]
            rows.append(torch.nn.functional.normalize(vector, dim=0).numpy())
            if on_progress:
                on_progress(1)
    return np.stack(rows)


def _load(folder: Path) -> Any:
    """The checkpoint in float32. F2LLM-v2-80M lists 28 layer_types for its 8 layers, which transformers refuses."""
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    stated = json.loads((folder / "config.json").read_bytes())
    if len(stated.get("layer_types") or ()) != stated["num_hidden_layers"]:
        stated.pop("layer_types", None)
    config = AutoConfig.for_model(**stated)
    options = {"config": config, "dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    return AutoModel.from_pretrained(folder, **options).eval()


def require_transformers() -> None:
    """Raise `ExtraMissing` unless the checkpoint can be run by transformers."""
    if missing := _missing_packages():
        raise ExtraMissing(f"{' and '.join(missing)} not installed. Run: pip install 'f2gguf[evals]'")


def find_stored(checkpoint_sha256: str, texts: Sequence[EvalText]) -> NDArray[np.float16] | None:
    """Vectors stored by `scripts/references` for this checkpoint and these texts, or None."""
    from safetensors import safe_open

    for path in sorted(REFERENCES.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            made_for = file.metadata()
            if made_for == stored_metadata(checkpoint_sha256, texts):
                return np.asarray(file.get_tensor("vectors"))
    return None


def store(path: Path, vectors: NDArray[np.float32], checkpoint_sha256: str, texts: Sequence[EvalText]) -> None:
    """Write reference vectors as float16, which moves a cosine by less than 1e-7."""
    from safetensors.numpy import save_file

    path.parent.mkdir(exist_ok=True)
    save_file({"vectors": vectors.astype(np.float16)}, path, metadata=stored_metadata(checkpoint_sha256, texts))


def stored_metadata(checkpoint_sha256: str, texts: Sequence[EvalText]) -> dict[str, str]:
    return {"checkpoint_sha256": checkpoint_sha256, "texts_sha256": texts_sha256(texts), "reference": TRANSFORMERS}


def available_memory_bytes() -> int:
    """Memory that a new process could take: MemAvailable on Linux, the whole memory elsewhere."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _missing_packages() -> list[str]:
    return [name for name in ("torch", "transformers") if find_spec(name) is None]


def as_json(document: dict[str, Any]) -> str:
    """JSON as f2gguf writes it: indented, in a fixed order, ended by a newline."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
