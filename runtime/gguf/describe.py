"""The header of a .gguf file, for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from f2gguf.runtime.errors import NotGGUF, parsing
from f2gguf.runtime.files import format_bound, format_size
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.golden import KEY_TOKEN_IDS, KEY_VECTORS, has_golden, require_golden
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.gguf.reader import LongArray

_DRIFT_KEYS = (keys.KEY_MEAN_DRIFT, keys.KEY_UPPER_DRIFT, keys.KEY_MAX_DRIFT, keys.KEY_HOLDS, keys.KEY_N_TEXTS)
_CORPUS_KEYS = (keys.KEY_CORPUS_MEAN, keys.KEY_CORPUS_UPPER, keys.KEY_CORPUS_N_TEXTS, keys.KEY_CORPUS)
_LAST_TOKEN_PATH = "last-token path: outputs for last tokens only, the LM head is never run"


@dataclass(frozen=True)
class StatedDrift:
    """The drift that a file's header states: mean of 1 - cosine, the upper end of its interval, and the verdict."""

    mean: float
    upper: float
    max_drift: float
    holds: bool
    n_texts: int


def drift_of(header: Header) -> StatedDrift | None:
    """None for a file that was not measured."""
    values = header.values
    return StatedDrift(*(values[key] for key in _DRIFT_KEYS)) if all(key in values for key in _DRIFT_KEYS) else None


def is_reference(header: Header) -> bool:
    """Whether others are measured against such a file."""
    unquantised = ("F16", "BF16", "F32")
    return header.file_type in unquantised and all(tensor.type in unquantised for tensor in header.tensors)


def describe_drift(header: Header) -> str:
    """The measurement in one line."""
    drift = drift_of(header)
    if drift is None:
        return "this is a reference" if is_reference(header) else "not measured"
    quick = " (--quick: about a quarter of them all)" if header.values.get(keys.KEY_QUICK) else ""
    return (
        f"mean {drift.mean:.3%}, at most {drift.upper:.3%} with 95% confidence, over {drift.n_texts} texts{quick}: "
        f"{'under' if drift.holds else 'OVER'} the bound of {format_bound(drift.max_drift)}"
    )


def describe_corpus_drift(header: Header) -> str | None:
    """What was measured on a corpus, in one line; None where the file was made for none."""
    if not all(key in header.values for key in _CORPUS_KEYS):
        return None
    mean, upper, n_texts, name = (header.values[key] for key in _CORPUS_KEYS)
    return f"mean {mean:.3%}, at most {upper:.3%} with 95% confidence, over {n_texts} held-out texts of {name}"


def describe(header: Header, *, kernels: str) -> str:
    """The header for people: one fact a line. `kernels` says how this machine multiplies its matrices."""
    facts = _facts(header, kernels)
    width = max(len(label) for label, _ in facts)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in facts)


def as_dict(header: Header) -> dict[str, Any]:
    """The header for machines: the facts that f2gguf uses, then every value and tensor of the file."""
    return {
        "path": str(header.path),
        "architecture": header.architecture,
        "pooling": header.pooling,
        "takes_last_tokens": header.takes_last_tokens(header.pooling),
        "n_embd": header.n_embd,
        "dims": list(header.dims),
        "max_tokens": header.max_tokens,
        "prompts": header.prompts,
        "default_prompt": header.default_prompt,
        "file_type": header.file_type,
        "has_golden": has_golden(header),
        "values": {key: _plain(key, value) for key, value in header.values.items()},
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type, "size_bytes": t.size_bytes} for t in header.tensors
        ],
    }


def _facts(header: Header, kernels: str) -> list[tuple[str, str]]:
    values = header.values
    types = Counter(tensor.type for tensor in header.tensors)
    base = values.get("general.base_model.0.repo_url")
    revision = values.get(keys.KEY_REVISION)
    closes = values.get("tokenizer.ggml.add_eos_token")
    facts = [
        ("file", f"{header.path} ({format_size(header.path.stat().st_size)})"),
        ("model", f"{header.name}, {header.architecture}, {values.get('general.size_label', 'size not stated')}"),
        ("source", f"{base} at {revision}" if base else values.get("general.source.url", "not stated")),
        ("licence", values.get("general.license", "not stated")),
        ("weights", f"{header.file_type}: " + ", ".join(f"{n} {kind}" for kind, n in types.most_common())),
        ("drift", describe_drift(header)),
        *([("drift on corpus", on_corpus)] if (on_corpus := describe_corpus_drift(header)) else []),
        ("recipe", _recipe(header)),
        ("golden vectors", _golden(header)),
        ("pooling", header.pooling or "not stated: pass --pooling to use the file"),
        ("computed", _LAST_TOKEN_PATH if header.takes_last_tokens(header.pooling) else "llama.cpp's own pooling"),
        ("kernels", kernels),
        ("vectors", "L2-normalised" if header.is_normalized else "not normalised"),
        ("dimensions", ", ".join(map(str, header.dims))),
        ("longest input", f"{header.max_tokens:,} tokens (positions: {header.n_ctx_train:,})"),
        ("closing token", "added to every text" if closes else "none stated"),
        ("tokenizer", f"{values.get('tokenizer.ggml.model')}, {values.get('tokenizer.ggml.pre')}"),
        ("split by", "the checkpoint's own tokenizer" if header.tokenizer else "llama.cpp"),
    ]
    facts += [(f"prompt {name}", repr(text)) for name, text in header.prompts.items()]
    facts += [("default prompt", header.default_prompt)] if header.default_prompt else []
    facts += [("mended", line) for line in values.get(keys.KEY_MENDED, ())]
    facts.append(("made by", f"f2gguf {values[keys.KEY_VERSION]}" if keys.KEY_VERSION in values else "not f2gguf"))
    return facts


def _golden(header: Header) -> str:
    if not has_golden(header):
        return "none: `f2gguf selftest` has nothing to compare with"
    golden = require_golden(header)
    cosine = golden.cosines[golden.is_compared].min()
    return f"{len(golden.texts)} texts, cosine at least {cosine:.6f} where the file was made; see `f2gguf selftest`"


@dataclass(frozen=True)
class _StatedRecipe:
    variant: str
    imatrix_sha256: str | None
    exponents: Mapping[str, object]
    types: Mapping[str, object]


def _recipe(header: Header) -> str:
    text = header.values.get(keys.KEY_RECIPE)
    if text is None:
        return "not stated"
    from pydantic import TypeAdapter

    with parsing(f"{header.path}, its recipe", NotGGUF, "Download or make it again."):
        recipe = TypeAdapter(_StatedRecipe).validate_json(text)
    parts = {
        f"stock {recipe.variant}": True,
        f"importance matrix {(recipe.imatrix_sha256 or '')[:12]}": recipe.imatrix_sha256,
        f"channels scaled in {len(recipe.exponents)} places": recipe.exponents,
        f"other types for {len(recipe.types)} tensors": recipe.types,
    }
    return ", ".join(part for part, is_there in parts.items() if is_there)


def _plain(key: str, value: Any) -> Any:
    if key in (KEY_VECTORS, KEY_TOKEN_IDS):
        return {"length": len(value)}
    return {"length": value.length} if isinstance(value, LongArray) else value
