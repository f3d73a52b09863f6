"""A converted file, read back: does its tokenizer split texts as the checkpoint's own does?"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.full_precision import quiet_transformers
from f2gguf.evals.texts import HOSTILE, EvalText, prompted
from f2gguf.quantize.checkpoint.tokenizer_files import build_tokenizer
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import ConversionMismatch
from f2gguf.runtime.files import PART_SUFFIX
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.carried import carried_tokenizer
from f2gguf.runtime.llama.model import Model
from f2gguf.runtime.llama.packing import Ids, leading_length
from f2gguf.runtime.llama.tokenizer import open_tokenizer

_MAX_ADDED = 400  # added tokens that are tried; a vocabulary may hold thousands that nobody ever trained
_TRANSFORMERS = 5  # the major version whose rules `build_tokenizer` follows
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")  # of a tokenizer.json, that a text's ids depend on


def read_back(path: Path, facts: Facts, texts: Sequence[EvalText]) -> list[str]:
    """Check the header and the token ids of a converted file.

    The file's tokenizer must be the checkpoint's, part by part. Its ids must equal those of the checkpoint on every
    evaluation text, every hostile string, and every added token: alone, in a sentence and glued to letters. Where
    transformers is installed, its own tokenizer must give the same. Raises `ConversionMismatch` for what differs. Gives
    the texts that stock llama.cpp splits differently, as it runs neither the checkpoint's normaliser nor the flags of
    its added tokens.
    """
    header, name = read_header(path), path.name.removesuffix(PART_SUFFIX)
    if header.require_pooling() != facts.pooling:
        raise ConversionMismatch(f"{name}: the header says {header.pooling} pooling, the checkpoint {facts.pooling}.")
    checkpoints = build_tokenizer(facts.checkpoint)
    if differing := _differing_parts(carried_tokenizer(header), checkpoints):
        raise ConversionMismatch(
            f"{name}: its {', '.join(differing)} differ from the checkpoint's. Please report the model."
        )
    prompts = dict(facts.prompts)
    samples = [*HOSTILE, *_added_token_samples(checkpoints), *(prompted(text, prompts) for text in texts)]
    expected = checkpoint_ids(facts, samples)
    samples, expected = _with_tokens(samples, expected)
    with open_tokenizer(header) as tokenizer:
        _require_equal(
            name, "the checkpoint's tokenizer", samples, expected, [tokenizer(sample)[0] for sample in samples]
        )
    if (theirs := _transformers_tokenizer(facts)) is not None:
        closing = _forced_closing(facts)
        ids = [np.array(theirs(sample, verbose=False)["input_ids"] + closing, dtype=np.int32) for sample in samples]
        _require_equal(name, "transformers' AutoTokenizer", samples, ids, expected)
    with Model(path, vocab_only=True) as stock:
        pairs = zip(samples, expected, strict=True)
        return [sample for sample, right in pairs if not np.array_equal(stock.tokenize(sample), right)]


def reference_ids(facts: Facts, texts: Sequence[EvalText]) -> list[Ids]:
    """Token ids of each text as the checkpoint itself sees it: behind its prompt, cut to the model's `max_tokens`."""
    samples = [prompted(text, dict(facts.prompts)) for text in texts]
    return checkpoint_ids(facts, samples, max_tokens=facts.max_tokens)


def checkpoint_ids(facts: Facts, samples: Sequence[str], *, max_tokens: int | None = None) -> list[Ids]:
    """Token ids by the checkpoint's own tokenizer, and the closing token that is stated if the tokenizer adds none.

    A text of more than `max_tokens` is cut, and keeps its special tokens.
    """
    closing = _forced_closing(facts)
    tokenizer = build_tokenizer(facts.checkpoint)
    if max_tokens is not None:
        tokenizer.enable_truncation(max_tokens - len(closing))
    return [np.array(tokenizer.encode(sample).ids + closing, dtype=np.int32) for sample in samples]


def _with_tokens(samples: Sequence[str], ids: Sequence[Ids]) -> tuple[list[str], list[Ids]]:
    """The samples that have a token: without special tokens around a text, an empty one has none."""
    rows = [i for i, row in enumerate(ids) if len(row)]
    return [samples[i] for i in rows], [ids[i] for i in rows]


def _forced_closing(facts: Facts) -> list[int]:
    return [facts.vocabulary.special_ids["eos"]] if facts.vocabulary.is_eos_forced else []


def _differing_parts(ours: Any, checkpoints: Any) -> list[str]:
    spec, right = json.loads(ours.to_str()), json.loads(checkpoints.to_str())
    return [part for part in _PARTS if spec[part] != right[part]]


def _added_token_samples(tokenizer: Any) -> Iterator[str]:
    """Every added token alone, in a sentence, glued to letters and itself, and in other cases."""
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    step = -(-len(tokens) // _MAX_ADDED) or 1
    for token in tokens[::step]:
        yield token
        yield f"I asked {token} today, and  {token}\t. {token}"
        yield f"a{token}b{token}{token} {token.upper()}x{token.lower()}é{token[:-1]} {token.title()}"


def _transformers_tokenizer(facts: Facts) -> Any:
    """transformers' tokenizer of the checkpoint; None where transformers is not installed, or of other rules."""
    if importlib.util.find_spec("transformers") is None or int(version("transformers").split(".")[0]) < _TRANSFORMERS:
        return None
    from transformers import AutoConfig, AutoTokenizer

    config = facts.checkpoint.config  # of which only these keys count, and others may be such as transformers refuses
    stated = {key: config[key] for key in ("tokenizer_class",) if key in config}
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(
            facts.checkpoint.folder,
            config=AutoConfig.for_model(facts.checkpoint.model_type, **stated),
            local_files_only=True,
            trust_remote_code=False,
        )


def _require_equal(name: str, whose: str, samples: Sequence[str], right: Sequence[Ids], found: Sequence[Ids]) -> None:
    for sample, theirs, ours in zip(samples, right, found, strict=True):
        if not np.array_equal(theirs, ours):
            at, shown = leading_length(ours, theirs), sample if len(sample) <= 80 else sample[:77] + "..."
            raise ConversionMismatch(
                f"{name}: splits {shown!r} differently from {whose}: at token {at + 1} it has "
                f"{ours[at : at + 5].tolist()}, {whose} {theirs[at : at + 5].tolist()}. Please report this text."
            )
