"""A checkpoint's tokenizer.json as the vocabulary of a GGUF header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import read_json
from f2gguf.runtime.errors import BrokenCheckpoint, Disagreement, UnsupportedCheckpoint

# The split pattern of a byte-level BPE, letter for letter -> llama.cpp's name for its own code of that pattern
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen35",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_WORD_START = "\u2581"  # llama.cpp writes "##ing" as "ing" and "play" as "▁play"


@dataclass(frozen=True)
class Family:
    """The part of a vocabulary that depends on the kind of tokenizer."""

    model: str  # tokenizer.ggml.model
    pre: str
    merges: list[str]
    special: dict[str, str]  # role -> token: 'eos', ...
    flags: dict[str, bool]  # 'add_eos_token' -> ...


@dataclass(frozen=True)
class Vocabulary:
    """What the header states of the tokenizer: llama.cpp's own keys, and those that f2gguf adds."""

    family: Family
    tokens: list[str]
    token_types: list[int]
    special_ids: dict[str, int]  # 'eos' -> id, ...
    normalizer: str | None  # JSON
    special_tokens: list[str]
    eos_token: str  # the token that closes every text
    is_eos_forced: bool  # models.lock states the token, as the checkpoint's own post-processor adds none


def read_vocabulary(checkpoint: Checkpoint, *, eos_token: str | None = None) -> Vocabulary:
    """Read tokenizer.json. `eos_token` is the one that models.lock states, for a checkpoint that adds none.

    Raises `UnsupportedCheckpoint` for a tokenizer that llama.cpp cannot follow, `BrokenCheckpoint` for a damaged one,
    `Disagreement` if models.lock and the checkpoint end texts with different tokens.
    """
    path = checkpoint.tokenizer_path
    spec = read_json(path)
    load_tokenizer(checkpoint)  # the library that defines the format checks its shape: from here on it can be relied on
    kind = spec["model"].get("type")
    if kind not in _FAMILIES:
        known = "byte-level BPE and WordPiece"
        raise UnsupportedCheckpoint(f"{path}: the tokenizer {kind!r} is not supported; {known} are.")
    opening, closing = _template(spec)
    stated = closing[-1] if closing else None
    if stated and eos_token and stated != eos_token:
        raise Disagreement(
            f"models.lock says that texts end with {eos_token}, but {path} ends them with {stated}. "
            "Correct the lock, or fetch the revision that it means."
        )
    eos_token = stated or eos_token
    if eos_token is None:
        raise BrokenCheckpoint(f"{path}: does not say which token ends a text. State it in models.lock as `eos_token`.")
    tokens, token_types = _tokens(checkpoint, spec)
    ids = {text: i for i, text in enumerate(tokens)}
    family = _FAMILIES[kind](spec, checkpoint, opening, eos_token)
    for text in family.special.values():
        if text not in ids:
            raise BrokenCheckpoint(f"{path}: its vocabulary lacks the special token {text}. Fetch the model again.")
    if kind == "WordPiece":
        tokens = [_with_word_start(text, of) for text, of in zip(tokens, token_types, strict=True)]
    first: dict[str, int] = {}
    for i, text in enumerate(tokens):  # llama.cpp stops the process if two ids have one text, or a text holds NUL
        if first.setdefault(text, i) != i or "\0" in text:
            raise BrokenCheckpoint(f"{path}: token {i} ({text!r}) occurs twice, or holds NUL. Fetch the model again.")
    return Vocabulary(
        family,
        tokens,
        token_types,
        special_ids={role: ids[text] for role, text in family.special.items()},
        normalizer=json.dumps(spec["normalizer"]) if spec.get("normalizer") else None,
        special_tokens=[added["content"] for added in spec.get("added_tokens", []) if not added.get("normalized")],
        eos_token=eos_token,
        is_eos_forced=stated is None,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer (a `tokenizers.Tokenizer`), without truncation or padding."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    except Exception as error:  # the library raises bare Exceptions for whatever it cannot parse
        path = checkpoint.tokenizer_path
        raise BrokenCheckpoint(f"{path}: is no working tokenizer: {error}. Fetch it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _bpe(spec: dict[str, Any], checkpoint: Checkpoint, opening: list[str], eos_token: str) -> Family:
    path = checkpoint.tokenizer_path
    if opening:
        raise UnsupportedCheckpoint(f"{path}: puts {opening[0]} before every text, which is not supported for BPE yet.")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UnsupportedCheckpoint(f"{path}: the normaliser {normalizer!r} is not supported with BPE; NFC is.")
    pad = read_json(checkpoint.folder / "tokenizer_config.json", optional=True).get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return Family(
        model="gpt2",
        pre=_pre_tokenizer(spec, checkpoint),
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]],
        special={"eos": eos_token, **({"padding": str(pad)} if pad else {})},
        flags={"add_bos_token": False, "add_eos_token": True},
    )


