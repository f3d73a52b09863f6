"""A checkpoint's tokenizer as the vocabulary of a GGUF header."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint import spm
from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import read_json
from f2gguf.quantize.checkpoint.tokenizer_files import CONFIG, build_tokenizer
from f2gguf.runtime.errors import BrokenCheckpoint, Disagreement, UnsupportedCheckpoint
from f2gguf.runtime.llama.carried import carried_json, charsmap_steps, gguf_text, score_steps, steps_of

# The split pattern of a byte-level BPE, letter for letter -> llama.cpp's name for its own code of that pattern
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "qwen2"
    ),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen35",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt-4o",
}
NO_EOS = ""  # stated in the place of a closing token: texts have none
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType
_UNUSED_SCORE = -10000.0  # of rows that no piece has, as llama.cpp's converter gives it


@dataclass(frozen=True)
class Family:
    """The part of a vocabulary that depends on the kind of tokenizer."""

    model: str  # tokenizer.ggml.model
    pre: str
    merges: list[str]
    special: dict[str, str]  # role -> token: 'eos', ...
    flags: dict[str, bool]  # 'add_eos_token' -> ...
    scores: Sequence[float] = ()  # of every id, in Unigram and in SentencePiece's BPE
    score_steps: list[int] = field(default_factory=list)  # what their float32 lacks, see `carried.score_steps`
    charsmap: bytes = b""
    types: Mapping[int, int] = field(default_factory=dict)  # id -> type, where it depends on the kind


@dataclass(frozen=True)
class Vocabulary:
    """What the header states of the tokenizer: llama.cpp's own keys, and the one that f2gguf adds."""

    family: Family
    tokens: list[str]
    token_types: list[int]
    special_ids: dict[str, int]  # 'eos' -> id, ...
    tokenizer: str  # what llama.cpp's keys do not hold of it: runtime/llama/carried.py
    eos_token: str  # the token that closes every text; NO_EOS for none
    is_eos_forced: bool  # lock or user state the token, as the checkpoint's own tokenizer adds none


def read_vocabulary(checkpoint: Checkpoint, *, eos_token: str | None = None) -> Vocabulary:
    """Read the tokenizer. Lock or user state `eos_token` for a checkpoint that adds none; NO_EOS leaves it at that.

    Raises the errors of `build_tokenizer`; `UnsupportedCheckpoint` for a tokenizer that llama.cpp cannot follow,
    `BrokenCheckpoint` for a damaged one, `Disagreement` where the checkpoint ends texts with another token than stated.
    """
    path = checkpoint.tokenizer_path
    tokenizer = build_tokenizer(checkpoint)
    spec = json.loads(tokenizer.to_str())
    kind = spec["model"].get("type")
    if kind not in _FAMILIES:
        known = "BPE, WordPiece and Unigram"
        raise UnsupportedCheckpoint(f"{path}: the tokenizer {kind!r} is not supported; {known} are.")
    ids = tokenizer.get_vocab(with_added_tokens=True)
    opening, closing = _template(spec, checkpoint, ids)
    stated = closing[-1] if closing else None
    if stated and eos_token is not None and stated != eos_token:
        theirs = f"end with {eos_token}" if eos_token else "have no closing token"
        raise Disagreement(
            f"models.lock or --eos-token says that texts {theirs}, but {path} ends them with {stated}. "
            "The checkpoint decides: correct what is stated, or fetch the revision that it means."
        )
    eos_token = eos_token if stated is None else stated
    if eos_token is None:
        raise BrokenCheckpoint(
            f"{path}: does not say which token ends a text. State it with --eos-token TOKEN (or none), or as "
            "`eos_token` in models.lock."
        )
    tokens, token_types = _tokens(checkpoint, spec)
    family = _FAMILIES[kind](spec, checkpoint, opening, eos_token)
    token_types = [family.types.get(i, kind) for i, kind in enumerate(token_types)]
    for text in family.special.values():
        if text not in ids:
            raise BrokenCheckpoint(f"{path}: its vocabulary lacks the special token {text}. Fetch the model again.")
    return Vocabulary(
        family,
        tokens,
        token_types,
        special_ids={role: ids[text] for role, text in family.special.items()},
        tokenizer=carried_json(tokenizer),
        eos_token=eos_token,
        is_eos_forced=stated is None and eos_token != NO_EOS,
    )


