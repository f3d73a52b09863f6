"""A Hugging Face checkpoint folder, read without torch. Its facts are checked; its tensors are mapped, not loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN, read_json
from f2gguf.quantize.checkpoint.modules import (
    DENSE_WEIGHTS,
    PROMPTS_FILE,
    TRANSFORMER_FILES,
    Modules,
    Prompts,
    read_limit,
    read_modules,
    read_prompts,
    warn_of_similarity,
)
from f2gguf.quantize.checkpoint.weights import (
    INDEX,
    PICKLED_FILES,
    StoredTensor,
    read_dense,
    read_tensors,
    refuse_adapter,
    refuse_quantized,
    weights_paths,
)
from f2gguf.runtime.errors import BrokenCheckpoint
from f2gguf.runtime.files import sha256_file

# The files beside the weights that decide a vector, by their folder
_OF_TRANSFORMER = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("adapter_config.json", INDEX),
    *TRANSFORMER_FILES,
)
# The files of a repository that a conversion reads: never code
NEEDED = (
    *_OF_TRANSFORMER,
    *("*.safetensors", "modules.json", PROMPTS_FILE, "*/config.json"),
    f"*_Dense/{DENSE_WEIGHTS}",
    *(f"*_Transformer/{name}" for name in ("*.safetensors", *_OF_TRANSFORMER)),
)
# The files that are read besides where a repository has no safetensors
NEEDED_PICKLED = (*PICKLED_FILES, *(f"*_Transformer/{name}" for name in PICKLED_FILES))


@dataclass(frozen=True)
class Checkpoint:
    """What a folder states of its model. A fact that it does not state is `None` or empty."""

    root: Path  # the folder that was named: sentence-transformers' files are there
    folder: Path  # where the model's and the tokenizer's own files are; nearly always `root`
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    modules: Modules
    prompts: Prompts
    max_seq_length: int | None

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def dense_paths(self) -> tuple[Path, ...]:
        """Files of the Dense modules' weights, in their order."""
        return tuple(self.root / dense.path / DENSE_WEIGHTS for dense in self.modules.dense)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """One hash of every file that the result depends on: weights, configuration, tokenizer."""
        total = hashlib.sha256()
        names = (*_OF_TRANSFORMER, *(path.name for path in weights_paths(self.folder, self.config)))
        paths = {self.folder / name for name in names} | {
            self.root / name for name in (*self.modules.files, PROMPTS_FILE)
        }
        for path in sorted(path for path in paths if path.is_file()):
            total.update(f"{path.relative_to(self.root).as_posix()} {sha256_file(path)}\n".encode())
        return total.hexdigest()

    def count(self, key: str) -> int:
        """A positive integer of config.json. Raises `BrokenCheckpoint` for anything else."""
        value = self.config.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self._bad(key, value, "a positive integer")
        return value

    def real(self, key: str, within: Mapping[str, Any] | None = None) -> float:
        """A positive finite number of config.json, or of its part `within`. Raises `BrokenCheckpoint` otherwise."""
        value: Any = (self.config if within is None else within).get(key)
        if type(value) not in (int, float) or not 0 < value < np.inf:
            raise self._bad(key, value, "a positive number")
        return float(value)

    def _bad(self, key: str, value: object, expected: str) -> BrokenCheckpoint:
        flaw = f"has no {key!r}" if value is None else f"{key} is {value!r}, which is not {expected}"
        return BrokenCheckpoint(f"{self.folder / 'config.json'}: {flaw}. {FETCH_AGAIN}")


def read_checkpoint(root: Path) -> Checkpoint:
    """Read the facts and the tensor index of a checkpoint folder.

    Raises `BrokenCheckpoint` for files that are missing, cut off or contradict each other. Raises
    `UnsupportedCheckpoint` for modules and weight formats that f2gguf does not convert.
    """
    settings = read_settings(root)
    warn_of_similarity(root, is_normalized=settings.modules.is_normalized)
    tensors = read_tensors(settings.folder, settings.config)
    for dense, path in zip(settings.modules.dense, settings.dense_paths, strict=True):
        tensors |= {f"{dense.path}.{name}": tensor for name, tensor in read_dense(path).items()}
    return replace(settings, tensors=tensors)


def read_settings(root: Path) -> Checkpoint:
    """`read_checkpoint` without tensors, for a folder whose weights may still be missing."""
    modules = read_modules(root)
    folder = root / modules.transformer
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    refuse_quantized(folder, config)
    return Checkpoint(root, folder, config, {}, modules, read_prompts(root), read_limit(folder, config))


def is_legal(name: str) -> bool:
    """Whether a file of a repository is a licence or notice, which must come along wherever the weights go."""
    return "/" not in name and name.lower().startswith(("license", "licence", "notice"))
