"""Small checkpoints for tests: a tiny random one of each architecture, and ways to damage a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.modules import Modules, Prompts
from f2gguf.quantize.source.fetch import fetch
from f2gguf.quantize.source.lock import read_lock
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
    "layer_types": ["full_attention"] * 2,
}


def write_tiny(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen3 checkpoint of 0.5M random float32 weights with f2llm-nano's tokenizer and modules."""
    shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    edit_json(folder / "config.json", **TINY_CONFIG)
    save_tensors(folder, tiny_tensors(seed))
    return folder


def write_tiny_bert(folder: Path, **sizes: int) -> Path:
    """A BERT checkpoint of 1M random float32 weights with all-MiniLM-L6-v2's tokenizer and modules.

    `sizes` are keys of config.json.
    """
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    edit_json(folder / "config.json", **tiny | sizes)
    return fill(folder)


def fill(folder: Path, *, seed: int = 0) -> Path:
    """Write random weights of the shapes that config.json implies."""
    config = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint(folder, folder, config, {}, Modules(), Prompts(), None)
    targets = ARCHITECTURES[config["model_type"]].targets(checkpoint)
    save_tensors(folder, _random({target.stored: target.shape for target in targets}, seed))
    return folder


def tiny_tensors(seed: int = 0, *, head_dim: int = 8) -> dict[str, np.ndarray]:
    shapes = {"embed_tokens.weight": (16384, 32), "norm.weight": (32,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (32,),
                "self_attn.q_proj": (4 * head_dim, 32),
                "self_attn.q_norm": (head_dim,),
                "self_attn.k_proj": (2 * head_dim, 32),
                "self_attn.k_norm": (head_dim,),
                "self_attn.v_proj": (2 * head_dim, 32),
                "self_attn.o_proj": (32, 4 * head_dim),
                "post_attention_layernorm": (32,),
                "mlp.gate_proj": (64, 32),
                "mlp.up_proj": (64, 32),
                "mlp.down_proj": (32, 64),
            }.items()
        }
    return _random(shapes, seed)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Small values, and those of norms around 1."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, dtype=np.float32) * 0.1 + (len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
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
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::n_shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::n_shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


OUTLIER_KINDS = ("norm", "ffn", "value", "residual")


def write_outliers(folder: Path, *kinds: str, factor: int, seed: int, n_channels: int = 4) -> Path:
    """f2llm-nano with `n_channels` outlier channels of each kind in every layer, powers of two up to `factor`.

    'norm', 'ffn' and 'value' outliers leave the function as it is: what one tensor gains, its readers lose. 'residual'
    ones are in the residual stream itself, which no scale reaches; they make another model.
    """
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    shutil.copytree(NANO, folder)
    tensors = {name: tensor.float() for name, tensor in load_torch(folder / "model.safetensors").items()}
    rng = np.random.default_rng(seed)

    def channels(width: int) -> list[tuple[int, float]]:
        chosen = rng.choice(width, n_channels, replace=False)
        return [(int(j), 2.0 ** int(rng.integers(4, int(np.log2(factor)) + 1))) for j in chosen]

    for layer in (f"layers.{i}." for i in range(4)):
        if "norm" in kinds:
            for norm, readers in _NORM_READERS.items():
                for j, by in channels(256):
                    tensors[f"{layer}{norm}.weight"][j] *= by
                    for reader in readers:
                        tensors[f"{layer}{reader}.weight"][:, j] /= by
        if "ffn" in kinds:
            for j, by in channels(768):
                tensors[f"{layer}mlp.up_proj.weight"][j] *= by
                tensors[f"{layer}mlp.down_proj.weight"][:, j] /= by
        if "value" in kinds:  # 4 heads of 64 share 2 KV heads
            for j, by in channels(128):
                tensors[f"{layer}self_attn.v_proj.weight"][j] *= by
                for head in (2 * (j // 64), 2 * (j // 64) + 1):
                    tensors[f"{layer}self_attn.o_proj.weight"][:, 64 * head + j % 64] /= by
    if "residual" in kinds:
        for j, by in channels(256):
            tensors["embed_tokens.weight"][:, j] *= by
            tensors["norm.weight"][j] /= by
            for layer in (f"layers.{i}." for i in range(4)):
                for writer in ("self_attn.o_proj", "mlp.down_proj"):
                    tensors[f"{layer}{writer}.weight"][j] *= by
                for norm in _NORM_READERS:
                    tensors[f"{layer}{norm}.weight"][j] /= by
    save_torch({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


_NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
