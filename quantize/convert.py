"""A checkpoint becomes a 16-bit (or 32-bit) .gguf file, streamed chunk by chunk, without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from f2gguf.quantize.architectures import match_tensors
from f2gguf.quantize.checkpoint import StoredTensor
from f2gguf.quantize.facts import Facts
from f2gguf.runtime import header as keys
from f2gguf.runtime.errors import BrokenCheckpoint, UnknownName, UnsupportedCheckpoint
from f2gguf.runtime.files import require_free_space

F16_MAX = 65504.0
F16_TINY = 2.0**-25  # magnitudes up to half of the smallest subnormal round to zero
_KIND = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16}
_FILE_TYPE = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
DTYPES = tuple(_KIND)
_SIZE_BYTES = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2, GGMLQuantizationType.BF16: 2}
# llama.cpp keeps these in F32 whatever the file's type, and so does its converter
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "token_types.weight")


@dataclass(frozen=True)
class Loss:
    """What a tensor would lose in F16: values beyond 65504, and non-zero values that become zero."""

    name: str
    n_overflow: int
    n_zeroed: int
    kept_as: str  # the type that was written


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    n_tensors: int
    size_bytes: int
    losses: tuple[Loss, ...]


def convert(facts: Facts, out_path: Path, *, dtype: str = "f16", on_progress: Callable[[int], None] | None = None) -> Conversion:
    """Write the checkpoint to `out_path` as GGUF with `dtype` weights (norms, biases and positions stay F32).

    Tensors are what llama.cpp's own converter writes, bit for bit. `on_progress` is told the bytes that were written.
    Raises `BrokenCheckpoint` for tensors that are missing, surplus, misshapen or not finite, `OutputError` for a disk
    that is too small, `UnknownName` for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    matched = match_tensors(facts.checkpoint, facts.architecture)
    planned = {name: _planned_type(name, tensor, dtype) for name, (_, tensor) in matched.items()}
    losses = []
    for name, (_, tensor) in matched.items():
        loss = _scan(name, tensor, planned[name])
        planned[name] = GGMLQuantizationType[loss.kept_as]
        if loss.n_overflow or loss.n_zeroed:
            losses.append(loss)
    size_bytes = sum(tensor.n_elements * _SIZE_BYTES[planned[name]] for name, (_, tensor) in matched.items())
    require_free_space(out_path.parent, size_bytes, out_path.name)
    writer = GGUFWriter(out_path, facts.architecture.name)
    _add_header(writer, facts, _FILE_TYPE[dtype])
    for name, (_, tensor) in matched.items():
        n_bytes = tensor.n_elements * _SIZE_BYTES[planned[name]]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float16), n_bytes, raw_dtype=planned[name])
    _write(writer, [(tensor, planned[name]) for name, (_, tensor) in matched.items()], on_progress)
    return Conversion(len(matched), size_bytes, tuple(losses))


def _planned_type(name: str, tensor: StoredTensor, dtype: str) -> GGMLQuantizationType:
    if len(tensor.shape) < 2 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight"):
        return GGMLQuantizationType.F32
    return _KIND[dtype]


def _scan(name: str, tensor: StoredTensor, planned: GGMLQuantizationType) -> Loss:
    """Count what F16 cannot hold; a tensor that would overflow is kept in its own range. Refuses NaN and infinity."""
    if tensor.dtype not in _FINITE_LIMIT:
        raise UnsupportedCheckpoint(f"{tensor.file}: {name} has the dtype {tensor.dtype}; BF16, F16 and F32 are supported.")
    n_overflow = n_zeroed = 0
    for chunk in tensor.chunks():
        magnitude = _magnitude(chunk, tensor.dtype)
        if not magnitude.max(initial=0) < _FINITE_LIMIT[tensor.dtype]:
            raise BrokenCheckpoint(f"{tensor.file}: {name} holds values that are not finite; the file is damaged.")
        if planned == GGMLQuantizationType.F16 and tensor.dtype != "F16":
            over, tiny = _F16_RANGE[tensor.dtype]
            n_overflow += int(np.count_nonzero(magnitude > over))
            n_zeroed += int(np.count_nonzero(magnitude <= tiny) - np.count_nonzero(magnitude == 0))
    if n_overflow:
        planned = GGMLQuantizationType[tensor.dtype]
    return Loss(name, n_overflow, n_zeroed, planned.name)


