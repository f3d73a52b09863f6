"""llama, qwen2 and qwen3: RMS norms before each part, RoPE, SwiGLU.

qwen3 has norms of queries and keys, and llama's RoPE turns neighbouring values. Source: llama.cpp, models/llama.cpp,
qwen2.cpp and qwen3.cpp
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from f2gguf.quantize.repair.codes.layers.arithmetic import (
    Layer,
    Shape,
    Texts,
    attention,
    by_rows,
    heads,
    rms_norm,
    rotated,
    rotated_pairs,
    silu_times,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind, Sides
from f2gguf.quantize.repair.tensors import Rows


def _layer(
    weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape, *, turned: Callable[..., Rows] = rotated
) -> Layer:
    epsilon, base = shape.value("attention.layer_norm_rms_epsilon"), shape.value("rope.freq_base")
    normed = rms_norm(states, weights["attn_norm.weight"], epsilon)
    query, key, value = yield ("attn_q", "attn_k", "attn_v"), normed
    query, key, value = (heads(part, n) for part, n in zip((query, key, value), shape.counts, strict=True))
    if "attn_q_norm.weight" in weights:
        query = rms_norm(query, weights["attn_q_norm.weight"], epsilon)
        key = rms_norm(key, weights["attn_k_norm.weight"], epsilon)
    query, key = turned(query, texts, base), turned(key, texts, base)
    (mixed,) = yield ("attn_output",), attention(query, key, value, texts, shape.header.is_causal)
    states = states + mixed
    normed = rms_norm(states, weights["ffn_norm.weight"], epsilon)
    gate, up = yield ("ffn_gate", "ffn_up"), normed
    gate = by_rows(silu_times, gate, up)
    del up
    (down,) = yield ("ffn_down",), gate
    yield (), states + down


_PLACES: dict[str, Sides] = {
    "attn_norm": (("attn_norm.weight",), ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
    "value": (("attn_v.weight",), ("attn_output.weight",)),
    "ffn_norm": (("ffn_norm.weight",), ("ffn_gate.weight", "ffn_up.weight")),
    "ffn": (("ffn_up.weight",), ("ffn_down.weight",)),
}
_LLAMA = LayerKind(partial(_layer, turned=rotated_pairs), _PLACES)
LAYERS = {
    "llama": _LLAMA,
    "llama-embed": _LLAMA,
    "qwen3": LayerKind(_layer, _PLACES),
    "qwen2": LayerKind(_layer, {**_PLACES, "value": (("attn_v.weight", "attn_v.bias"), ("attn_output.weight",))}),
}
