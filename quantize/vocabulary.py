"""A checkpoint's tokenizer.json as the vocabulary of a GGUF header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from f2gguf.quantize.checkpoint import Checkpoint, read_json
from f2gguf.runtime.errors import BrokenCheckpoint, Disagreement, UnsupportedCheckpoint

# The split pattern of a byte-level BPE, word for word -> llama.cpp's name for its own implementation of it
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
class Vocabulary:
    """What the header says of the tokenizer: llama.cpp's own keys, and what f2gguf adds to them."""

    model: str  # tokenizer.ggml.model
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    special_ids: dict[str, int]  # 'eos' -> id, ...
    flags: dict[str, bool]  # 'add_eos_token' -> ...
    normalizer: str | None  # JSON
    special_tokens: list[str]
    eos_token: str  # the token that closes every text
    is_eos_forced: bool  # the lock asks for an EOS that the checkpoint's own post-processor does not add


def read_vocabulary(checkpoint: Checkpoint, *, eos_token: str | None = None) -> Vocabulary:
    """Read tokenizer.json. `eos_token` is what models.lock states; the checkpoint's own word goes first.

    Raises `UnsupportedCheckpoint` for a tokenizer that llama.cpp cannot follow, `BrokenCheckpoint` for one that does
    not hold together, `Disagreement` where the lock and the checkpoint close texts with different tokens.
    """
    path = checkpoint.tokenizer_path
    spec = read_json(path)
    kind = (spec.get("model") or {}).get("type")
    if kind not in ("BPE", "WordPiece"):
        raise UnsupportedCheckpoint(f"{path}: the tokenizer {kind!r} is not supported; byte-level BPE and WordPiece are.")
    _require_working(checkpoint)
    tokens, token_types = _tokens(checkpoint, spec)
    opening, closing = _template(spec)
    stated = closing[-1] if closing else None
    if stated and eos_token and stated != eos_token:
        raise Disagreement(
            f"models.lock says that texts end with {eos_token}, but {path} ends them with {stated}. "
            "Correct the lock, or fetch the revision that it means."
        )
    special_tokens = [token["content"] for token in spec.get("added_tokens", []) if not token.get("normalized", False)]
    build = _bpe if kind == "BPE" else _wordpiece
    return build(
        spec,
        checkpoint,
        tokens=tokens,
        token_types=token_types,
        opening=opening,
        closing=stated or eos_token,
        normalizer=json.dumps(spec["normalizer"]) if spec.get("normalizer") else None,
        special_tokens=special_tokens,
        is_eos_forced=stated is None and eos_token is not None,
    )


