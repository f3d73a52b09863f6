"""The doctor's checks that any file must pass: it is whole, holds a model, and its vocabulary and numbers fit it.

What llama.cpp would end the process for is an error here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from f2gguf.runtime.errors import NotAnEmbeddingModel, PoolingMissing
from f2gguf.runtime.gguf.case import AGAIN, Case, Check, Finding
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.vocabulary import (
    CONTROL,
    KEY_MERGES,
    KEY_SCORES,
    KEY_TOKENS,
    KEY_TYPES,
    NORMAL,
    byte_letters,
    product,
    shown,
)

_error, _warning = partial(Finding, "error"), partial(Finding, "warning")
_TOKENIZERS = ("gpt2", "bert", "llama", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace")
_BYTE_LEVEL = ("gpt2",)
_NO_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no text in UTF-8 has
_NO_BYTES = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace", "kimi-k2")  # pre of gpt2 that have none
_SPM_BYTES = {b"<0x%02X>" % byte for byte in range(256)}
_SPECIALS = ("bos", "eos", "unknown", "seperator", "padding", "mask", "cls")
_LOOKS_SPECIAL = re.compile(rb"[<\[|_{]")
_OPENING = ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "<|bos|>")
_CLOSING: tuple[str, ...] = (
    "[SEP]",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eos|>",
)
_CLOSING += ("<|end|>", "<end_of_turn>", "[EOS]", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_SPELLED = {"bos": _OPENING, "eos": _CLOSING, "seperator": _CLOSING, "unknown": ("[UNK]", "<unk>")}
_DOES = dict.fromkeys(("eos", "seperator"), "texts close with") | {"bos": "texts open with"}
_DOES |= {"unknown": "what has no token becomes"}
_EPSILONS = [float(np.float32(10.0**-n)) for n in range(5, 13)]
# Of rotary embeddings: nomic, most models, jina-v3, ModernBERT, EuroBERT, Llama, Qwen, jina-v5
_BASES = [1e3, 1e4, 2e4, 8e4, 1e5, 1.5e5, 1.6e5, 2.5e5, 5e5, 1e6, 3.5e6, 5e6, 1e7]
_BASES_OF = {"qwen3": [base for base in _BASES if base >= 1e6]}  # all that were published
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")  # types of tensors
_MAX_BLOCKS, _MAX_EXPERTS = 512, 1024
_MAX_WIDTH = 1 << 24  # of all heads together: llama.cpp counts in 32 bits, in which larger ones come round again
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_WHOLLY_ROTARY = ("qwen2", "qwen3", "llama", "llama-embed", "mistral3")
_ROTARY = ("qwen2", "qwen3", "modern-bert", "nomic-bert", "gemma-embedding", "gemma3", "eurobert")
_HEADS = {128: 2, 256: 4, 312: 12, 384: 12, 512: 8, 768: 12, 1024: 16}  # width -> heads of BERT, whoever trained it
_WIDTHS = (32, 64, 80, 128)  # of a head of other encoders
_PLAIN_TYPES = {"F16": ("F16", "F32"), "BF16": ("BF16", "F32"), "F32": ("F32",)}


def usable(case: Case) -> Iterator[Finding]:
    try:
        case.header.require_pooling(case.pooling)
    except (NotAnEmbeddingModel, PoolingMissing) as error:
        reason, _, mend = str(error).removeprefix(f"{case.header.path}: ").partition(". ")
        check = "pooling" if isinstance(error, PoolingMissing) else "model"
        yield _error(check, reason, "no vector comes of it so", mend or AGAIN)


def sealed(case: Case) -> Iterator[Finding]:
    if is_sealed(case.header) is False:
        yield _warning(
            "seal",
            "its header is not as f2gguf wrote it",
            "another program changed it, or it is damaged, and its figures may be another file's",
            f"Try `f2gguf selftest {case.header.path}`, or download or make it again.",
        )


def vocabulary(case: Case) -> Iterator[Finding]:
    found, error = case.vocabulary, partial(_error, "vocabulary")
    if case.tokenizer not in _TOKENIZERS:
        what = f"tokenizer.ggml.model is {case.tokenizer!r}" if case.tokenizer else "tokenizer.ggml.model is missing"
        yield error(what, "llama.cpp has no such tokenizer", AGAIN)
        return
    if not found.tokens:
        yield error(f"{KEY_TOKENS} is missing, or no list of texts", "the file cannot read a text", AGAIN)
        return
    if len(found.ids) < found.n_tokens:
        yield error(f"{shown(_twice(found.tokens))} is there twice", "llama.cpp would end the process", AGAIN)
    rows = next((t.shape[0] for t in case.header.tensors if t.name == "token_embd.weight"), found.n_tokens)
    if rows != found.n_tokens:
        what = f"{found.n_tokens:,} tokens, and a token table of {rows:,} rows"
        yield error(what, "tokens and vectors do not belong together", AGAIN)
    for key, numbers in ((KEY_TYPES, found.types), (KEY_SCORES, _scores(case))):
        if numbers is not None and len(numbers) != found.n_tokens:
            yield error(f"{key} has {len(numbers):,} values for {found.n_tokens:,} tokens", "they do not fit", AGAIN)
    if not _is_utf8(b" ".join(found.tokens)):
        damaged = [token for token in found.tokens if not _is_utf8(token)]
        yield _warning("vocabulary", f"{shown(damaged)} is no UTF-8", "the header is damaged", AGAIN)
    if found.types is not None:
        yield from _types(case)
    elif case.tokenizer in ("gpt2", "bert", "llama", "t5"):
        yield _warning("vocabulary", f"{KEY_TYPES} is missing", "special tokens in texts are then split", AGAIN)
    yield from (_merges(case) if case.tokenizer in ("gpt2", "gemma4") else ())
    if case.tokenizer == "llama" and not found.ids.keys() >= _SPM_BYTES:
        what = f"{len(_SPM_BYTES - found.ids.keys())} bytes have no token (such as <0x00>)"
        yield error(what, "llama.cpp would end the process on letters that no token has", AGAIN)


def special_tokens(case: Case) -> Iterator[Finding]:
    if not case.vocabulary.tokens:
        return
    for role in _SPECIALS:
        key = f"tokenizer.ggml.{role}_token_id"
        if key in case.values and case.vocabulary.text(case.values[key]) is None:
            what = f"{key} is {case.values[key]!r}, and there are {case.vocabulary.n_tokens:,} tokens"
            yield _warning("special tokens", what, "llama.cpp takes another token without a word", AGAIN)
    needed = {"bos": case.opens, case.closing_role: case.closes}
    needed["unknown"] = case.tokenizer in ("bert", "t5")
    for role in (role for role, is_needed in needed.items() if is_needed):
        if case.vocabulary.text(case.id_of(role)) is None:
            what = f"texts are given a token that the file does not state ({role}_token_id)"
            mend = f"Write it in: {case.mended('--eos-token TOKEN')}." if role == "eos" else AGAIN
            yield _error("special tokens", what, "llama.cpp would end the process", mend)
        elif case.vocabulary.text(case.id_of(role)) not in _SPELLED[role]:
            what = f"{_DOES[role]} {case.named(role)}"
            mend = f"Name the right one: {case.mended('--eos-token TOKEN')}." if role == "eos" else AGAIN
            yield _warning("special tokens", what, "no known model does, so the id is missing or damaged", mend)


def shape(case: Case) -> Iterator[Finding]:
    """What llama.cpp asserts of a model's shape (src/llama-model.cpp, `load_hparams`, and the graphs)."""
    error, count, named = partial(_error, "shape"), case.count, f"{case.architecture}."
    ends = "llama.cpp would end the process"
    blocks = len({tensor.name.split(".")[1] for tensor in case.header.tensors if tensor.name.startswith("blk.")})
    if count("block_count") != blocks or not 0 < blocks <= _MAX_BLOCKS:
        what = f"{named}block_count is {count('block_count') or 'missing'}, and there are tensors of {blocks} blocks"
        yield error(what, ends, AGAIN)
    if odd := [tensor for tensor in case.header.tensors if tensor.type in _NO_WEIGHTS]:
        yield error(f"{odd[0].name} is {odd[0].type}", "no weights are stored so", AGAIN)
    # What is added or multiplied value by value, and not a table or a matrix
    plain = [tensor for tensor in case.header.tensors if len(tensor.shape) == 1 or tensor.name == "token_types.weight"]
    if odd := [tensor for tensor in plain if tensor.type != "F32"]:
        yield error(f"{odd[0].name} is {odd[0].type}, not F32", ends, AGAIN)
    if (kind := case.of_architecture("rope.scaling.type", None)) not in (None, *_ROPE_SCALINGS):
        yield error(f"{named}rope.scaling.type is {kind!r}", ends, AGAIN)
    if kind in ("linear", "yarn") and not case.of_architecture("rope.scaling.factor", None):
        yield _warning("shape", f"{named}rope.scaling.factor is missing", f"{kind} scaling needs it", AGAIN)
    per_head = count("attention.key_length") or case.header.n_embd // (count("attention.head_count") or 1)
    heads, shared = count("attention.head_count"), count("attention.head_count_kv")
    if heads and shared is not None and not (0 < shared <= heads and heads % shared == 0):
        yield error(f"{named}attention.head_count_kv is {shared} for {heads} heads", ends, AGAIN)
    if any((heads or 0) * (count(f"attention.{part}_length") or 0) >= _MAX_WIDTH for part in ("key", "value")):
        yield error(f"{named}attention.key_length or value_length is beyond any model", ends, AGAIN)
    rotary = count("rope.dimension_count")
    is_whole = case.architecture not in _WHOLLY_ROTARY or rotary == per_head
    if rotary is not None and not (0 < rotary <= per_head and rotary % 2 == 0 and is_whole):
        yield error(f"{named}rope.dimension_count is {rotary} for heads of {per_head}", ends, AGAIN)
    experts, used = count("expert_count") or 0, count("expert_used_count") or 0
    if experts > _MAX_EXPERTS or used > experts or (experts and not used):
        yield error(f"{named}expert_used_count is {used} of {experts} experts", ends, AGAIN)
    if (count("nextn_predict_layers") or 0) > blocks:
        yield error(f"{named}nextn_predict_layers is more than the {blocks} blocks", ends, AGAIN)


