"""Small checkpoints for tests: a tiny random one of each architecture, and ways to damage a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.fetch import fetch
from f2gguf.quantize.lock import read_lock
from safetensors.numpy import load_file, save_file

NANO = fetch(read_lock().entry("f2llm-nano"))
MINILM = fetch(read_lock().entry("all-MiniLM-L6-v2"))
TINY_CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}


def write_tiny(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3 checkpoint of 0.5M random float32 weights with f2llm-nano's tokenizer and modules."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    edit_json(folder / "config.json", **TINY_CONFIG)
    save_tensors(folder, tiny_tensors(seed))
    return folder


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"embed_tokens.weight": (16384, 32), "norm.weight": (32,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (32,),
                "self_attn.q_proj": (32, 32),
                "self_attn.q_norm": (8,),
                "self_attn.k_proj": (16, 32),
                "self_attn.k_norm": (8,),
                "self_attn.v_proj": (16, 32),
                "self_attn.o_proj": (32, 32),
                "post_attention_layernorm": (32,),
                "mlp.gate_proj": (64, 32),
                "mlp.up_proj": (64, 32),
                "mlp.down_proj": (32, 64),
            }.items()
        }
    return {
        name: rng.standard_normal(shape, dtype=np.float32) * 0.1 + (len(shape) == 1) for name, shape in shapes.items()
    }


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of ... removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Set tensors of model.safetensors (dots written as __); a value of ... removes the tensor."""
    tensors = load_file(folder / "model.safetensors") | {key.replace("__", "."): v for key, v in changes.items()}
    save_tensors(folder, {name: tensor for name, tensor in tensors.items() if tensor is not ...})


def save_tensors(folder: Path, tensors: dict[str, np.ndarray], *, n_shards: int = 1) -> None:
    """Write model.safetensors, or shards with their index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::n_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::n_shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
