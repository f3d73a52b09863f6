"""Which pre-tokenizers of llama.cpp recurse for every character of a text without a break."""

from __future__ import annotations

# tokenizer.ggml.pre of the byte-pair encodings that do not recurse: every pattern of theirs has its own code in
# unicode_regex_split_custom, or matches one character. Source: llama.cpp of 2026-10-01 (llama-cpp-python 0.3.36),
# src/unicode.cpp and llm_tokenizer_bpe in src/llama-vocab.cpp. Any other name, and none, counts as recursive.
_FLAT = (
    "a.x-4.0 chatglm-bpe codeshell command-r dbrx deepseek-r1-qwen exaone exaone4 f2llmv2 falcon-h1 falcon3 "
    "gemma4 gigachat glm4 glm5 gpt-2 granite-docling granite-embed-multi-311m grok-2 hunyuan jais jina-de jina-es "
    "jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano kimi-k2 kormo laguna lfm2 llama-bpe llama-v3 "
    "llama3 megrez mellum mellum2 midm-2.0 minerva-7b modern-bert mpt olmo phi-2 pixtral qwen2 qwen35 refact "
    "roberta-bpe sarvam-moe smaug-bpe smollm solar-open stablelm2 starcoder trillion"
)
FLAT = frozenset(_FLAT.split())
_MODELS = ("gpt2", "hybriddna", "whitespace", "gemma4")  # tokenizer.ggml.model of those that split by patterns


def recursive(model: str, pre: str) -> str | None:
    """The name of a pre-tokenizer ('default' for none) if it recurses, so that very long words are refused.

    `model` and `pre` are the header's tokenizer.ggml.model and tokenizer.ggml.pre.
    """
    return (pre or "default") if model in _MODELS and pre not in FLAT else None
