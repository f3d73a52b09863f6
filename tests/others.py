"""Files as other tools make them: written by gguf-py, without a key of f2gguf's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.gguf.vocabulary import byte_letters
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

Values = dict[str, Any]
BYTES = byte_letters()


def write_other(
    path: Path, source: Path, *, without: tuple[str, ...] = (), is_whole: bool = True, **changes: Any
) -> Path:
    """The file at `source` as another tool would write it; dots in the keys of `changes` are written as __.

    One that is not whole has no tensors.
    """
    values, tensors = _read(source)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return write_file(
        path, {key: v for key, v in {**values, **changes}.items() if key not in without}, tensors if is_whole else {}
    )


def edit_tensor(path: Path, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Let `edit` change the values of a tensor in place; those of a quantised one are bytes."""
    info = next(info for info in read_header(path).tensors if info.name == name)
    dtype = {"F32": np.float32, "F16": np.float16}.get(info.type)
    shape = info.shape if dtype else (info.size_bytes,)
    values = np.memmap(path, dtype or np.uint8, "r+", info.begin, shape)
    edit(values)
    values.flush()


def keys_of(source: Path) -> list[str]:
    """The keys of a file as another tool would write it."""
    return list(_read(source)[0])


def write_file(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Path:
    """A .gguf file by gguf-py's writer. A value may be a pair of it and its GGUF type."""
    writer = GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, tuple):
            writer.add_key_value(key, *value)
        else:
            writer.add_key_value(key, value, _TYPES[type(value)])
    rows = np.zeros((len(values.get("tokenizer.ggml.tokens", [])), 32), dtype=np.float16)
    plain = {"token_embd.weight": rows, "blk.0.attn_norm.weight": np.zeros(32, dtype=np.float32)}
    for name, tensor in (plain if tensors is None else tensors).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def header_of(architecture: str, tokenizer: str, tokens: list[str], **changes: Any) -> Values:
    """The values of a plausible file; dots in the keys of `changes` are written as __, and ... leaves a key out."""
    values = {
        "general.architecture": architecture,
        "general.type": "model",
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": 32,
        "tokenizer.ggml.model": tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token[0] in "<[" else 1 for token in tokens],
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not ...}


_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


@functools.cache
def _read(source: Path) -> tuple[Values, dict[str, tuple[np.ndarray, GGMLQuantizationType]]]:
    reader = GGUFReader(source)
    values: Values = {}
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "f2gguf.")):
            continue
        value = field.contents()
        values[key] = value if isinstance(value, list) else (value, field.types[0])
    values["general.architecture"] = values["general.architecture"][0]
    return values, {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
