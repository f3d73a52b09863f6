"""A converted file, read back: does llama.cpp split texts as the checkpoint's own tokenizer does?"""

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

    The ids must equal those of the checkpoint's tokenizer.json on every evaluation text and every hostile string.
    Raises `ConversionMismatch` with the first text that differs. Gives the texts that stock llama.cpp splits
    differently, as it does not run the checkpoint's text normaliser.
    """
    header, name = read_header(path), path.name.removesuffix(PART_SUFFIX)
    if header.require_pooling() != facts.pooling:
        raise ConversionMismatch(f"{name}: the header says {header.pooling} pooling, the checkpoint {facts.pooling}.")
    samples = [*HOSTILE, *(prompted(text, dict(facts.prompts)) for text in texts)]
    expected = checkpoint_ids(facts, samples)
    with open_tokenizer(header) as tokenizer:
        for sample, right in zip(samples, expected, strict=True):
            ids, _ = tokenizer(sample)
            if not np.array_equal(ids, right):
                at, shown = leading_length(ids, right), sample if len(sample) <= 80 else sample[:77] + "..."
                theirs, ours = (some[at : at + 5].tolist() for some in (right, ids))
                raise ConversionMismatch(
                    f"{name}: llama.cpp splits {shown!r} differently from the checkpoint's tokenizer: "
                    f"at token {at + 1} it has {ours}, tokenizer.json {theirs}. Please report this text."
                )
    with Model(path, vocab_only=True) as stock:
        pairs = zip(samples, expected, strict=True)
        return [sample for sample, right in pairs if not np.array_equal(stock.tokenize(sample), right)]


def reference_ids(facts: Facts, texts: Sequence[EvalText]) -> list[Ids]:
    """Token ids of each text as the checkpoint itself sees it: behind its prompt, cut to the model's `max_tokens`."""
    samples = [prompted(text, dict(facts.prompts)) for text in texts]
    return checkpoint_ids(facts, samples, max_tokens=facts.max_tokens)


def checkpoint_ids(facts: Facts, samples: Sequence[str], *, max_tokens: int | None = None) -> list[Ids]:
    """Token ids by the checkpoint's own tokenizer, and the closing token of models.lock if the tokenizer adds none.

    A text of more than `max_tokens` is cut, and keeps its special tokens.
    """
    closing = [facts.vocabulary.special_ids["eos"]] if facts.vocabulary.is_eos_forced else []
    tokenizer = load_tokenizer(facts.checkpoint)
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens - len(closing))
    return [np.array(tokenizer.encode(sample).ids + closing, dtype=np.int32) for sample in samples]
