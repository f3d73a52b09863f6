"""gemma3 and gemma-embedding: norms around both parts, norms of queries and keys, windows, RoPE of two bases, GeGLU.

Sources: llama.cpp, models/gemma3.cpp and models/gemma-embedding.cpp
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
    rms_norm,
    rotated,
)
from f2gguf.quantize.repair.codes.layers.kinds import LayerKind
from f2gguf.quantize.repair.tensors import Rows

_LAYERS_OF_27B = 62  # the size whose queries are scaled by the width of the model over the number of heads


def _layer(weights: Mapping[str, Rows], states: Rows, texts: Texts, shape: Shape) -> Layer:
    epsilon = shape.value("attention.layer_norm_rms_epsilon")
    sees_all = (shape.layer + 1) % shape.value("attention.sliding_window_pattern", 6) == 0
    base = shape.value("rope.freq_base") if sees_all else shape.value("rope.freq_base_swa", 10000.0)
    window = None if sees_all else shape.value("attention.sliding_window")
    normed = rms_norm(states, weights["attn_norm.weight"], epsilon)
    query, key, value = yield ("attn_q", "attn_k", "attn_v"), normed
    query, key, value = (heads(part, n) for part, n in zip((query, key, value), shape.counts, strict=True))
    query, key = (
        rotated(rms_norm(part, weights[f"{name}_norm.weight"], epsilon), texts, base)
        for name, part in (("attn_q", query), ("attn_k", key))
    )
    if shape.n_layers == _LAYERS_OF_27B and shape.header.is_causal:
        query = query * (query.shape[-1] * shape.n_head / shape.header.n_embd) ** 0.5
    mixed = attention(query, key, value, texts, shape.header.is_causal, window=window)
    (mixed,) = yield ("attn_output",), mixed
    states = states + rms_norm(mixed, weights["post_attention_norm.weight"], epsilon)
    normed = rms_norm(states, weights["ffn_norm.weight"], epsilon)
    gate, up = yield ("ffn_gate", "ffn_up"), normed
    gate = by_rows(gelu_times, gate, up)
    del up
    (down,) = yield ("ffn_down",), gate
    yield (), states + rms_norm(down, weights["post_ffw_norm.weight"], epsilon)


_KIND = LayerKind(
    run=_layer,
    places={
        "attn_norm": (("attn_norm.weight",), ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
        "value": (("attn_v.weight",), ("attn_output.weight",)),
        "ffn_norm": (("ffn_norm.weight",), ("ffn_gate.weight", "ffn_up.weight")),
        "ffn": (("ffn_up.weight",), ("ffn_down.weight",)),
    },
    scales_tokens=True,
)
LAYERS = {"gemma3": _KIND, "gemma-embedding": _KIND}