def numbers(case: Case) -> Iterator[Finding]:
    """Numbers that no maker of an embedding model chose. A bit that flipped in one leaves such a number."""
    why = "no known embedding model has it, so the header may be damaged"
    for key, value in case.values.items():
        bases = _BASES_OF.get(case.architecture, _BASES) if ".rope.freq_base" in key else None
        known = _EPSILONS if key.endswith("epsilon") else bases
        is_odd = isinstance(value, float) and key.startswith(f"{case.architecture}.")
        if is_odd and (value not in known if known else not np.isfinite(value)):
            mend = f"Compare it with the checkpoint's config.json. {AGAIN}"
            yield _warning("numbers", f"{key} is {float(str(np.float32(value)))}", why, mend)
    if case.architecture in _ROTARY and f"{case.architecture}.rope.freq_base" not in case.values:
        what = f"{case.architecture}.rope.freq_base is missing"
        yield _warning("numbers", what, "llama.cpp then takes 10,000, and few such models have that", AGAIN)
    heads, width = case.of_architecture("attention.head_count", None), case.header.n_embd
    usual_heads = [_HEADS[width]] if case.architecture == "bert" and width in _HEADS else [width / n for n in _WIDTHS]
    if "bert" in case.architecture and type(heads) is int and heads not in usual_heads:
        what = f"{case.architecture}.attention.head_count is {heads} for a width of {width}"
        yield _warning("numbers", what, "no known encoder has such heads, so the header may be damaged", AGAIN)
    usual = _PLAIN_TYPES.get(case.header.file_type)
    odd = [t for t in case.header.tensors if usual and t.type not in usual]
    if odd and "general.file_type" in case.values and not case.is_own:  # f2gguf keeps what F16 can't hold as it is
        what = f"{odd[0].name} is {odd[0].type} in a file of {case.header.file_type}"
        yield _warning("numbers", what, "the header may be damaged", AGAIN)


