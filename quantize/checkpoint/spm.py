"""A BPE that falls back to bytes, as SentencePiece trains them, in llama.cpp's terms: scores, types, dummy prefix.

Gemma's, Llama 2's and Mistral's tokenizers are of this kind. tokenizer.json is enough for them: llama.cpp joins the two
pieces whose product has the highest score, and the library `tokenizers` those of the first merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint
from f2gguf.runtime.llama.carried import steps_of

BLANK = "\u2581"  # "▁" stands for a blank in every piece
_UNKNOWN, _BYTE = 2, 6  # gguf.TokenType
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_NORMALIZERS = {"Replace": False, "Prepend, Replace": True}  # its steps -> whether one puts a blank before a text


def is_spm(model: dict[str, Any]) -> bool:
    """Whether a BPE spells unknown letters as bytes, which no byte-level BPE needs."""
    return bool(model.get("byte_fallback"))


def scores(model: dict[str, Any], merges: list[str], n_vocab: int) -> list[float]:
    """A score for every id: minus the rank of the first merge ("▁ a") that makes the piece; lower where none does."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    result = [-float(len(merges))] * n_vocab
    for piece, i in model["vocab"].items():
        if piece in ranks:
            result[i] = -float(ranks[piece])
    return result


def types(path: Path, model: dict[str, Any], ids: dict[str, int], unknown: str) -> dict[int, int]:
    """The types of the unknown token and of the bytes, by id. Raises `BrokenCheckpoint` where a byte has no token."""
    if lacking := [text for text in _BYTES if text not in model["vocab"]]:
        raise BrokenCheckpoint(f"{path}: its vocabulary lacks the byte {lacking[0]}. Fetch the model again.")
    return {ids[unknown]: _UNKNOWN} | {model["vocab"][text]: _BYTE for text in _BYTES}


def has_prefix(path: Path, spec: dict[str, Any]) -> bool:
    """Whether a blank is put before a text. Raises `UnsupportedCheckpoint` unless blanks become BLANK, and no more."""
    pre, steps = spec.get("pre_tokenizer") or {}, steps_of(spec.get("normalizer"), "normalizers")
    stated = ", ".join(step.get("type", "") for step in steps)
    is_plain = all(
        step.get("prepend", BLANK) == step.get("content", BLANK) == BLANK
        and step.get("pattern", {"String": " "}) == {"String": " "}
        for step in steps
    )
    # Gemma's splits at blanks, of which its normaliser has left none
    is_idle = not pre or (pre.get("type") == "Split" and pre.get("pattern") == {"String": " "})
    if stated in _NORMALIZERS and is_plain and is_idle:
        return _NORMALIZERS[stated]
    if pre.get("type") == "Metaspace" and not stated and pre.get("replacement") == BLANK and not pre.get("split", True):
        return bool(pre.get("prepend_scheme") != "never")
    raise UnsupportedCheckpoint(
        f"{path}: a BPE with bytes is supported where blanks become {BLANK!r} by Replace, by Prepend and Replace, or "
        f"by a Metaspace that does not split; its normaliser is {stated or None!r}, and its split {pre.get('type')!r}."
    )
