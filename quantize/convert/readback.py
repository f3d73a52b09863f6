"""What was just written, read back: does llama.cpp split texts as the checkpoint's own tokenizer does?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from f2gguf.evals.texts import HOSTILE, EvalText, prompted
from f2gguf.quantize.checkpoint.vocabulary import load_tokenizer
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import ConversionMismatch
from f2gguf.runtime.files import PART_SUFFIX
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids, leading_length
from f2gguf.runtime.llama.tokenizer import open_tokenizer


def read_back(path: Path, facts: Facts, texts: Sequence[EvalText]) -> list[str]:
    """Check the header and the token ids of a converted file.

    Ids must equal those of the checkpoint's tokenizer.json on every evaluation text and every hostile string. Raises
    `ConversionMismatch` with the first text that differs. Gives the texts that stock llama.cpp, which does not run
    the checkpoint's text normaliser, would split differently.
    """
    header = read_header(path)
    name = path.name.removesuffix(PART_SUFFIX)
    if header.require_pooling() != facts.pooling:
        raise ConversionMismatch(f"{name}: the header says {header.pooling} pooling, the checkpoint {facts.pooling}.")
    prompts = dict(facts.prompts)
    samples = [*HOSTILE, *(prompted(text, prompts) for text in texts)]
    expected = checkpoint_ids(facts, samples)
    with open_tokenizer(header) as tokenizer:
        for sample, right in zip(samples, expected, strict=True):
            ids, _ = tokenizer(sample)
            if not np.array_equal(ids, right):
                raise ConversionMismatch(f"{name}: {_first_difference(sample, ids, right)}")
    with Model(path, vocab_only=True) as stock:
        pairs = zip(samples, expected, strict=True)
        return [sample for sample, right in pairs if not np.array_equal(stock.tokenize(sample), right)]


def reference_ids(facts: Facts, texts: Sequence[EvalText]) -> list[Ids]:
    """Token ids that the checkpoint itself sees of each text: prompt in front, cut to the longest input."""
    prompts = dict(facts.prompts)
    return checkpoint_ids(facts, [prompted(text, prompts) for text in texts], max_tokens=facts.max_tokens)


def checkpoint_ids(facts: Facts, samples: Sequence[str], *, max_tokens: int | None = None) -> list[Ids]:
    """Token ids by the checkpoint's own tokenizer, with the closing token that models.lock adds where it adds none.

    Longer texts than `max_tokens` are cut, the special tokens kept.
    """
    closing = [facts.vocabulary.special_ids["eos"]] if facts.vocabulary.is_eos_forced else []
    tokenizer = load_tokenizer(facts.checkpoint)
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens - len(closing))
    return [np.array(tokenizer.encode(sample).ids + closing, dtype=np.int32) for sample in samples]


def _first_difference(text: str, ids: Ids, right: Ids) -> str:
    at = leading_length(ids, right)
    shown = text if len(text) <= 80 else text[:77] + "..."
    return (
        f"llama.cpp splits {shown!r} differently from the checkpoint's tokenizer: at token {at + 1} it has "
        f"{ids[at : at + 5].tolist()}, tokenizer.json {right[at : at + 5].tolist()}. Please report this text."
    )