def _bpe(
    spec: dict[str, Any], checkpoint: Checkpoint, *, opening: list[str], closing: str | None, **rest: Any
) -> Vocabulary:
    path = checkpoint.tokenizer_path
    if opening:
        raise UnsupportedCheckpoint(f"{path}: puts {opening[0]} before every text, which is not supported for BPE yet.")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UnsupportedCheckpoint(f"{path}: the normaliser {normalizer!r} is not supported with BPE; NFC is.")
    if closing is None:
        raise BrokenCheckpoint(
            f"{path}: does not say which token ends a text. State it in models.lock as `eos_token = \"...\"`."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    ids = {"eos": rest["tokens"].index(closing)}
    pad = _configured_token(checkpoint, "pad_token")
    if pad in rest["tokens"]:
        ids["padding"] = rest["tokens"].index(pad)
    return Vocabulary(
        model="gpt2",
        pre=_pre_tokenizer(spec, checkpoint),
        merges=merges,
        special_ids=ids,
        flags={"add_bos_token": False, "add_eos_token": True},
        eos_token=closing,
        **rest,
    )


def _wordpiece(
    spec: dict[str, Any], checkpoint: Checkpoint, *, opening: list[str], closing: str | None, **rest: Any
) -> Vocabulary:
    path = checkpoint.tokenizer_path
    model = spec["model"]
    normalizer = (spec.get("normalizer") or {}).get("type")
    expected = {
        "normalizer": (normalizer, "BertNormalizer"),
        "pre_tokenizer": ((spec.get("pre_tokenizer") or {}).get("type"), "BertPreTokenizer"),
        "continuing_subword_prefix": (model.get("continuing_subword_prefix", "##"), "##"),
        "max_input_chars_per_word": (model.get("max_input_chars_per_word", 100), 100),
        "unk_token": (model.get("unk_token", "[UNK]"), "[UNK]"),
    }
    for key, (found, wanted) in expected.items():
        if found != wanted:
            raise UnsupportedCheckpoint(f"{path}: {key} is {found!r}; WordPiece is supported with {wanted!r}.")
    if len(opening) != 1 or closing is None:
        raise UnsupportedCheckpoint(f"{path}: WordPiece is supported with one token before and one after a text.")
    tokens, types = rest["tokens"], rest["token_types"]
    ids = {"bos": tokens.index(opening[0]), "eos": tokens.index(closing), "seperator": tokens.index(closing)}
    ids |= {name: tokens.index(text) for name, text in _WORDPIECE_IDS.items() if text in tokens}
    options = spec["normalizer"]
    strip = options.get("strip_accents")
    rest["tokens"] = [_phantom(token, kind) for token, kind in zip(tokens, types, strict=True)]
    return Vocabulary(
        model="bert",
        pre="default",
        merges=[],
        special_ids=ids,
        flags={
            "add_bos_token": True,
            "add_eos_token": True,
            "add_sep_token": False,
            "normalizer.lowercase": bool(options["lowercase"]),
            "normalizer.strip_accents": bool(options["lowercase"] if strip is None else strip),
        },
        eos_token=closing,
        **rest,
    )


_WORDPIECE_IDS = {"unknown": "[UNK]", "padding": "[PAD]", "mask": "[MASK]"}


def _phantom(token: str, kind: int) -> str:
    if kind == _CONTROL:
        return token
    return token[2:] if token.startswith("##") else _WORD_START + token


def _tokens(checkpoint: Checkpoint, spec: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and types of ids 0 to vocab_size - 1; ids that the tokenizer leaves out become '[PAD<id>]', unused."""
    path = checkpoint.tokenizer_path
    n_vocab = checkpoint.number("vocab_size")
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [_UNUSED] * n_vocab
    try:
        for text, i in spec["model"]["vocab"].items():
            tokens[i], types[i] = text, _NORMAL
        for added in spec.get("added_tokens", []):
            is_control = added["special"] or (added["content"].startswith("<|") and added["content"].endswith("|>"))
            tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if is_control else _USER_DEFINED
    except IndexError as error:
        raise BrokenCheckpoint(f"{path}: has token ids past config.json's vocab_size {n_vocab}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(f"{path}: its vocabulary is damaged: {error!r}. Fetch the model again.") from error
    return tokens, types


def _template(spec: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a single text."""
    post = spec.get("post_processor") or {}
    processors = post["processors"] if post.get("type") == "Sequence" else [post]
    for processor in processors:
        if processor.get("type") == "TemplateProcessing":
            pieces = processor["single"]
            at = next(i for i, piece in enumerate(pieces) if "Sequence" in piece)
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
        raise UnsupportedCheckpoint(
            f"{checkpoint.tokenizer_path}: llama.cpp has no pre-tokenizer for its split {pattern or kinds!r}."
        )
    return PRE_TOKENIZERS[pattern]


def _configured_token(checkpoint: Checkpoint, key: str) -> str | None:
    token = read_json(checkpoint.folder / "tokenizer_config.json", optional=True).get(key)
    return token.get("content") if isinstance(token, dict) else token


def _require_working(checkpoint: Checkpoint) -> None:
    load_tokenizer(checkpoint)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own tokenizer (`tokenizers.Tokenizer`), without truncation or padding."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise BrokenCheckpoint(f"{checkpoint.tokenizer_path}: is no working tokenizer: {error}. Fetch it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