def _magnitude(chunk: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Absolute values; those of BF16 stay bit patterns, which sort as the numbers do."""
    return chunk & np.uint16(0x7FFF) if dtype == "BF16" else np.abs(chunk)


def _bf16_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32) >> 16)


_FINITE_LIMIT: dict[str, Any] = {"F32": np.inf, "F16": np.inf, "BF16": _bf16_bits(np.inf)}
_F16_RANGE: dict[str, tuple[float, float]] = {
    "F32": (65519.996, F16_TINY),  # up to half a step over F16_MAX still rounds down to it
    "BF16": (_bf16_bits(F16_MAX), _bf16_bits(F16_TINY)),
}


def _converter(dtype: str, target: GGMLQuantizationType) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The function from a chunk of stored values to the bytes of the GGUF tensor."""
    if dtype == "BF16" and target == GGMLQuantizationType.F16:
        table = _widen(np.arange(1 << 16, dtype=np.uint16)).astype(np.float16)  # all there are: 128 kB, in cache
        return lambda chunk: table[chunk]
    if dtype == target.name:
        return lambda chunk: chunk
    widen = _widen if dtype == "BF16" else (lambda chunk: chunk.astype(np.float32))
    if target == GGMLQuantizationType.BF16:
        return lambda chunk: _to_bf16(widen(chunk))
    if target == GGMLQuantizationType.F16:
        return lambda chunk: chunk.astype(np.float16)
    return widen


def _widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as ggml_compute_fp32_to_bf16 does (no NaN here: `_scan` refuses it)."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _write(
    writer: GGUFWriter,
    tensors: list[tuple[StoredTensor, GGMLQuantizationType]],
    on_progress: Callable[[int], None] | None,
) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        for tensor, target in tensors:
            _pad(file, writer.data_alignment)
            convert_chunk = _converter(tensor.dtype, target)
            for chunk in tensor.chunks():
                data = convert_chunk(chunk)
                file.write(memoryview(np.ascontiguousarray(data)).cast("B"))
                if on_progress:
                    on_progress(data.nbytes)
        _pad(file, writer.data_alignment)
    finally:
        writer.close()


def _pad(file: Any, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _add_header(writer: GGUFWriter, facts: Facts, file_type: LlamaFileType) -> None:
    entry, vocabulary = facts.entry, facts.vocabulary
    architecture = facts.architecture.name
    writer.add_type("model")
    writer.add_name(facts.name)
    writer.add_size_label(_size_label(facts.checkpoint.n_parameters))
    if entry.license:
        writer.add_license(entry.license)
    if entry.languages:
        writer.add_languages(list(entry.languages))
    writer.add_tags(["sentence-transformers", "feature-extraction", "sentence-similarity"])
    if entry.repo:
        organization, name = entry.repo.split("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{entry.repo}")
        if entry.revision:
            writer.add_base_model_version(0, entry.revision)
            writer.add_string(keys.KEY_REVISION, entry.revision)
    for key, value in facts.architecture.facts(facts.checkpoint).items():
        _add(writer, f"{architecture}.{key}", value)
    _add(writer, f"{architecture}.pooling_type", keys.POOLING_IDS[facts.pooling])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_string(keys.KEY_VERSION, version("f2gguf"))
    writer.add_string(keys.KEY_SOURCE_SHA256, facts.checkpoint.sha256)
    _add(writer, keys.KEY_MAX_TOKENS, facts.max_tokens)
    writer.add_bool(keys.KEY_NORMALIZE, facts.checkpoint.is_normalized)
    writer.add_array(keys.KEY_MATRYOSHKA_DIMS, list(facts.dims))
    for name, text in facts.prompts.items():
        writer.add_string(keys.KEY_PROMPT + name, text)
    if vocabulary.normalizer:
        writer.add_string(keys.KEY_NORMALIZER, vocabulary.normalizer)
    if vocabulary.special_tokens:
        writer.add_array(keys.KEY_SPECIAL_TOKENS, vocabulary.special_tokens)
    _add_vocabulary(writer, facts)


def _add_vocabulary(writer: GGUFWriter, facts: Facts) -> None:
    vocabulary = facts.vocabulary
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.special_ids.items():
        _add(writer, f"tokenizer.ggml.{name}_token_id", token_id)
    for name, flag in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    if facts.architecture.name == "bert":
        writer.add_token_type_count(int(facts.checkpoint.number("type_vocab_size")))


def _add(writer: GGUFWriter, key: str, value: bool | int | float) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _size_label(n_parameters: int) -> str:
    """7_341_312 -> '7.3M', 4_022_468_096 -> '4.0B'."""
    scale, letter = (1e9, "B") if n_parameters >= 1e9 else (1e6, "M")
    return f"{n_parameters / scale:.1f}{letter}" if n_parameters < 10 * scale else f"{n_parameters / scale:.0f}{letter}"
