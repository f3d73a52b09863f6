"""The tokenizer that sentence-transformers runs, built from a checkpoint's files without transformers.

It is not always the one of tokenizer.json. transformers' BertTokenizer and Qwen2Tokenizer take vocabulary, merges and
post-processor from that file, and make normaliser, split and added tokens by tokenizer_config.json. These are the
rules of transformers 5.24: models/auto/tokenization_auto.py (which class), tokenization_utils_base.py
(`_from_pretrained`: which file states which token), tokenization_utils_tokenizers.py (`TokenizersBackend`),
models/bert and models/qwen2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES
from f2gguf.quantize.checkpoint.config_keys import is_known_code
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN, read_json
from f2gguf.quantize.checkpoint.spm import BLANK
from f2gguf.runtime.errors import BrokenCheckpoint, Disagreement, UnsupportedCheckpoint
from f2gguf.runtime.llama.carried import raise_unless_rust, steps_of

Settings = dict[str, Any]  # tokenizer_config.json, and what other files add to it
Spec = dict[str, Any]  # tokenizer.json

CONFIG = "tokenizer_config.json"
_NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_FALLBACK = {
    **dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix")),
    **{"fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
}
# What a folder without tokenizer.json may hold instead
_OLDER_FILES = ("vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class _Class:
    """A tokenizer class of transformers."""

    model: str | None  # the type of model that it takes; None for any
    defaults: dict[str, str]  # its named tokens
    rebuild: Callable[[Spec, Settings], None]  # puts what it makes itself in the place of tokenizer.json's
    frames_by: tuple[str, str] | None = None  # names of the tokens around a text, whatever the post-processor
    second: str = "$B:1 {last}:1"  # what follows such a text, if another one does
    other_media: tuple[str, ...] = ()  # tokens that stand for images, for which a text model may have no rows


def build_tokenizer(checkpoint: Checkpoint) -> Any:
    """The `tokenizers.Tokenizer` of a checkpoint, without truncation or padding.

    Raises `BrokenCheckpoint` for damaged files, `Disagreement` for a tokenizer.json that the class which
    tokenizer_config.json names cannot take, `UnsupportedCheckpoint` for what f2gguf does not follow.
    """
    _require_tokenizer_json(checkpoint)
    spec, settings = read_json(checkpoint.tokenizer_path), read_json(checkpoint.folder / CONFIG, optional=True)
    _require_plain_settings(checkpoint, settings)
    kind = _class_of(checkpoint, spec, settings)
    from tokenizers import Tokenizer

    with _library(checkpoint):  # which checks the shape of all but the model: from here on it can be relied on
        Tokenizer.from_str(json.dumps({**spec, "model": _NO_MODEL}))
    _require_sane(checkpoint, spec)
    listed = _read_tokens(checkpoint, spec, settings)
    listed = _without_other_media(checkpoint, spec, settings, listed, kind)
    kind.rebuild(spec, settings)
    with _library(checkpoint):
        if kind.model == "Unigram":  # the library reads scores from JSON a step off, and transformers' class does not
            tokenizer = Tokenizer.from_str(json.dumps({**spec, "model": _NO_MODEL}))
            tokenizer.model = _unigram(**spec["model"])
        else:
            tokenizer = Tokenizer.from_str(json.dumps(spec))
        _add_tokens(tokenizer, listed, kind, settings)
    _frame(checkpoint, tokenizer, kind, settings)
    tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _require_tokenizer_json(checkpoint: Checkpoint) -> None:
    older = [name for name in _OLDER_FILES if (checkpoint.folder / name).is_file()]
    if older and not checkpoint.tokenizer_path.exists():
        folder = str(checkpoint.folder)
        code = f"from transformers import AutoTokenizer as A; A.from_pretrained({folder!r}).save_pretrained({folder!r})"
        raise UnsupportedCheckpoint(
            f"{checkpoint.tokenizer_path}: no such file, but {older[0]} is there. transformers makes the one of the "
            f'other: python -c "{code}"'
        )


def _require_plain_settings(checkpoint: Checkpoint, settings: Settings) -> None:
    path = checkpoint.folder / CONFIG
    own_code = settings.get("auto_map")
    own_code = own_code.get("AutoTokenizer") if isinstance(own_code, dict) else own_code
    if own_code and not is_known_code(own_code, checkpoint.config, ARCHITECTURES[checkpoint.model_type].keys):
        raise UnsupportedCheckpoint(f"{path}: auto_map names a tokenizer of the repository's own code.")
    if settings.get("fast_tokenizer_files"):
        raise UnsupportedCheckpoint(f"{path}: fast_tokenizer_files names other files than tokenizer.json.")
    for key in ("do_lower_case", "tokenize_chinese_chars", "split_special_tokens"):
        if not isinstance(settings.get(key, True), bool):
            raise BrokenCheckpoint(f"{path}: {key} is {settings[key]!r}, which is neither true nor false.")
    if settings.get("strip_accents") not in (True, False, None):
        raise BrokenCheckpoint(f"{path}: strip_accents is {settings['strip_accents']!r}, not true, false or null.")


def _require_sane(checkpoint: Checkpoint, spec: Spec) -> None:
    path = checkpoint.tokenizer_path
    if spec["model"].get("dropout"):
        raise UnsupportedCheckpoint(f"{path}: its model has a dropout, which makes the ids of a text random.")


def _class_of(checkpoint: Checkpoint, spec: Spec, settings: Settings) -> _Class:
    model = spec.get("model")
    if not isinstance(model, dict):
        raise BrokenCheckpoint(f"{checkpoint.tokenizer_path}: is no working tokenizer: it has no model. {FETCH_AGAIN}")
    architecture = ARCHITECTURES[checkpoint.model_type]
    stated = settings.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    if not stated or architecture.tokenizer_class_is_fixed:
        stated = architecture.tokenizer_class
    where = checkpoint.folder / (CONFIG if settings.get("tokenizer_class") else "config.json")
    name = str(stated).removesuffix("Fast")
    if name == "PreTrainedTokenizer" or (name == "LlamaTokenizer" and '"ByteLevel"' in json.dumps(spec)):
        name = _AS_IT_IS
    if name not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise UnsupportedCheckpoint(
            f"{where}: tokenizer_class is {stated!r}, which f2gguf does not follow; {known} it does."
        )
    kind = _CLASSES[name]
    if kind.model and model.setdefault("type", kind.model) != kind.model:
        raise Disagreement(
            f"{where}: the tokenizer_class is {stated!r}, which takes {kind.model}, but "
            f"{checkpoint.tokenizer_path} holds {model['type']!r}. Correct it: "
            "PreTrainedTokenizerFast takes tokenizer.json as it is."
        )
    return kind


def _read_tokens(checkpoint: Checkpoint, spec: Spec, settings: Settings) -> list[Any]:
    """The added tokens that the files state, by id. Those that `settings` names become `AddedToken`s or strings."""
    folder, path = checkpoint.folder, checkpoint.folder / CONFIG
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    with _shapes(path):
        listed: dict[int, Any] = {}
        if "added_tokens_decoder" in settings:
            listed = {int(i): _token(token) for i, token in settings["added_tokens_decoder"].items()}
        else:
            _read_older_files(folder, settings, listed)
            listed |= {token["id"]: _token(token) for token in spec.get("added_tokens", [])}
        by_text = {token.content: token for token in listed.values()}
        extra = settings.get("extra_special_tokens") or []
        if isinstance(extra, dict):  # tokens with names of their own
            settings |= {key if key.endswith("_token") else f"{key}_token": token for key, token in extra.items()}
        settings["extra_special_tokens"] = [] if isinstance(extra, dict) else [_named(token) for token in extra]
        for key, value in [(key, value) for key, value in settings.items() if key.endswith("_token")]:
            if key in _NAMED:
                settings[key] = None if value is None else by_text.get(_text(value), _named(value))
            elif isinstance(value, str) or (isinstance(value, dict) and "__type" in value):
                settings[key] = _named(value)
            else:
                settings[key] = None
        if padding := spec.get("padding"):
            settings["padding_token"] = padding["pad_token"]
    return [listed[i] for i in sorted(listed)]


def _without_other_media(
    checkpoint: Checkpoint, spec: Spec, settings: Settings, listed: list[Any], kind: _Class
) -> list[Any]:
    """`listed`, `spec` and `settings` without tokens that stand for images, where a text model has no rows for them.

    transformers gives such a token an id past the table, and fails on a text that holds it. Here it is plain text.
    """
    vocab = spec["model"].get("vocab")
    if not kind.other_media or not isinstance(vocab, dict):
        return listed
    n_rows = checkpoint.count("vocab_size")
    others = [text for text in kind.other_media if n_rows <= vocab.get(text, len({*vocab} - {text}))]
    for text in others:
        vocab.pop(text, None)
    settings |= {key: None for key in settings if key.endswith("_token") and _text(settings[key]) in others}
    settings["extra_special_tokens"] = [t for t in settings["extra_special_tokens"] if _text(t) not in others]
    return [token for token in listed if token.content not in others]


def _read_older_files(folder: Path, settings: Settings, listed: dict[int, Any]) -> None:
    """special_tokens_map.json and added_tokens.json, which count where tokenizer_config.json lists no added tokens."""
    for key, value in read_json(folder / "special_tokens_map.json", optional=True).items():
        if key == "extra_special_tokens" and isinstance(value, list):
            known = settings.get(key) or []
            settings[key] = [*known, *(token for token in value if token not in known)]
        elif key == "additional_special_tokens":
            settings.setdefault("extra_special_tokens", value)
        else:
            settings[key] = _token({**value, "special": True}) if isinstance(value, dict) else value
    special = {_text(settings[key]) for key in _NAMED if settings.get(key)}
    special |= {_text(token) for token in settings.get("extra_special_tokens") or []}
    for content, i in read_json(folder / "added_tokens.json", optional=True).items():
        is_special = content in special
        listed[i] = _token({"content": content, "normalized": not is_special, "special": is_special})


def _named(value: Any) -> Any:
    """A token that tokenizer_config.json names: a string, or the content and flags of a saved `AddedToken`."""
    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return _token(value)
    if isinstance(value, dict | list | int | float):
        raise ValueError(f"{value!r:.80} is no token that transformers reads")
    return value


def _token(value: Any) -> Any:
    from tokenizers import AddedToken

    return AddedToken(value["content"], **{flag: value[flag] for flag in _FLAGS if flag in value})


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(getattr(token, "content", token))


def _add_tokens(tokenizer: Any, listed: list[Any], kind: _Class, settings: Settings) -> None:
    """Add what `TokenizersBackend` adds, in its order: ids and flags depend on it.

    Only the class's own default tokens are left out where no file and no vocabulary has them: transformers gives them
    ids that the model has no weights for, and fails on a text with one.
    """
    from tokenizers import AddedToken

    for key, text in kind.defaults.items():
        is_known = text in {_text(token) for token in listed} or tokenizer.token_to_id(text) is not None
        settings.setdefault(key, text if is_known else None)
    settings.setdefault("pad_token", settings.pop("padding_token", None))
    others = [key for key in settings if key.endswith("_token") and key not in _NAMED]
    others.sort(key=lambda key: isinstance(settings[key], str))  # strings come last
    named = [settings[key] for key in (*_NAMED, *others) if settings.get(key) is not None]
    in_file = tokenizer.get_added_tokens_decoder().values()
    known, names = {token.content for token in (*in_file, *listed)}, {_text(token) for token in named}
    added = list(listed)
    for token in (*named, *settings["extra_special_tokens"]):
        if _text(token) not in known:
            known.add(_text(token))
            added.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    for token in added:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(added)
    if kind is _CLASSES["Qwen2Tokenizer"]:  # once more, so that their flags are these
        texts = dict.fromkeys(map(_text, (*named, *settings["extra_special_tokens"])))
        tokenizer.add_tokens([AddedToken(text, special=True) for text in texts])


def _frame(checkpoint: Checkpoint, tokenizer: Any, kind: _Class, settings: Settings) -> None:
    if kind.frames_by is None:
        return
    from tokenizers.processors import TemplateProcessing

    first, last = (_text(settings[key]) if settings[key] is not None else "" for key in kind.frames_by)
    ids = [(text, tokenizer.token_to_id(text)) for text in (first, last)]
    if lacking := [key for key, (_, i) in zip(kind.frames_by, ids, strict=True) if i is None]:
        names = ", ".join(lacking)
        raise BrokenCheckpoint(f"{checkpoint.folder / CONFIG}: its {names} is not in {checkpoint.tokenizer_path}.")
    single = f"{first}:0 $A:0 {last}:0"
    with _library(checkpoint):
        tokenizer.post_processor = TemplateProcessing(single, f"{single} {kind.second.format(last=last)}", ids)


def _as_it_is(_spec: Spec, _settings: Settings) -> None:
    pass


def _bert(spec: Spec, settings: Settings) -> None:
    spec["model"] |= {
        "unk_token": _text(settings.get("unk_token", "[UNK]")),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    spec["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": settings.get("do_lower_case", True),
    }
    spec["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    spec["added_tokens"] = []


def _qwen2(spec: Spec, settings: Settings) -> None:
    spec["model"] |= {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    spec["normalizer"] = {"type": "NFC"}
    blank = bool(settings.get("add_prefix_space"))
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": blank, "trim_offsets": True, "use_regex": False},
        ],
    }
    spec["added_tokens"] = []


def _llama(spec: Spec, settings: Settings) -> None:
    spec["model"] |= {**_BYTE_FALLBACK, "unk_token": None}
    always = "first" if not settings.get("legacy", False) else "always"
    scheme = always if settings.get("add_prefix_space") in (True, None) else "never"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": False}
    spec["added_tokens"] = []


def _gemma(spec: Spec, settings: Settings) -> None:
    spec["model"] |= {**_BYTE_FALLBACK, "unk_token": _text(settings.get("unk_token") or "<unk>")}
    blank = {"pattern": {"String": " "}}
    spec["normalizer"] = {"type": "Replace", **blank, "content": BLANK}
    spec["pre_tokenizer"] = {"type": "Split", **blank, "behavior": "MergedWithPrevious", "invert": False}
    spec["added_tokens"] = []


def _roberta(spec: Spec, settings: Settings) -> None:
    _qwen2(spec, settings)
    blank = bool(settings.get("add_prefix_space"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": blank, "trim_offsets": True, "use_regex": True}
    spec |= {"normalizer": None, "pre_tokenizer": byte_level}


def _xlm_roberta(spec: Spec, settings: Settings) -> None:
    spec["model"] |= {"unk_id": 3, "byte_fallback": False}
    steps = steps_of(spec.get("normalizer"), "normalizers")
    spec["normalizer"] = next((step for step in steps if step.get("type") == "Precompiled"), None)
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": scheme, "split": True},
        ],
    }
    spec["added_tokens"] = []


def _unigram(vocab: list[tuple[str, float]], unk_id: int, byte_fallback: bool, **_: object) -> Any:
    from tokenizers import models

    return models.Unigram([(piece, score) for piece, score in vocab], unk_id, byte_fallback)


@contextlib.contextmanager
def _library(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what the library `tokenizers` raises, bare Exceptions among it, into `BrokenCheckpoint`."""
    try:
        yield
    except BaseException as error:
        raise_unless_rust(error)
        path = checkpoint.tokenizer_path
        raise BrokenCheckpoint(f"{path}: is no working tokenizer: {error}. {FETCH_AGAIN}") from error


