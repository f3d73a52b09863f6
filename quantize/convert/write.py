"""A checkpoint becomes a 16-bit (or 32-bit) .gguf file, streamed chunk by chunk, without torch."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.folder import StoredTensor
from f2gguf.quantize.convert.probes import add_golden
from f2gguf.quantize.convert.reserved import SOURCE_SHA256, fill_in
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import BrokenCheckpoint, UnknownName, UnsupportedCheckpoint
from f2gguf.runtime.files import require_free_space
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.llama.library import default_threads
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

F16_MAX = 65504.0
F16_TINY = 2.0**-25  # magnitudes up to half of the smallest subnormal round to zero
_KIND = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16}
_FILE_TYPE = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
DTYPES = tuple(_KIND)
_SIZE_BYTES = {GGMLQuantizationType.F32: 4, GGMLQuantizationType.F16: 2, GGMLQuantizationType.BF16: 2}
# llama.cpp keeps these in F32 whatever the file's type, and so does its converter
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "token_types.weight")


_N_AHEAD = 8  # chunks in memory at a time


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


def convert(
    facts: Facts, out_path: Path, *, dtype: str = "f16", on_progress: Callable[[int], None] | None = None
) -> Conversion:
    """Write the checkpoint to `out_path` as GGUF with `dtype` weights (norms, biases and positions stay F32).

    Tensors are what llama.cpp's own converter writes, bit for bit. `on_progress` is told the bytes that were written.
    Raises `BrokenCheckpoint` for tensors that are missing, surplus, misshapen or not finite, `OutputError` for a disk
    that is too small, `UnknownName` for an unknown dtype.
    """
    require_dtype(dtype)
    tensors = facts.tensors
    with ThreadPoolExecutor(default_threads()) as pool:
        hashing = pool.submit(lambda: facts.checkpoint.sha256)  # numpy and hashlib both let go of the interpreter
        losses = list(pool.map(lambda name: _scan(name, tensors[name], dtype), tensors))
        types = {loss.name: GGMLQuantizationType[loss.kept_as] for loss in losses}
        size_bytes = sum(tensor.n_elements * _SIZE_BYTES[types[name]] for name, tensor in tensors.items())
        require_free_space(out_path.parent, size_bytes, out_path.name)
        writer = GGUFWriter(out_path, facts.architecture.name)
        _add_header(writer, facts, _FILE_TYPE[dtype])
        for name, tensor in tensors.items():
            n_bytes = tensor.n_elements * _SIZE_BYTES[types[name]]
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float16), n_bytes, raw_dtype=types[name])
        _write(writer, [(tensor, types[name]) for name, tensor in tensors.items()], pool, on_progress)
        fill_in(out_path, {keys.KEY_SOURCE_SHA256: hashing.result()})
    return Conversion(len(tensors), size_bytes, tuple(loss for loss in losses if loss.n_overflow or loss.n_zeroed))


def require_dtype(dtype: str) -> None:
    """Raise `UnknownName` unless `dtype` is one that `convert` writes."""
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)


def _planned_type(name: str, tensor: StoredTensor, dtype: str) -> GGMLQuantizationType:
    if len(tensor.shape) < 2 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight"):
        return GGMLQuantizationType.F32
    return _KIND[dtype]


def _scan(name: str, tensor: StoredTensor, dtype: str) -> Loss:
    """Count what F16 cannot hold; a tensor that would overflow is kept in its own range. Refuses NaN and infinity."""
    if tensor.dtype not in _FINITE_LIMIT:
        raise UnsupportedCheckpoint(
            f"{tensor.file}: {name} has the dtype {tensor.dtype}; BF16, F16 and F32 are supported."
        )
    target = _planned_type(name, tensor, dtype)
    narrows = target == GGMLQuantizationType.F16 and tensor.dtype in _F16_RANGE
    over, tiny = _F16_RANGE.get(tensor.dtype, (np.inf, 0.0))
    n_overflow = n_zeroed = 0
    for chunk in tensor.chunks():
        magnitude = _magnitude(chunk, tensor.dtype)
        largest = magnitude.max(initial=0)
        if not largest < _FINITE_LIMIT[tensor.dtype]:
            raise BrokenCheckpoint(f"{tensor.file}: {name} holds values that are not finite; the file is damaged.")
        if narrows:
            n_overflow += int(np.count_nonzero(magnitude > over)) if largest > over else 0
            n_zeroed += int(np.count_nonzero(magnitude[magnitude <= tiny]))
    return Loss(name, n_overflow, n_zeroed, tensor.dtype if n_overflow else target.name)


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
        return bf16_to_f16
    if dtype == target.name:
        return lambda chunk: chunk
    widen = _widen if dtype == "BF16" else (lambda chunk: chunk.astype(np.float32))
    if target == GGMLQuantizationType.BF16:
        return lambda chunk: _to_bf16(widen(chunk))
    if target == GGMLQuantizationType.F16:
        return lambda chunk: chunk.astype(np.float16)
    return widen


def bf16_to_f16(bits: NDArray[np.uint16]) -> NDArray[np.float16]:
    """F16 of BF16 bit patterns of magnitude up to 65504, as the two casts by way of F32 give it, four times as fast.

    A BF16 mantissa fits an F16 one, so normal numbers only move their exponent's bias, from 127 to 15. What is below
    F16's normal range (2**-14) is looked up.
    """
    magnitude = bits & np.uint16(0x7FFF)
    moved = ((bits << np.uint16(3)) - np.uint16((127 - 15) << 10 & 0xFFFF)) & np.uint16(0x7FFF)
    moved |= bits & np.uint16(0x8000)
    small = np.flatnonzero(magnitude < np.uint16(_bf16_bits(2.0**-14)))
    moved[small] = _bf16_to_f16_table()[bits[small]]
    return moved.view(np.float16)


@functools.cache
def _bf16_to_f16_table() -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):  # in patterns that nobody looks up
        return _widen(np.arange(1 << 16, dtype=np.uint16)).astype(np.float16).view(np.uint16)


def _widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as ggml_compute_fp32_to_bf16 does (no NaN here: `_scan` refuses it)."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _write(
    writer: GGUFWriter,
    tensors: list[tuple[StoredTensor, GGMLQuantizationType]],
    pool: ThreadPoolExecutor,
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
            for data in _ahead(pool, _converter(tensor.dtype, target), tensor.chunks()):
                file.write(np.ascontiguousarray(data).data)
                if on_progress:
                    on_progress(data.nbytes)
        _pad(file, writer.data_alignment)
    finally:
        writer.close()


def _ahead(
    pool: ThreadPoolExecutor, convert_chunk: Callable[[NDArray[Any]], NDArray[Any]], chunks: Iterable[NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    """Converted chunks in order, a few of them made while the one before is written."""
    waiting: deque[Future[NDArray[Any]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(convert_chunk, chunk))
        if len(waiting) > _N_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
    for key, placeholder in SOURCE_SHA256.items():
        writer.add_string(key, placeholder)
    _add(writer, keys.KEY_MAX_TOKENS, facts.max_tokens)
    writer.add_bool(keys.KEY_NORMALIZE, facts.checkpoint.is_normalized)
    writer.add_array(keys.KEY_MATRYOSHKA_DIMS, list(facts.dims))
    for name, text in facts.prompts.items():
        writer.add_key_value(keys.KEY_PROMPT + name, text, GGUFValueType.STRING)  # add_string leaves out empty ones
    if vocabulary.normalizer:
        writer.add_string(keys.KEY_NORMALIZER, vocabulary.normalizer)
    if vocabulary.special_tokens:
        writer.add_array(keys.KEY_SPECIAL_TOKENS, vocabulary.special_tokens)
    add_golden(writer, facts)
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
        writer.add_token_type_count(facts.checkpoint.count("type_vocab_size"))


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
