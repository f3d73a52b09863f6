"""Golden vectors for a header: texts on which files, tokenizers and devices go wrong, and what is right for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from f2gguf.quantize.convert.readback import checkpoint_ids
from f2gguf.quantize.convert.reserved import fill_in, golden_values
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.gguf import golden
from f2gguf.runtime.llama.encoder import add_prompt
from gguf import GGUFWriter

# The name of a prompt, where the model has one, and the text. Those without a prompt tell a changed prompt from a
# changed tokenizer. The last three begin as texts do whose ffn_down input passes F16's 65504 in Qwen3-Embedding-8B, so
# that some devices give NaN; the last one wants 64 tokens or more. All need their token at position 0:
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


def add_golden(writer: GGUFWriter, facts: Facts) -> None:
    """Add the probes with their token ids by the checkpoint's own tokenizer, and room for what follows."""
    prompts = [name if name in facts.prompts else "" for name, _ in PROBES]
    samples = [add_prompt(text, facts.prompts.get(name, "")) for name, text in PROBES]
    ids = checkpoint_ids(facts, samples, max_tokens=facts.max_tokens)
    writer.add_array(golden.KEY_TEXTS, [text for _, text in PROBES])
    writer.add_array(golden.KEY_PROMPTS, prompts)
    writer.add_array(golden.KEY_N_TOKENS, [len(tokens) for tokens in ids])
    writer.add_array(golden.KEY_TOKEN_IDS, np.concatenate(ids).tolist())
    for key, placeholders in golden_values(len(PROBES), facts.n_embd).items():
        writer.add_array(key, placeholders)


def stamp_golden(path: Path) -> int:
    """Make a converted file its own reference, on the CPU; gives how many probes have no finite vector in it.

    F16 weights make llama.cpp round their inputs to F16 as well, so that a text whose inputs pass 65504 has none.
    """
    with Embedder(path, device="cpu") as model:
        vectors = model.probe_vectors()
    is_finite = np.isfinite(vectors).all(axis=1)
    vectors[~is_finite] = 0
    fill_in(path, {golden.KEY_VECTORS: vectors.ravel().tolist(), golden.KEY_COSINES: is_finite.astype(float).tolist()})
    return int(np.count_nonzero(~is_finite))


def golden_stamps(model: Embedder) -> dict[str, list[float]]:
    """What to stamp into a variant: its cosines with the reference that it inherited; nothing where it has none."""
    if not golden.has_golden(model.header):
        return {}
    cosines = golden.require_golden(model.header).cosines_of(model.probe_vectors())
    return {golden.KEY_COSINES: np.nan_to_num(cosines).tolist()}
