"""A small tokenizer of XLM-R's kind: Unigram pieces with scores, many of them equal, and a charsmap."""

from __future__ import annotations

import base64
import functools
import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import MINILM, fill

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>"}
NAMED |= {"cls_token": "<s>", "mask_token": "<mask>"}
CONFIG = {
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "vocab_size": 3008,  # some rows more than pieces
}
_BLANKS = "\t\n\r\u00a0\u2003\u2028\u3000\u200b\ufeff"


def write_tiny_xlmr(folder: Path, **changes: Any) -> Path:
    """An XLM-RoBERTa checkpoint of 0.1M random float32 weights, mean pooling; `changes` are of its config.json."""
    folder.mkdir()
    write_unigram(folder)
    _write(folder / "config.json", {**CONFIG, **changes})
    modules = "sentence_transformers.models."
    rows = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    stated = [{"idx": i, "name": str(i), "path": path, "type": modules + kind} for i, (path, kind) in enumerate(rows)]
    _write(folder / "modules.json", stated)
    (folder / "1_Pooling").mkdir()
    _write(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": "mean"})
    return fill(folder)


def as_xlm_roberta(folder: Path) -> None:
    """A Unigram tokenizer in the place of all-MiniLM-L6-v2's."""
    for name in ("special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    write_unigram(folder)


def write_unigram(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as XLM-R's repositories have them."""
    pieces, scores = _pieces()
    added = [(0, "<s>"), (1, "<pad>"), (2, "</s>"), (3, "<unk>"), (len(pieces) - 1, "<mask>")]
    flags = dict.fromkeys(("single_word", "rstrip", "normalized"), False)
    tokens = [{"id": i, "content": text, **flags, "lstrip": i > 3, "special": True} for i, text in added]
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    around += [{"SpecialToken": {"id": "</s>", "type_id": 0}}]
    special = {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in added[::2][:2]}
    steps = [
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap()).decode()},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    _write(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": tokens,
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": around,
                "pair": [*around, *around[2:], {"Sequence": {"id": "B", "type_id": 0}}, *around[2:]],
                "special_tokens": special,
            },
            "decoder": None,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": [*map(list, zip(pieces, scores, strict=True))]},
        },
    )
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512, **NAMED}
    _write(folder / "tokenizer_config.json", settings)


@functools.cache
def _pieces() -> tuple[list[str], list[float]]:
    """Some 3,000 words and letters. The scores are float32, a third of them off by a step of float64."""
    words = json.loads((MINILM / "tokenizer.json").read_text())["model"]["vocab"]
    plain = [word for word in words if not word.startswith("[")]
    letters = [chr(i) for first, last in ((0x21, 0x17F), (0x400, 0x450), (0xAC00, 0xAC40)) for i in range(first, last)]
    texts = [word[2:] if word.startswith("##") else "▁" + word for word in plain[-20000:-1000:8]]
    pieces = [*dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, "가", "が", "ガ", *texts])][:2999]
    rng = np.random.default_rng(0)
    scores = -np.round(rng.uniform(3, 15, len(pieces)), 1).astype(np.float32).astype(np.float64)
    scores[::3] = np.nextafter(scores[::3], 0)
    scores[:4] = 0
    return [*pieces, "<mask>"], [*scores.tolist(), 0.0]


@functools.cache
def charsmap() -> bytes:
    """Rules like those of nmt_nfkc, as SentencePiece stores them: a double-array trie of keys, and what they become."""
    ranges = ((0xA0, 0x180), (0x1EA0, 0x1EFA), (0x2460, 0x2480), (0x3041, 0x3100), (0x3130, 0x3140), (0xAC00, 0xAC80))
    letters = [chr(i) for first, last in (*ranges, (0xFB00, 0xFB07), (0xFF01, 0xFFA0)) for i in range(first, last)]
    rules = dict.fromkeys(_BLANKS, " ") | dict.fromkeys(map(chr, range(1, 9)), "")
    for letter in letters:
        for form in (letter, unicodedata.normalize("NFD", letter)):
            if (made := unicodedata.normalize("NFKC", letter)) != form and form not in rules:
                rules[form] = made
    replaced = b"".join(text.encode() + b"\0" for text in dict.fromkeys(rules.values()))
    places, at = {}, 0
    for text in dict.fromkeys(rules.values()):
        places[text], at = at, at + len(text.encode()) + 1
    trie: dict[int, Any] = {}
    for key, text in rules.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = places[text]
    units = _double_array(trie)
    return struct.pack("<I", 4 * len(units)) + np.array(units, dtype="<u4").tobytes() + replaced


def _double_array(trie: dict[int, Any]) -> list[int]:
    """Units of Darts-clone: child `c` of a node is at its base ^ c, the value of a key at the base itself."""
    units: dict[int, int] = {0: 0}
    waiting, bases, free = [(0, trie)], {0}, 1
    while waiting:
        at, node = waiting.pop()
        while free in units:
            free += 1
        base = free
        while base in bases or any((base ^ byte) in units for byte in node):
            base += 1
        bases.add(base)
        units[at] |= (base ^ at) << 10 | (1 << 8 if 0 in node else 0)
        for byte, child in node.items():
            units[base ^ byte] = child | 1 << 31 if byte == 0 else byte
        waiting += [(base ^ byte, child) for byte, child in node.items() if byte]
    return [units.get(i, 0) for i in range((max(units) | 255) + 1)]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
