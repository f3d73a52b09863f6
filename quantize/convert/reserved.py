"""Header values that are known only after the tensors were written: checkpoint hash, golden vectors, verdict.

A file is written with placeholders of the same type and size, so that filling in moves no other byte. Golden vectors
are those of texts that faulty files, tokenizers and devices get wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from f2gguf.evals.texts import EvalText, prompted
from f2gguf.quantize.convert.readback import checkpoint_ids
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.gguf import golden
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.entries import Value, packed, seal
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.encoder import add_prompt
from gguf import GGUFWriter

N_STEP_TEXTS = 256  # of the calibration texts
UNKNOWN_SHA256 = "0" * 64  # of a checkpoint, which is hashed while it is converted
VERDICT = {keys.KEY_MEAN_DRIFT: 0.0, keys.KEY_UPPER_DRIFT: 0.0, keys.KEY_HOLDS: False}  # until it is measured
CORPUS_DRIFT = {keys.KEY_CORPUS_MEAN: 0.0, keys.KEY_CORPUS_UPPER: 0.0}
# (name of the prompt, text). Texts without a prompt show which has changed, a prompt or the tokenizer. The last three
# texts begin with tokens whose ffn_down input is beyond F16's 65504 in Qwen3-Embedding-8B, so that some devices give
# NaN. These tokens must be at position 0, and the last text must have 64 tokens or more:
# https://github.com/ollama/ollama/issues/12921, https://github.com/ggml-org/llama.cpp/issues/29216 and 26044
PROBES = (
    ("query", "how do I keep bread fresh for a week?"),
    ("query", "Welche Bücher erklären die Französische Revolution?"),
    ("query", "量子コンピュータはどのように動作しますか"),
    ("document", "A lighthouse keeper trims the lamp at dusk, winds the clockwork, and writes the weather down."),
    ("document", "def area(r):\n\tif r < 0:\n\t\traise ValueError('negative')\n\treturn 3.14159 * r**2  # m²\n"),
    ("document", "长江是亚洲最长的河流，发源于青藏高原，最后流入东海。"),
    ("document", "القطار يصل في الثامنة. हिन्दी में क्षमा। ฝนตกหนักมาก 서울의 봄 Поезд опоздал. שלום"),
    ("document", "👩‍👩‍👧‍👦 went to 🇯🇵 and 🏳️‍🌈 👍🏽, then ☕ at ½ past 7 ≠ 8…"),
    ("document", " ".join(f"Step {i}: add {7 * i % 90} grams of flour and stir." for i in range(1, 61))),
    ("", "lighthouse"),
    ("", "  two  blanks\t\ttabs\r\n\r\n\n   and lines  \n"),
    ("", "Cafe\u0301, A\u030angstro\u0308m, \u1112\u1161\u11ab\u1100\u116e\u11a8, n\u0303and\u0169"),
    ("", "a <|im_end|> in a text, [SEP] and [CLS], </s><pad>, then <|endoftext|> and more"),
    ("", "importance of a good night's sleep"),
    ("", 'import { useReducer } from "react";'),
    ("", "importData" + " row" * 80),
)


def fill_in(path: Path, values: Mapping[str, Value | Sequence[float]]) -> None:
    """Overwrite header values, and seal the header again.

    A string must keep its number of bytes, an array of floats its number of values.
    """
    header = read_header(path)
    with path.open("rb+") as file:
        for key, value in values.items():
            data, old = packed(value), header.values[key]
            is_supported = not isinstance(old, tuple) or type(old[0]) is float
            if len(data) != len(packed(old)) or not is_supported:
                raise ValueError(f"{key}: a new value of {len(data):,} bytes does not fit its place in the header")
            file.seek(header.offsets[key])
            file.write(data)
    seal(path)


def add_golden(writer: GGUFWriter, facts: Facts) -> None:
    """Add the probes and their token ids by the checkpoint's own tokenizer; reserve room for vectors and cosines."""
    prompts = [name if name in facts.prompts else "" for name, _ in PROBES]
    samples = [add_prompt(text, facts.prompts.get(name, "")) for name, text in PROBES]
    ids = checkpoint_ids(facts, samples, max_tokens=facts.max_tokens)
    writer.add_array(golden.KEY_TEXTS, [text for _, text in PROBES])
    writer.add_array(golden.KEY_PROMPTS, prompts)
    writer.add_array(golden.KEY_N_TOKENS, [len(tokens) for tokens in ids])
    writer.add_array(golden.KEY_TOKEN_IDS, np.concatenate(ids).tolist())
    writer.add_array(golden.KEY_VECTORS, [0.0] * (len(PROBES) * facts.n_embd))
    writer.add_array(golden.KEY_COSINES, [0.0] * len(PROBES))


def add_int8_steps(writer: GGUFWriter, facts: Facts) -> None:
    """Reserve room for the step of int8 vectors, at every width."""
    for width in facts.dims:
        writer.add_float32(f"{keys.KEY_INT8_STEP}{width}", 0.0)


def stamp_int8_steps(path: Path, texts: Sequence[EvalText]) -> None:
    """Fill in a converted file's steps of int8 vectors: the greatest number in those of `texts` is 126.5 steps.

    At most N_STEP_TEXTS texts, evenly spread, behind their prompts. Variants are made with the same header, so that
    int8 vectors of all files of a model compare. A text without a finite vector does not count.

    All columns have one step, and 0 is a code. With sentence-transformers' own ranges, those of each column, the codes
    of two vectors do not compare as the vectors do: of multilingual-e5-small's ten nearest documents 64% stay, and 99%
    with one step (nano 71% and 99%, MiniLM 83% and 99%).
    """
    some = texts[:: -(-len(texts) // N_STEP_TEXTS)]
    with Embedder(path, device="cpu") as model:
        ids = [model.encoder.tokenize([prompted(text, model.prompts)]).ids[0] for text in some]
        rows = model.encoder.compute(ids)
        rows = rows[np.isfinite(rows).all(axis=1)]
        greatest = {
            width: np.abs(model.encoder.finish(rows, width=width, normalize=True)).max(initial=0)
            for width in model.header.dims
        }
    fill_in(path, {f"{keys.KEY_INT8_STEP}{width}": float(most) / 126.5 for width, most in greatest.items()})


def stamp_golden(path: Path) -> int:
    """Fill in a converted file's own vectors, made on the CPU; gives how many probes have no finite vector.

    With F16 weights llama.cpp rounds their inputs to F16 as well. A text whose inputs are beyond 65504 has no vector.
    """
    with Embedder(path, device="cpu") as model:
        vectors = model.probe_vectors()
    is_finite = np.isfinite(vectors).all(axis=1)
    vectors[~is_finite] = 0
    fill_in(path, {golden.KEY_VECTORS: vectors.ravel().tolist(), golden.KEY_COSINES: is_finite.astype(float).tolist()})
    return int(np.count_nonzero(~is_finite))


def golden_stamps(model: Embedder) -> dict[str, list[float]]:
    """The header values of a variant: the cosines of its probe vectors with those that the F16 file gave it, if any."""
    if not golden.has_golden(model.header):
        return {}
    cosines = golden.require_golden(model.header).cosines_of(model.probe_vectors())
    return {golden.KEY_COSINES: np.nan_to_num(cosines).tolist()}
