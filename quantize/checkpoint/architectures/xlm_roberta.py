"""RoBERTa and XLM-RoBERTa: a BERT that counts positions from the one behind its padding token's."""

from __future__ import annotations

import re
from typing import Any

from f2gguf.quantize.checkpoint.architectures import bert
from f2gguf.quantize.checkpoint.architectures.shared import SIZES, Architecture, Target
from f2gguf.quantize.checkpoint.config_keys import ConfigKeys
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.runtime.errors import BrokenCheckpoint


def _targets(checkpoint: Checkpoint) -> list[Target]:
    return bert.targets(checkpoint, n_skipped=_n_skipped(checkpoint))


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    n_positions = checkpoint.count("max_position_embeddings")
    return {**bert.facts(checkpoint), "context_length": n_positions - _n_skipped(checkpoint)}


def _n_skipped(checkpoint: Checkpoint) -> int:
    """Rows of the position table that no token has: 514 positions are for texts of 512 tokens."""
    pad, n_positions = checkpoint.config.get("pad_token_id", 1), checkpoint.count("max_position_embeddings")
    if type(pad) is not int or not 0 <= pad < n_positions - 2:
        flaw = f"pad_token_id is {pad!r}, behind which the {n_positions} positions begin"
        raise BrokenCheckpoint(f"{checkpoint.folder / 'config.json'}: {flaw}. Fetch the model again.")
    return pad + 1


def _architecture(*, classes: str, tokenizer_class: str, examples: str) -> Architecture:
    return Architecture(
        name="bert",
        prefix="roberta.",
        renames={},
        dropped=re.compile(r"embeddings\.position_ids|pooler\..*|lm_head\..*"),
        keys=ConfigKeys(
            carried=SIZES | {"type_vocab_size", "layer_norm_eps", "pad_token_id"},
            required={
                "hidden_act": ("gelu",),
                "position_embedding_type": ("absolute", None),
                "is_causal": (None, False),
            },
            classes=frozenset({f"{classes}Model", f"{classes}ForMaskedLM"}),
        ),
        targets=_targets,
        facts=_facts,
        tokenizer_class=tokenizer_class,
        examples=examples,
        pre_names={"gpt-2": "roberta-bpe"},
        tokenizer_facts=bert.tokenizer_facts,
    )


ARCHITECTURES = {
    "xlm-roberta": _architecture(
        classes="XLMRoberta",
        tokenizer_class="XLMRobertaTokenizer",
        examples="bge-m3, multilingual-e5-base and -large, arctic-embed-l-v2.0",
    ),
    "roberta": _architecture(
        classes="Roberta",
        tokenizer_class="RobertaTokenizer",
        examples="all-distilroberta-v1, all-roberta-large-v1",
    ),
}
