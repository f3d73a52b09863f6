"""Gate 1: a converted file's vectors against the checkpoint's own, and why they differ if they do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from f2gguf.evals.conversion import ConversionCheck, check_conversion
from f2gguf.evals.diagnosis import likely_cause
from f2gguf.evals.full_precision import TRANSFORMERS, require_transformers
from f2gguf.evals.neighbours import Vectors
from f2gguf.evals.texts import EvalText, embed_texts
from f2gguf.quantize.convert.readback import reference_ids
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, say
from f2gguf.runtime.errors import ConversionMismatch
from f2gguf.runtime.files import PART_SUFFIX

_N_SAMPLED = 12


def pass_gate_1(facts: Facts, path: Path, vectors: Vectors, texts: Sequence[EvalText]) -> ConversionCheck:
    """Compare the vectors of the 16-bit file at `path` with the checkpoint's; `ConversionMismatch` where they differ.

    The error names the likely cause.
    """
    with progress("gate 1", len(texts)) as advance:
        check = check_conversion(
            vectors,
            texts,
            folder=facts.checkpoint.folder,
            checkpoint_sha256=facts.checkpoint.sha256,
            n_parameters=facts.checkpoint.n_parameters,
            token_ids=lambda: reference_ids(facts, texts),
            pooling=facts.pooling,
            dense=facts.checkpoint.dense_paths,
            on_progress=advance,
        )
    if check.holds is False:
        cause = ""
        if check.reference == TRANSFORMERS:
            worst = [text for text in texts if text.id == check.worst_text]
            cause = f" Likely cause: {likely_cause(path, facts.checkpoint.folder, reference_ids(facts, worst)[0])}."
        raise ConversionMismatch(
            f"{_name(path)}: does not do what the checkpoint does: minimum cosine {check.min_cosine} against "
            f"{check.reference}, on {check.worst_text}. It was not kept.{cause}"
        )
    say(f"gate 1, {check.reference}: " + (check.why or f"minimum cosine {check.min_cosine} over {check.n} texts"))
    return check


def pass_sampled_gate_1(facts: Facts, path: Path, texts: Sequence[EvalText]) -> None:
    """`pass_gate_1` on a dozen of the texts, in seconds. Raises `ExtraMissing` without transformers."""
    require_transformers()
    sampled = texts[:: max(1, len(texts) // _N_SAMPLED)][:_N_SAMPLED]
    with Embedder(path) as model:
        vectors = embed_texts(model, sampled)
    pass_gate_1(facts, path, vectors, sampled)


def _name(path: Path) -> str:
    return path.name.removesuffix(PART_SUFFIX)
