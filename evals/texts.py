"""The evaluation texts: many languages, queries and their documents, code, long texts, edge cases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress_by_size, sizes_of
from f2gguf.runtime.errors import NoVector, TruncationWarning
from f2gguf.runtime.llama.encoder import add_prompt
from numpy.typing import NDArray

PATH = Path(__file__).with_name("texts.jsonl")
KINDS = ("query", "document", "code", "long", "edge")
QUICK_STEP = 5
ANSWER_KINDS = ("document", "code", "long")  # texts that may answer a query

# Strings on which tokenizers go wrong. Every conversion tries them besides the evaluation texts.
HOSTILE = (
    "",
    " ",
    "\n",
    "a\n\n\nb \r\n c\t\td  e   f",
    "don't I'LL we'Ve 'S 'ſ",
    "中文字符 和 English 混合，。！ 𠀀𪛖",
    "ひらがなカタカナ漢字ﾊﾝｶｸ",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇯🇵",
    "e\u0301 A\u030a \u1112\u1161\u11ab n\u0303\u0303",
    "क्षत्रिय ज़िंदगी हिन्दी নদী தமிழ் ᏣᎳᎩ",
    "def f(x):\n\treturn {'a': [x**2, -1e-9]}  # ½ ≠ ²",
    "<|im_end|>",
    "a<|im_end|>\u0338b <|endoftext|><|im_start|>",
    "[CLS] [SEP] [MASK] [UNK] [PAD] [sep]",
    "<s></s><unk><pad> ▁▁ foo▁bar ##ing Ġ Ċ",
    "x" * 250,
    "\u00a0\u2003\u3000\u200b\ufeff\u00ad\u2028\u0085|",
    "\x00\x01\x7f\x80 nul",
    "\ue000\U000f0000\u0378 ﬁ Ⅷ ①",
    "0123456789 ٣٤٥ १२३ 1,000,000.50",
    "ÀÉÎÕÜ ß İI ı Σςσ ŁÓDŹ",
)


@dataclass(frozen=True)
class EvalText:
    """One text; `relevant` names the documents that answer a query."""

    id: str
    kind: str
    language: str
    text: str
    relevant: tuple[str, ...] = ()


def load_texts(path: Path = PATH) -> tuple[EvalText, ...]:
    """The texts of a .jsonl file, in its order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return tuple(EvalText(**{**row, "relevant": tuple(row.get("relevant", ()))}) for row in rows)


def claimed_texts(texts: Sequence[EvalText], languages: Sequence[str]) -> tuple[EvalText, ...]:
    """The texts that a model is judged on: those in its languages, code, and texts of no language.

    A model is not judged on languages that it never learnt. If `languages` is empty or names 'multilingual', it is
    judged on all texts. A variety counts with its language: zh-Hant with zh.
    """
    if not languages or "multilingual" in languages:
        return tuple(texts)
    known = {"und", *languages}
    return tuple(t for t in texts if t.kind == "code" or known & {t.language, t.language.split("-")[0]})


def quick_texts(texts: Sequence[EvalText]) -> tuple[EvalText, ...]:
    """About a quarter: every fifth query with the documents that answer it, and every fifth of the others by kind."""
    queries = [text for text in texts if text.kind == "query"][::QUICK_STEP]
    kept = {text.id for text in queries} | {name for text in queries for name in text.relevant}
    for kind in set(KINDS) - {"query"}:
        kept |= {
            text.id for text in [text for text in texts if text.kind == kind and text.id not in kept][::QUICK_STEP]
        }
    return tuple(text for text in texts if text.id in kept)


def texts_sha256(texts: Sequence[EvalText]) -> str:
    """A hash over every text, its id and kind, in order: two reports compare only where it is equal."""
    rows = [[text.id, text.kind, text.language, text.text, list(text.relevant)] for text in texts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def embed_texts(model: Embedder, texts: Sequence[EvalText], label: str = "") -> NDArray[np.float32]:
    """Vectors as a user gets them, (n_texts, n_embd) float32: queries with the query prompt, all else as documents.

    With a `label`, it says how far it is.
    """
    vectors = np.empty((len(texts), model.header.n_embd), dtype=np.float32)
    parts = [
        [i for i, text in enumerate(texts) if (text.kind == "query") == are_queries] for are_queries in (True, False)
    ]
    inputs = [[texts[i].text for i in rows] for rows in parts]
    sizes = [size for some in inputs for size in sizes_of(some, model.max_seq_length)]
    with (
        progress_by_size(label, sizes) if label else contextlib.nullcontext() as advance,
        warnings.catch_warnings(),
    ):
        for rows, some, encode in zip(parts, inputs, (model.encode_query, model.encode_document), strict=True):
            if any(texts[i].kind == "long" for i in rows):  # which are there to be cut
                warnings.simplefilter("ignore", TruncationWarning)
            try:
                vectors[rows] = encode(some, on_progress=advance)
            except NoVector as error:
                names = ", ".join(texts[rows[i]].id for i in error.indices[:5])
                raise NoVector(f"{error} By id: {names}.", error.indices, error.embeddings) from error
    return vectors


def embed_timed(model: Embedder, texts: Sequence[EvalText], label: str) -> tuple[NDArray[np.float32], float]:
    """What `embed_texts` gives, and how many texts were embedded in a second."""
    begin = time.perf_counter()
    vectors = embed_texts(model, texts, label)
    return vectors, len(texts) / (time.perf_counter() - begin)


def prompted(text: EvalText, prompts: dict[str, str]) -> str:
    """The text behind the prompt of its kind, as `embed_texts` embeds it."""
    return add_prompt(text.text, prompts.get("query" if text.kind == "query" else "document", ""))
