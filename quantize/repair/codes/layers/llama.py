"""llama and llama-embed: RMS norms before each part, RoPE of neighbouring values, SwiGLU.

Source: llama.cpp, models/llama.cpp
"""

from __future__ import annotations

from collections.abc import Mapping

from f2gguf.quantize.repair.codes.layers.arithmetic import (
    Layer,
    Shape,
    Texts,
    attention,
    by_rows,
    heads,
    rms_norm,
    rotated_pairs,
    silu_times,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows


def _layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon, base = shape.value("attention.layer_norm_rms_epsilon"), shape.value("rope.freq_base")
    normed = rms_norm(states, weights["attn_norm.weight"], epsilon)
    query, key, value = yield ("attn_q", "attn_k", "attn_v"), normed
    query, key, value = (heads(part, n) for part, n in zip((query, key, value), shape.counts, strict=True))
    query, key = (rotated_pairs(part, texts, base) for part in (query, key))
    (mixed,) = yield ("attn_output",), attention(query, key, value, texts, shape.header.is_causal)
    states = states + mixed
    normed = rms_norm(states, weights["ffn_norm.weight"], epsilon)
    gate, up = yield ("ffn_gate", "ffn_up"), normed
    gate = by_rows(silu_times, gate, up)
    del up
    (down,) = yield ("ffn_down",), gate
    yield (), states + down


_KIND = LayerKind(
    run=_layer,
    places={
        "attn_norm": (("attn_norm.weight",), ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
        "value": (("attn_v.weight",), ("attn_output.weight",)),
        "ffn_norm": (("ffn_norm.weight",), ("ffn_gate.weight", "ffn_up.weight")),
        "ffn": (("ffn_up.weight",), ("ffn_down.weight",)),
    },
)
LAYERS = {"llama": _KIND, "llama-embed": _KIND}
