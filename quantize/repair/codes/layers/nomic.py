"""nomic-bert: one product for queries, keys and values, RoPE, SwiGLU, norms after each part.

Source: llama.cpp, models/bert.cpp and nomic-bert.cpp
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
    layer_norm,
    rotated,
    silu_times,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows


def _layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon, base, n_embd = shape.value("attention.layer_norm_epsilon"), shape.value("rope.freq_base"), states.shape[1]
    (fused,) = yield ("attn_qkv",), states
    query, key, value = (heads(fused[:, i * n_embd : (i + 1) * n_embd], shape.n_head) for i in range(3))
    query, key = rotated(query, texts, base), rotated(key, texts, base)
    (mixed,) = yield ("attn_output",), attention(query, key, value, texts, shape.header.is_causal)
    states = layer_norm(states + mixed, weights, "attn_output_norm", epsilon)
    gate, up = yield ("ffn_gate", "ffn_up"), states
    gate = by_rows(silu_times, gate, up)
    del up
    (down,) = yield ("ffn_down",), gate
    yield (), layer_norm(states + down, weights, "layer_output_norm", epsilon)


LAYERS = {
    "nomic-bert": LayerKind(
        _layer,
        {
            "value": (("attn_qkv.weight",), ("attn_output.weight",)),
            "ffn": (("ffn_up.weight",), ("ffn_down.weight",)),
        },
    )
}