def _bpe(spec: dict[str, Any], checkpoint: Checkpoint, opening: list[str], eos_token: str) -> Family:
    path, model = checkpoint.tokenizer_path, spec["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if odd := [merge for merge in merges if len(merge) != 2 or " " in "".join(merge)]:
        raise UnsupportedCheckpoint(f"{path}: its merge {odd[0]!r} has a blank; a BPE writes it as 'Ġ' or '▁'.")
    named = {
        "bos": opening[0] if opening else None,
        "eos": eos_token or _named_token(checkpoint, "eos_token"),
        "padding": _named_token(checkpoint, "pad_token"),
    }
    flags = {"add_bos_token": bool(opening), "add_eos_token": eos_token != NO_EOS}
    family = Family("gpt2", "", [" ".join(m) for m in merges], {r: t for r, t in named.items() if t}, flags)
    if spm.is_spm(model):
        return _spm(spec, checkpoint, family)
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UnsupportedCheckpoint(f"{path}: the normaliser {normalizer!r} is not supported with BPE; NFC is.")
    pre = _pre_tokenizer(spec, checkpoint)
    family = replace(family, pre=ARCHITECTURES[checkpoint.model_type].pre_names.get(pre, pre))
    if not opening:
        return family
    # modern-bert puts a separator between two texts, unless the header says that it does not
    special = {**family.special, **({"seperator": eos_token} if eos_token else {})}
    return replace(family, special=special, flags={**flags, "add_sep_token": False})


def _spm(spec: dict[str, Any], checkpoint: Checkpoint, family: Family) -> Family:
    path, model = checkpoint.tokenizer_path, spec["model"]
    unknown = model["unk_token"] or _named_token(checkpoint, "unk_token") or "<unk>"
    ids = model["vocab"] | {added["content"]: added["id"] for added in spec["added_tokens"]}
    if unknown not in ids:
        raise BrokenCheckpoint(f"{path}: lacks the unknown token {unknown}. Fetch the model again.")
    return replace(
        family,
        model="llama",
        pre="default",
        special={**family.special, "unknown": unknown},
        flags={**family.flags, "add_space_prefix": spm.has_prefix(path, spec)},
        scores=spm.scores(model, family.merges, checkpoint.count("vocab_size")),
        types=spm.types(path, model, ids, unknown),
    )


def _wordpiece(spec: dict[str, Any], checkpoint: Checkpoint, opening: list[str], eos_token: str) -> Family:
    path = checkpoint.tokenizer_path
    model, normalizer = spec["model"], spec.get("normalizer") or {}
    expected = {
        "normalizer": (normalizer.get("type"), "BertNormalizer"),
        "pre_tokenizer": ((spec.get("pre_tokenizer") or {}).get("type"), "BertPreTokenizer"),
        "continuing_subword_prefix": (model["continuing_subword_prefix"], "##"),
    }
    for key, (value, supported) in expected.items():
        if value != supported:
            raise UnsupportedCheckpoint(f"{path}: {key} is {value!r}; WordPiece is supported with {supported!r}.")
    if len(opening) != 1 or eos_token == NO_EOS:
        raise UnsupportedCheckpoint(f"{path}: WordPiece is supported with one token before and one after a text.")
    if model["unk_token"] not in model["vocab"]:
        raise BrokenCheckpoint(
            f"{path}: its vocabulary lacks the unknown token {model['unk_token']}. Fetch the model again."
        )
    pad = _named_token(checkpoint, "pad_token") or "[PAD]"
    named = {"bos": opening[0], "eos": eos_token, "seperator": eos_token, "unknown": model["unk_token"]}
    known = {*model["vocab"], *(token["content"] for token in spec["added_tokens"])}
    strip_accents = normalizer.get("strip_accents")
    return Family(
        model="bert",
        pre="default",
        merges=[],
        special={**named, **({"padding": pad} if pad in known else {})},  # llama.cpp's key is spelt "seperator"
        flags={
            "add_bos_token": True,
            "add_eos_token": True,
            "add_sep_token": False,
            "normalizer.lowercase": bool(normalizer["lowercase"]),
            "normalizer.strip_accents": bool(normalizer["lowercase"] if strip_accents is None else strip_accents),
        },
    )


def _unigram(spec: dict[str, Any], checkpoint: Checkpoint, opening: list[str], eos_token: str) -> Family:
    path, model = checkpoint.tokenizer_path, spec["model"]
    pieces, stated = [piece for piece, _ in model["vocab"]], [score for _, score in model["vocab"]]
    if model["byte_fallback"]:
        raise UnsupportedCheckpoint(f"{path}: its Unigram model has byte_fallback, which llama.cpp does not follow.")
    if model["unk_id"] is None:
        raise UnsupportedCheckpoint(f"{path}: its Unigram model has no unk_id, which llama.cpp needs.")
    if len(opening) > 1:
        raise UnsupportedCheckpoint(f"{path}: puts {len(opening)} tokens before a text; Unigram is supported with one.")
    if None in stated or np.abs(steps := score_steps(stated)).max() >= 1 << 31:  # JSON has null for NaN and infinity
        raise UnsupportedCheckpoint(f"{path}: its Unigram model has scores that are not finite, or too near to zero.")
    charsmaps = {step["precompiled_charsmap"] for step in charsmap_steps(spec["normalizer"])}
    if len(charsmaps) > 1:
        raise UnsupportedCheckpoint(f"{path}: its normaliser has {len(charsmaps)} charsmaps; one is supported.")
    unknown, pad = pieces[model["unk_id"]], _named_token(checkpoint, "pad_token") or "<pad>"
    known = {*pieces, *(token["content"] for token in spec["added_tokens"])}
    named = {"bos": "".join(opening), "eos": eos_token, "seperator": eos_token, "unknown": unknown}
    named |= {"padding": pad if pad in known else "", "mask": _named_token(checkpoint, "mask_token") or ""}
    n_unused = checkpoint.count("vocab_size") - len(pieces)
    return Family(
        model="t5",
        pre="default",
        merges=[],
        special={role: token for role, token in named.items() if token},
        flags={
            "add_bos_token": bool(opening),
            "add_eos_token": eos_token != NO_EOS,
            **_unigram_blanks(spec, checkpoint),
        },
        scores=[*stated, *[_UNUSED_SCORE] * n_unused],
        score_steps=steps.tolist() if steps.any() else [],
        charsmap=base64.b64decode("".join(charsmaps)),
    )


def _unigram_blanks(spec: dict[str, Any], checkpoint: Checkpoint) -> dict[str, bool]:
    """What llama.cpp does with blanks: whether it puts one before a text, and makes one of several."""
    steps = steps_of(spec["pre_tokenizer"], "pretokenizers")
    if [step.get("type") for step in steps] not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]) or (
        steps[-1]["replacement"] != spm.BLANK
    ):
        kinds = ", ".join(str(step.get("type")) for step in steps)
        words = f"its pre-tokenizer {kinds} is not supported with Unigram; WhitespaceSplit and Metaspace are"
        raise UnsupportedCheckpoint(f"{checkpoint.tokenizer_path}: {words}.")
    joins_blanks = len(steps) > 1 or any(
        step.get("type") == "Replace" and step["pattern"] == {"Regex": " {2,}"}
        for step in steps_of(spec["normalizer"], "normalizers")
    )
    scheme = steps[-1]["prepend_scheme"]
    return {"add_space_prefix": scheme != "never", "remove_extra_whitespaces": joins_blanks}


