"""bert: norms after each part, biases, GELU. Source: llama.cpp, models/bert.cpp"""

from __future__ import annotations

from collections.abc import Mapping

from f2gguf.quantize.repair.codes.layers.arithmetic import (
    Layer,
    Shape,
    Texts,
    attention,
    by_rows,
    gelu,
    heads,
    layer_norm,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows


def _layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon = shape.value("attention.layer_norm_epsilon")
    parts = yield ("attn_q", "attn_k", "attn_v"), states
    query, key, value = (heads(part, shape.n_head) for part in parts)
    (mixed,) = yield ("attn_output",), attention(query, key, value, texts, shape.header.is_causal)
    states = layer_norm(states + mixed, weights, "attn_output_norm", epsilon)
    (up,) = yield ("ffn_up",), states
    up = by_rows(gelu, up)
    (down,) = yield ("ffn_down",), up
    yield (), layer_norm(states + down, weights, "layer_output_norm", epsilon)


LAYERS = {"bert": LayerKind(run=_layer, places={"value": (("attn_v.weight", "attn_v.bias"), ("attn_output.weight",))})}
