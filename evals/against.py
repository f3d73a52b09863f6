"""The baseline of `quantize verify`: another file, stored vectors, an endpoint, or the checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.endpoint import Endpoint, connected, is_url, open_endpoint
from f2gguf.evals.texts import EvalText, embed_texts, prompted
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress
from f2gguf.runtime.errors import InputError, WrongUsage, parsing
from f2gguf.runtime.gguf.header import Header, read_header
from f2gguf.runtime.llama.runner import unusable
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]
STORED_KEY = "embeddings"  # as `f2gguf embed -o` names them
_EMBED_AGAIN = "Write it with `f2gguf embed -o` or another tool, with a row for each text."


@dataclass(frozen=True)
class Baseline:
    """What a file is compared with: the width of the vectors, and the function that makes one for each text."""

    n_embd: int
    vectors: Callable[[], Vectors]  # (n_texts, n_embd)


def open_baseline(
    against: str,
    texts: Sequence[EvalText],
    header: Header,
    *,
    run_checkpoint: Callable[[str], Baseline],
    device: str = "auto",
    endpoint_model: str | None = None,
    api_key_env: str | None = None,
) -> Callable[[], Vectors]:
    """The function that makes the baseline's vectors for the file with `header`.

    `against` is a URL, a .npy or .safetensors file, a .gguf file, or else a model for `run_checkpoint`. An `against`
    that cannot be the baseline is refused here, before any work. The function raises `InputError` for a text whose
    vector is not finite.
    """
    suffix = Path(against).suffix.lower()
    name = against
    if is_url(against):
        endpoint = open_endpoint(against, model=endpoint_model, key_env=api_key_env)
        name = endpoint.name
        baseline = _from_endpoint(endpoint, texts, header.prompts)
    elif suffix in _READERS:
        baseline = _from_stored(Path(against), texts)
    elif suffix == ".gguf":
        baseline = _from_file(Path(against), texts, device)
    else:
        baseline = run_checkpoint(against)
    if baseline.n_embd != header.n_embd:
        widths = f"{baseline.n_embd}, and {header.path} of {header.n_embd}"
        raise WrongUsage(f"{name}: gives vectors of width {widths}. Pass the same model at its full width (--against).")
    return lambda: _usable(name, baseline.vectors(), texts)


def _from_endpoint(endpoint: Endpoint, texts: Sequence[EvalText], prompts: dict[str, str]) -> Baseline:
    """Vectors of `endpoint`. It is asked for the first text's vector right away, which gives the width."""

    def vectors(n_texts: int = len(texts)) -> Vectors:
        inputs = [prompted(text, prompts) for text in texts[:n_texts]]
        with connected(endpoint) as ask, progress(f"ask {endpoint.name}", n_texts) as advance:
            return ask(inputs, on_progress=advance)

    return Baseline(_usable(endpoint.name, vectors(1), texts[:1]).shape[1], vectors)


def _from_file(path: Path, texts: Sequence[EvalText], device: str) -> Baseline:
    header = read_header(path)
    header.require_pooling()

    def vectors() -> Vectors:
        with Embedder(path, device=device) as model:
            return embed_texts(model, texts, f"measure {path.name}")

    return Baseline(header.n_embd, vectors)


def _from_stored(path: Path, texts: Sequence[EvalText]) -> Baseline:
    """Vectors of a file, in the order of `texts`; ids are compared where the file has them."""
    try:
        with parsing(path, InputError, _EMBED_AGAIN):
            vectors, ids = _READERS[path.suffix.lower()](path)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read: {reason}. {_EMBED_AGAIN}") from error
    shape, fault = vectors.shape, ""
    if len(shape) != 2 or not np.issubdtype(vectors.dtype, np.floating):
        fault = f"holds {vectors.dtype} of shape {shape}, not floats (n_texts, n_embd)"
    elif len(vectors) != len(texts):
        fault = f"holds {len(vectors)} vectors, and {len(texts)} texts are judged"
    for i, (ours, text) in enumerate(itertools.zip_longest(ids, (text.id for text in texts)) if ids else ()):
        if not fault and str(ours) != text:
            fault = f"row {i + 1} is of {ours!r}, but text {i + 1} is {text!r}"
    if fault:
        raise InputError(f"{path}: {fault}. {_EMBED_AGAIN}")
    _usable(str(path), vectors, texts)
    return Baseline(shape[1], lambda: vectors)


def _read_npy(path: Path) -> tuple[Vectors, list[Any]]:
    ids_path = path.with_suffix(".ids.jsonl")
    lines = ids_path.read_text(encoding="utf-8").split("\n") if ids_path.exists() else []
    return np.lib.format.open_memmap(path, mode="r"), [json.loads(line) for line in lines if line]


def _read_safetensors(path: Path) -> tuple[Vectors, list[Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            ids = json.loads((file.metadata() or {}).get("ids", "[]"))
            return file.get_tensor(STORED_KEY), ids if isinstance(ids, list) else []
    except (AttributeError, SafetensorError, TypeError) as error:  # numpy has no type for some that safetensors has
        raise ValueError(str(error)) from error


_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors}


def _usable(name: str, vectors: Vectors, texts: Sequence[EvalText]) -> Vectors:
    """`vectors`. Raises `InputError` for texts whose vector is not finite, or zero."""
    if bad := [texts[i].id for i in unusable(vectors)]:
        raise InputError(f"{name}: {len(bad)} of {len(texts)} texts have no finite vector: {', '.join(bad[:5])}.")
    return vectors