def _scores(case: Case) -> Sequence[Any] | None:
    values = case.values.get(KEY_SCORES)
    return range(length) if isinstance(length := getattr(values, "length", None), int) else values


def _types(case: Case) -> Iterator[Finding]:
    found = case.vocabulary
    assert found.types is not None
    tokens = found.tokens or []
    if len(found.types) and not (found.types.min() >= 0 and found.types.max() <= 6):
        yield _warning("vocabulary", f"{KEY_TYPES} has types beyond 6", "the header is damaged", AGAIN)
    controls = [tokens[i] for i in np.flatnonzero(found.types[: len(tokens)] == CONTROL)]
    if odd := [token for token in controls if not _LOOKS_SPECIAL.search(token)]:
        why = "texts that hold it are split differently than in training"
        yield _warning("vocabulary", f"{shown(odd)} is called a special token", why, AGAIN)


def _merges(case: Case) -> Iterator[Finding]:
    """Byte-level BPE closes: every byte has a token, and so has what every merge makes."""
    found, why = case.vocabulary, "words that need it are split differently than in training"
    if found.merges is None:
        if case.pre != "kimi-k2":
            yield _error("vocabulary", f"{KEY_MERGES} is missing", "llama.cpp cannot split texts without it", AGAIN)
        return
    if len(set(found.merges)) < len(found.merges):
        what = f"the merge {shown(_twice(found.merges))} is there twice"
        yield _warning("vocabulary", what, "the header is damaged", AGAIN)
    ids = found.ids
    if lacking := [merge for merge in found.merges if product(merge) not in ids]:
        yield _warning("vocabulary", f"no token is what the merge {shown(lacking)} makes", why, AGAIN)
    if case.tokenizer in _BYTE_LEVEL and case.pre not in _NO_BYTES:
        yield from _bytes(case)


def _bytes(case: Case) -> Iterator[Finding]:
    found, letters = case.vocabulary, byte_letters()
    needed = (letter.encode() for byte, letter in enumerate(letters) if byte not in _NO_UTF8)
    if missing := [letter for letter in needed if letter not in found.ids]:
        what = f"{len(missing)} of the bytes of UTF-8 have no token ({shown(missing)})"
        yield _warning("vocabulary", what, "texts that hold them lose letters", AGAIN)
    types = np.full(found.n_tokens, NORMAL) if found.types is None else found.types
    plain = [token for token, kind in zip(found.tokens or [], types.tolist(), strict=False) if kind == NORMAL]
    spelled = set(letters)
    if not spelled.issuperset(b"".join(plain).decode("utf-8", errors="replace")):
        strange = [token for token in plain if not spelled.issuperset(token.decode("utf-8", errors="replace"))]
        what = f"{shown(strange)} is not spelled in the letters of byte-level BPE"
        yield _warning("vocabulary", what, "no text can ever hold it", AGAIN)


def _twice(items: Sequence[bytes]) -> list[bytes]:
    return [item for item, n in Counter(items).items() if n > 1]


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


CHECKS: tuple[Check, ...] = (usable, sealed, vocabulary, special_tokens, shape, numbers)
