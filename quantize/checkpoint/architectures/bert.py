"""BERT: learned positions, token types, biases everywhere, and norms after each part."""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures.shared import (
    SIZES,
    Architecture,
    Target,
    head_dim,
    in_every_layer,
    shared_facts,
    with_bias,
)
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.transforms import take_rows


def targets(checkpoint: Checkpoint, *, n_skipped: int = 0) -> list[Target]:
    """The tensors of a BERT, without the first `n_skipped` rows of its positions."""
    n_embd, n_ff, n_vocab = (checkpoint.count(k) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    n_ctx, n_types = checkpoint.count("max_position_embeddings"), checkpoint.count("type_vocab_size")
    block = [
        *with_bias("attention.self.query", "attn_q", (n_embd, n_embd)),
        *with_bias("attention.self.key", "attn_k", (n_embd, n_embd)),
        *with_bias("attention.self.value", "attn_v", (n_embd, n_embd)),
        *with_bias("attention.output.dense", "attn_output", (n_embd, n_embd)),
        *with_bias("attention.output.LayerNorm", "attn_output_norm", (n_embd,)),
        *with_bias("intermediate.dense", "ffn_up", (n_ff, n_embd)),
        *with_bias("output.dense", "ffn_down", (n_embd, n_ff)),
        *with_bias("output.LayerNorm", "layer_output_norm", (n_embd,)),
    ]
    return [
        Target("embeddings.word_embeddings.weight", "token_embd.weight", (n_vocab, n_embd)),
        Target(
            "embeddings.position_embeddings.weight",
            "position_embd.weight",
            (n_ctx, n_embd),
            take_rows(n_skipped, n_ctx),
        ),
        Target("embeddings.token_type_embeddings.weight", "token_types.weight", (n_types, n_embd)),
        *with_bias("embeddings.LayerNorm", "token_embd_norm", (n_embd,)),
        *in_every_layer(checkpoint, "encoder.layer.", block),
    ]


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The header keys of a BERT."""
    head_dim(checkpoint)  # checked only: llama.cpp divides the width among the heads
    return {
        **shared_facts(checkpoint),
        "attention.layer_norm_epsilon": checkpoint.real("layer_norm_eps"),
        "attention.causal": False,
    }


def tokenizer_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """llama.cpp refuses a BERT that does not state its token types."""
    return {"token_type_count": checkpoint.count("type_vocab_size")}


ARCHITECTURES = {
    "bert": Architecture(
        name="bert",
        prefix="bert.",
        renames={".gamma": ".weight", ".beta": ".bias"},
        dropped=re.compile(r"embeddings\.position_ids|pooler\..*|cls\..*"),
        keys=ConfigKeys(
            carried=SIZES | {"type_vocab_size", "layer_norm_eps"},
            required={
                "hidden_act": ("gelu",),
                "position_embedding_type": ("absolute", None),
                "is_causal": (None, False),
            },
            classes=frozenset({"BertModel", "BertForMaskedLM", "BertForPreTraining"}),
        ),
        targets=targets,
        facts=facts,
        tokenizer_class="BertTokenizer",
        examples="all-MiniLM, bge v1.5, arctic-embed, multilingual-e5-small, paraphrase-multilingual-MiniLM",
        tokenizer_facts=tokenizer_facts,
    ),
}
