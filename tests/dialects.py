"""f2llm-nano's byte-level BPE with the special tokens, split and frame of other families' tokenizers, or as theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import edit_json
from f2gguf.quantize.checkpoint.spm import BLANK
from f2gguf.quantize.checkpoint.vocabulary import PRE_TOKENIZERS
from f2gguf.runtime.gguf.vocabulary import byte_letters

N_ROWS = 16448  # of the token table: some more than these tokenizers have tokens


def as_modernbert(folder: Path) -> None:
    """f2llm-nano's byte-level BPE with ModernBERT's special tokens, runs of blanks, and split."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "rstrip": False, "lstrip": False, "normalized": False, "special": True}
    names = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    special = [{"content": name, **flags, "lstrip": name == "[MASK]"} for name in names]
    blanks = [{"content": " " * n, **flags, "normalized": True, "special": False} for n in range(2, 9)]
    spec["added_tokens"] += [{"id": 16384 + i, **token} for i, token in enumerate([*special, *blanks])]
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec["post_processor"] = around("[CLS]", 16385, "[SEP]", 16386)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "eos_token": ...}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", mask_token="[MASK]", **named)


def as_granite_97m(folder: Path) -> None:
    """The same with the split of GPT-4o, whole words before merges, and no normaliser."""
    as_modernbert(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    pattern = next(pattern for pattern, name in PRE_TOKENIZERS.items() if name == "gpt-4o")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {**spec["pre_tokenizer"], "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    spec["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "normalizer": None}))


def as_roberta(folder: Path) -> None:
    """f2llm-nano's byte-level BPE with RoBERTa's special tokens."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "rstrip": False, "normalized": True, "special": True}
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    spec["added_tokens"] += [
        {"id": 16384 + i, "content": name, **flags, "lstrip": name == "<mask>"} for i, name in enumerate(names)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    changed = {"eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "RobertaTokenizer", "unk_token": "<unk>"}
    edit_json(folder / "tokenizer_config.json", **changed, bos_token="<s>")


def around(first: str, first_id: int, last: str, last_id: int) -> dict[str, Any]:
    """A post-processor that puts one token before and one after a text."""
    template = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template.append({"SpecialToken": {"id": last, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ((first, first_id), (last, last_id))}
    return {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": tokens}


def as_spm(
    *, before: str | None = "<s>", behind: str | None = "</s>", n_merges: int | None = None
) -> Callable[[Path], None]:
    """A byte-level BPE -> a BPE of letters that falls back to bytes, as SentencePiece trains it; `n_merges` are kept.

    The tokens that tokenizer.json added are left out; `before` and `behind` stand around a text.
    """

    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}

        def spelled(piece: str) -> str:
            return bytes(map(bytes_of.__getitem__, piece)).decode("utf-8", errors="replace").replace(" ", BLANK)

        special = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", "<bos>", "<eos>")
        letters = [letter for letter in map(spelled, content["model"]["vocab"]) if len(letter) == 1]
        texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
        known, merges = dict.fromkeys(texts), []
        for merge in [tuple(map(spelled, merge)) for merge in content["model"]["merges"][:n_merges]]:
            if known.keys() >= {*merge} and not {*merge} & {"\0", "\ufffd"} and merge not in merges[-1:]:
                merges.append(merge)
                known["".join(merge)] = None
        known = {text: None for text in known if text not in "\0\ufffd"}
        vocab = {text: i for i, text in enumerate(known)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        content["added_tokens"] = [{"id": vocab[text], "content": text, **flags} for text in special]
        content["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": BLANK},
                {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
            ],
        }
        around = [text for text in (before, behind) if text]
        single = [{"SpecialToken": {"id": text, "type_id": 0}} for text in around]
        single.insert(int(before is not None), {"Sequence": {"id": "A", "type_id": 0}})
        tokens = {text: {"id": text, "ids": [vocab[text]], "tokens": [text]} for text in around}
        content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single}
        content["post_processor"]["special_tokens"] = tokens
        content |= {"pre_tokenizer": None, "decoder": None}
        content["model"] |= {"vocab": vocab, "merges": merges, "unk_token": "<unk>"}
        content["model"] |= dict.fromkeys(("fuse_unk", "byte_fallback"), True)
        (folder / "tokenizer.json").write_text(json.dumps(content))
        names = {"unk_token": "<unk>", "bos_token": before, "eos_token": "</s>", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
        )
        edit_json(folder / "config.json", vocab_size=len(vocab))

    return edit


def as_gemma(folder: Path) -> None:
    """A BPE of letters between <bos> and <eos>, built by Gemma's class."""
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    as_spm(before=named["bos_token"], behind=named["eos_token"], n_merges=2000)(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer", **named)


def as_mistral(folder: Path) -> None:
    """The same behind <s>, and nothing behind a text; a blank is put before it."""
    as_spm(behind=None, n_merges=2000)(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def as_llama(folder: Path) -> None:
    """The same between <s> and </s>, built by Llama's class, which puts a blank before a text otherwise."""
    as_spm(n_merges=2000)(folder)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
