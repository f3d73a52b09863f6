"""modern-bert: fused products, RoPE, windows in most layers, norms before each part, GEGLU or SwiGLU.

Source: llama.cpp, models/modern-bert.cpp
"""

from __future__ import annotations

from collections.abc import Mapping

from f2gguf.quantize.repair.codes.layers.arithmetic import (
    Layer,
    Shape,
    Texts,
    attention,
    by_rows,
    gelu_times,
    heads,
    layer_norm,
    rotated,
    silu_times,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows


def _layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon, n_embd = shape.value("attention.layer_norm_epsilon"), states.shape[1]
    is_full = shape.layer % shape.value("attention.sliding_window_pattern") == 0
    base = shape.value("rope.freq_base" if is_full else "rope.freq_base_swa")
    window = None if is_full else shape.value("attention.sliding_window")
    normed = layer_norm(states, weights, "attn_norm", epsilon) if "attn_norm.weight" in weights else states
    (fused,) = yield ("attn_qkv",), normed
    query, key, value = (heads(fused[:, i * n_embd : (i + 1) * n_embd], shape.n_head) for i in range(3))
    query, key = rotated(query, texts, base), rotated(key, texts, base)
    (mixed,) = yield ("attn_output",), attention(query, key, value, texts, shape.header.is_causal, window=window)
    states = states + mixed
    (both,) = yield ("ffn_up",), layer_norm(states, weights, "ffn_norm", epsilon)
    n_ff = both.shape[1] // 2
    gated = silu_times if shape.value("hidden_activation") == "silu" else gelu_times
    up = by_rows(gated, both[:, :n_ff], both[:, n_ff:])
    del both
    (down,) = yield ("ffn_down",), up
    yield (), states + down


LAYERS = {
    "modern-bert": LayerKind(
        _layer,
        {
            "attn_norm": (("attn_norm.weight",), ("attn_qkv.weight",)),
            "value": (("attn_qkv.weight",), ("attn_output.weight",)),
            "ffn_norm": (("ffn_norm.weight",), ("ffn_up.weight",)),
            "ffn": (("ffn_up.weight",), ("ffn_down.weight",)),
        },
    )
}