@contextlib.contextmanager
def _shapes(path: Path) -> Iterator[None]:
    """Turn what data of the wrong shape raises into `BrokenCheckpoint`."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BrokenCheckpoint(f"{path}: states tokens in no known way: {error}. {FETCH_AGAIN}") from error


_AS_IT_IS = "TokenizersBackend"
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
_CLASSES = {
    _AS_IT_IS: _Class(model=None, defaults={}, rebuild=_as_it_is),
    "BertTokenizer": _Class(
        model="WordPiece",
        defaults={
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
        rebuild=_bert,
        frames_by=("cls_token", "sep_token"),
    ),
    "Qwen2Tokenizer": _Class(
        model="BPE",
        defaults=dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
        rebuild=_qwen2,
    ),
    "LlamaTokenizer": _Class(
        model="BPE",
        defaults={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        rebuild=_llama,
    ),
    "GemmaTokenizer": _Class(
        model="BPE",
        defaults={
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        rebuild=_gemma,
        other_media=("<image_soft_token>",),
    ),
    "RobertaTokenizer": _Class(
        model="BPE",
        defaults=_ROBERTA_TOKENS,
        rebuild=_roberta,
        frames_by=("cls_token", "sep_token"),
        second="{last} $B {last}",
    ),
    "XLMRobertaTokenizer": _Class(
        model="Unigram",
        defaults=_ROBERTA_TOKENS,
        rebuild=_xlm_roberta,
        frames_by=("bos_token", "eos_token"),
        second="{last} $B {last}",
    ),
}