def _wordpiece(spec: dict[str, Any], checkpoint: Checkpoint, opening: list[str], eos_token: str) -> Family:
    path = checkpoint.tokenizer_path
    model, normalizer = spec["model"], spec.get("normalizer") or {}
    expected = {
        "normalizer": (normalizer.get("type"), "BertNormalizer"),
        "pre_tokenizer": ((spec.get("pre_tokenizer") or {}).get("type"), "BertPreTokenizer"),
        "continuing_subword_prefix": (model.get("continuing_subword_prefix", "##"), "##"),
        "max_input_chars_per_word": (model.get("max_input_chars_per_word", 100), 100),
        "unk_token": (model.get("unk_token", "[UNK]"), "[UNK]"),
    }
    for key, (value, supported) in expected.items():
        if value != supported:
            raise UnsupportedCheckpoint(f"{path}: {key} is {value!r}; WordPiece is supported with {supported!r}.")
    if len(opening) != 1:
        raise UnsupportedCheckpoint(f"{path}: WordPiece is supported with one token before and one after a text.")
    strip_accents = normalizer.get("strip_accents")
    return Family(
        model="bert",
        pre="default",
        merges=[],
        # llama.cpp's key is spelt "seperator"
        special={"bos": opening[0], "eos": eos_token, "seperator": eos_token, "unknown": "[UNK]", "padding": "[PAD]"},
        flags={
            "add_bos_token": True,
            "add_eos_token": True,
            "add_sep_token": False,
            "normalizer.lowercase": bool(normalizer["lowercase"]),
            "normalizer.strip_accents": bool(normalizer["lowercase"] if strip_accents is None else strip_accents),
        },
    )


_FAMILIES = {"BPE": _bpe, "WordPiece": _wordpiece}


def _with_word_start(token: str, kind: int) -> str:
    if kind == _CONTROL:
        return token
    return token[2:] if token.startswith("##") else _WORD_START + token


def _tokens(checkpoint: Checkpoint, spec: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0 to vocab_size - 1. An id that the tokenizer does not use becomes '[PAD<id>]', unused."""
    path, n_vocab, added_tokens = (
        checkpoint.tokenizer_path,
        checkpoint.count("vocab_size"),
        spec.get("added_tokens", []),
    )
    tokens, types = [f"[PAD{i}]" for i in range(n_vocab)], [_UNUSED] * n_vocab
    ids = [*spec["model"]["vocab"].values(), *(added["id"] for added in added_tokens)]
    if not 0 <= min(ids, default=0) <= max(ids, default=0) < n_vocab:
        raise BrokenCheckpoint(f"{path}: has token ids past config.json's vocab_size {n_vocab}.")
    for text, i in spec["model"]["vocab"].items():
        tokens[i], types[i] = text, _NORMAL
    for added in added_tokens:
        text = added["content"]
        if added.get("lstrip") or added.get("rstrip"):
            raise UnsupportedCheckpoint(f"{path}: the token {text} takes blanks along, which llama.cpp does not.")
        is_control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[added["id"]], types[added["id"]] = text, _CONTROL if is_control else _USER_DEFINED
    return tokens, types


def _template(spec: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a single text."""
    post = spec.get("post_processor") or {}
    processors = post["processors"] if post.get("type") == "Sequence" else [post]
    for processor in processors:
        if processor.get("type") == "TemplateProcessing":
            pieces = processor["single"]
            at = next((i for i, piece in enumerate(pieces) if "Sequence" in piece), len(pieces))
            names = [piece["SpecialToken"]["id"] if "SpecialToken" in piece else "" for piece in pieces]
            return names[:at], names[at + 1 :]
        if processor.get("type") == "BertProcessing":
            return [processor["cls"][0]], [processor["sep"][0]]
    return [], []


def _pre_tokenizer(spec: dict[str, Any], checkpoint: Checkpoint) -> str:
    pre = spec.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    pattern = (steps[0].get("pattern") or {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if pattern not in PRE_TOKENIZERS or steps[0].get("behavior") != "Isolated" or steps[1].get("use_regex", True):
        split = f"its split {pattern or kinds!r}"
        raise UnsupportedCheckpoint(f"{checkpoint.tokenizer_path}: llama.cpp has no pre-tokenizer for {split}.")
    return PRE_TOKENIZERS[pattern]
