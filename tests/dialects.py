"""f2llm-nano's byte-level BPE with the special tokens, split and frame of other families' tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import edit_json
from f2gguf.quantize.checkpoint.vocabulary import PRE_TOKENIZERS

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