_FAMILIES = {"BPE": _bpe, "WordPiece": _wordpiece, "Unigram": _unigram}


def _named_token(checkpoint: Checkpoint, key: str) -> str | None:
    """The token that tokenizer_config.json calls `key`."""
    token = read_json(checkpoint.folder / CONFIG, optional=True).get(key)
    return token["content"] if isinstance(token, dict) else token


def _tokens(checkpoint: Checkpoint, spec: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0 to vocab_size - 1. An id that the tokenizer does not use becomes '[PAD<id>]', unused."""
    path, n_vocab, kind = checkpoint.tokenizer_path, checkpoint.count("vocab_size"), spec["model"]["type"]
    vocab, added_tokens = spec["model"]["vocab"], spec["added_tokens"]
    if isinstance(vocab, list):
        pieces = [piece for piece, _ in vocab]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if len(vocab) < len(pieces):
            twice = next(piece for i, piece in enumerate(pieces) if vocab[piece] != i)
            raise UnsupportedCheckpoint(f"{path}: has the piece {twice!r} twice, which llama.cpp does not take.")
    ids = [*vocab.values(), *(added["id"] for added in added_tokens)]
    if not 0 <= min(ids, default=0) <= max(ids, default=0) < n_vocab:
        raise BrokenCheckpoint(
            f"{path}: has token ids past config.json's vocab_size {n_vocab}. Were tokens added, and the embeddings not "
            "resized (model.resize_token_embeddings)?"
        )
    tokens, types = [f"[PAD{i}]" for i in range(n_vocab)], [_UNUSED] * n_vocab
    added_ids = {added["id"] for added in added_tokens}
    for text, i in vocab.items():
        if i not in added_ids:
            tokens[i], types[i] = gguf_text(text, kind), _NORMAL
    first = {text: i for i, text in reversed([*enumerate(tokens)])}
    for added in added_tokens:
        text, i = added["content"], added["id"]
        if text in first or "\0" in text:  # 'er' besides WordPiece's '##er': llama.cpp takes no text twice, and no NUL
            text = f"[ADDED{i}]"
        is_control = added["special"] or (text.startswith("<|") and text.endswith("|>"))
        tokens[i], types[i] = text, _CONTROL if is_control else _USER_DEFINED
    if kind == "Unigram" and spec["model"]["unk_id"] is not None:
        types[spec["model"]["unk_id"]] = _UNKNOWN
    first = {}
    for i, text in enumerate(tokens):  # llama.cpp stops the process if two ids have one text, or a text holds NUL
        if first.setdefault(text, i) != i or "\0" in text:
            raise BrokenCheckpoint(f"{path}: token {i} ({text!r}) occurs twice, or holds NUL. Fetch the model again.")
    return tokens, types


def _template(spec: dict[str, Any], checkpoint: Checkpoint, ids: dict[str, int]) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a single text, at most one each."""
    processors, path = steps_of(spec.get("post_processor"), "processors"), checkpoint.tokenizer_path
    steps = [step for step in processors if step.get("type") not in (None, "ByteLevel")]  # which changes offsets alone
    if len(steps) > 1 or (
        steps and steps[0]["type"] not in ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
    ):
        kinds = ", ".join(step["type"] for step in steps)
        raise UnsupportedCheckpoint(f"{path}: the post-processor {kinds} is not supported; one TemplateProcessing is.")
    if not steps:
        return [], []
    opening, closing = _around(steps[0], checkpoint)
    for where, around in (("before", opening), ("behind", closing)):
        if len(around) > 1:
            words = f"its post-processor puts {len(around)} tokens {where} a text; one is supported"
            raise UnsupportedCheckpoint(f"{path}: {words}.")
    for text, i in [*opening, *closing]:
        if ids.get(text) != i:
            stated = f"its post-processor gives {text} the id {i}"
            raise BrokenCheckpoint(f"{path}: {stated}, its vocabulary {ids.get(text)}. Fetch the model again.")
    return [text for text, _ in opening], [text for text, _ in closing]


def _around(step: dict[str, Any], checkpoint: Checkpoint) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Tokens and ids that a post-processor puts before and after a single text."""
    if step["type"] != "TemplateProcessing":
        return [tuple(step["cls"])], [tuple(step["sep"])]
    pieces, special = step["single"], step["special_tokens"]
    if any(content["type_id"] for piece in pieces for content in piece.values()):
        path = checkpoint.tokenizer_path
        raise UnsupportedCheckpoint(f"{path}: its post-processor gives a single text token types other than 0.")
    names = ["" if "Sequence" in piece else piece["SpecialToken"]["id"] for piece in pieces]
    tokens = [[*zip(special[name]["tokens"], special[name]["ids"], strict=True)] if name else [] for name in names]
    at = names.index("") if "" in names else len(names)
    return [*chain(*tokens[:at])], [*chain(*tokens[at:])]


def _pre_tokenizer(spec: dict[str, Any], checkpoint: Checkpoint) -> str:
    """llama.cpp's name for the split. That of transformers' classes is the one of `build_tokenizer`."""
    steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if steps[-1].get("add_prefix_space"):
        raise UnsupportedCheckpoint(
            f"{checkpoint.tokenizer_path}: add_prefix_space is set, which is not supported for BPE."
        )
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    pattern = (steps[0].get("pattern") or {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if (
        pattern not in PRE_TOKENIZERS
        or steps[0].get("behavior") != "Isolated"
        or steps[0].get("invert")
        or steps[1].get("use_regex", True)
    ):
        split = f"its split {pattern or kinds!r}"
        raise UnsupportedCheckpoint(f"{checkpoint.tokenizer_path}: llama.cpp has no pre-tokenizer for {split}.")
    return PRE_TOKENIZERS[pattern]
