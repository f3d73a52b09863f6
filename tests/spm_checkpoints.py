"""Random checkpoints of the families whose tokenizers are SentencePiece's BPE, saved by transformers."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import NANO, edit_json
from safetensors.numpy import save_file

as_spm = runpy.run_path(str(Path(__file__).resolve().parent.parent / "scripts" / "fuzz-tokenizers"))["as_spm"]
MODULE = "sentence_transformers.models."
# The shape class of EmbeddingGemma: one KV head, heads wider than width / heads, two layers that see the whole text
GEMMA = {
    "vocab_size": 0,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}
MISTRAL = {
    "vocab_size": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 256,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    "tie_word_embeddings": False,
}


def write_embedding_gemma(folder: Path, **changes: Any) -> Path:
    """A small EmbeddingGemma: attention both ways, mean pooling, two Dense modules, Normalize."""
    folder = write_gemma(folder, use_bidirectional_attention=True, pooling="mean", **changes)
    rng = np.random.default_rng(5)
    for i, (n_in, n_out) in enumerate(((48, 80), (80, 48)), start=2):
        place = folder / f"{i}_Dense"
        place.mkdir()
        stated = {"in_features": n_in, "out_features": n_out, "bias": False}
        stated["activation_function"] = "torch.nn.modules.linear.Identity"
        (place / "config.json").write_text(json.dumps(stated))
        weight = rng.standard_normal((n_out, n_in), dtype=np.float32) * 0.2
        save_file({"linear.weight": weight}, place / "model.safetensors", metadata={"format": "pt"})
    write_modules(
        folder, Transformer="", Pooling="1_Pooling", Dense="2_Dense", Dense3="3_Dense", Normalize="4_Normalize"
    )
    return folder


def write_gemma(folder: Path, *, pooling: str = "lasttoken", n_merges: int = 2000, **changes: Any) -> Path:
    """A small causal Gemma 3, whose vector is the last token's."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    write_texts_side(folder, as_spm(before="<bos>", behind="<eos>", n_merges=n_merges), pooling)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer", bos_token="<bos>", eos_token="<eos>")
    return _save(folder, Gemma3TextModel, Gemma3TextConfig, GEMMA | changes)


def write_mistral(folder: Path, *, n_merges: int = 2000, **changes: Any) -> Path:
    """A small Mistral as E5-mistral: texts begin with <s>, and </s> must be stated."""
    from transformers import MistralConfig, MistralModel

    write_texts_side(folder, as_spm(behind=None, n_merges=n_merges), "lasttoken")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    return _save(folder, MistralModel, MistralConfig, MISTRAL | changes)


def write_llama(folder: Path, *, n_merges: int = 2000, **changes: Any) -> Path:
    """A small Llama whose tokenizer class puts a blank before texts."""
    from transformers import LlamaConfig, LlamaModel

    write_texts_side(folder, as_spm(n_merges=n_merges), "lasttoken")
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    stated = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    return _save(folder, LlamaModel, LlamaConfig, stated | changes)


def write_texts_side(folder: Path, tokenizer: Any, pooling: str) -> None:
    """f2llm-nano's files without model and prompts, its tokenizer changed."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer(folder)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=512)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 48, "pooling_mode": pooling}))


def write_modules(folder: Path, **paths: str) -> None:
    kinds = [(kind.rstrip("0123456789"), path) for kind, path in paths.items()]
    rows = [{"idx": i, "name": str(i), "path": path, "type": MODULE + kind} for i, (kind, path) in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(rows))


def _save(folder: Path, model_class: Any, config_class: Any, stated: dict[str, Any]) -> Path:
    """Random weights, so large that every part of a layer shows, and norms that are spread."""
    import torch

    n_vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "config.json").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**{**stated, "vocab_size": n_vocab, "pad_token_id": 3}))
        for name, weight in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            weight.data = torch.randn(weight.shape) * (0.4 if is_norm else 1.5 / weight.shape[-1] ** 0.5)
            weight.data += float(is_norm and "Gemma" not in model_class.__name__)
        model.save_pretrained(folder)
    return folder
