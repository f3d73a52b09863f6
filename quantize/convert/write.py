"""A checkpoint becomes a 16- or 32-bit .gguf file, written chunk by chunk, without torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from f2gguf.quantize.checkpoint.weights import StoredTensor, as_float32
from f2gguf.quantize.convert.reserved import UNKNOWN_SHA256, add_golden, add_int8_steps, fill_in
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import BrokenCheckpoint, UnknownName
from f2gguf.runtime.files import require_free_space
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.entries import UNSEALED, VALUE_TYPES
from f2gguf.runtime.llama.threads import default_threads
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

T = TypeVar("T")
_FILE_TYPE = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
DTYPES = tuple(_FILE_TYPE)
# llama.cpp's own converter keeps these in F32, whatever the type of the file
_ALWAYS_F32 = ("_norm.weight", "position_embd.weight", "token_types.weight")
_N_AHEAD = 8  # chunks in memory at a time


@dataclass(frozen=True)
class Loss:
    """What a tensor would lose in F16."""

    name: str
    n_overflow: int  # values beyond 65504
    n_zeroed: int  # values that are not zero and would become zero
    kept_as: str  # the type that was written


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote."""

    n_tensors: int
    size_bytes: int
    losses: tuple[Loss, ...]


def convert(
    facts: Facts, out_path: Path, *, dtype: str = "f16", on_progress: Callable[[int], None] = lambda _: None
) -> Conversion:
    """Write the checkpoint to `out_path` as GGUF with `dtype` weights. Norms, biases and positions stay F32.

    The tensors are those that llama.cpp's own converter writes, bit for bit. `on_progress` gets the number of bytes
    that were written. Raises `BrokenCheckpoint` for values that are not finite, `UnsupportedCheckpoint` for integers,
    `OutputError` if the disk is too small, `UnknownName` for an unknown dtype.
    """
    require_dtype(dtype)
    tensors, architecture = facts.tensors, facts.architecture.name
    with ThreadPoolExecutor(default_threads()) as pool, closing(GGUFWriter(out_path, architecture)) as writer:
        hashing = pool.submit(lambda: facts.checkpoint.sha256)  # numpy and hashlib both release the GIL
        losses = list(pool.map(lambda name: _scan(name, tensors[name], dtype), tensors))
        types = {loss.name: GGMLQuantizationType[loss.kept_as] for loss in losses}
        sizes = {name: tensor.n_elements * GGML_QUANT_SIZES[types[name]][1] for name, tensor in tensors.items()}
        require_free_space(out_path.parent, sum(sizes.values()), out_path.name)
        file = _write_head(writer, facts, dtype, types, sizes)
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % writer.data_alignment))
            for data in map_ahead(pool, partial(_converted, tensor.dtype, types[name].name), tensor.chunks()):
                file.write(np.ascontiguousarray(data).data)
                on_progress(data.nbytes)
        file.write(bytes(-file.tell() % writer.data_alignment))
    fill_in(out_path, {keys.KEY_SOURCE_SHA256: hashing.result()})
    lossy = tuple(loss for loss in losses if loss.n_overflow or loss.n_zeroed)
    return Conversion(len(tensors), sum(sizes.values()), lossy)


def write_skeleton(facts: Facts, path: Path) -> None:
    """Write the base file that `convert` would make, with holes where its numbers belong. It takes a few MB of disk."""
    tensors, architecture = facts.tensors, facts.architecture.name
    types = {
        name: GGMLQuantizationType[_target_type(name, tensor.shape, facts.base)] for name, tensor in tensors.items()
    }
    sizes = {name: tensor.n_elements * GGML_QUANT_SIZES[types[name]][1] for name, tensor in tensors.items()}
    with closing(GGUFWriter(path, architecture)) as writer:
        file = _write_head(writer, facts, facts.base, types, sizes)
        end, alignment = file.tell(), writer.data_alignment
        file.truncate(sum(-(-size // alignment) * alignment for size in (end, *sizes.values())))


def _write_head(
    writer: GGUFWriter,
    facts: Facts,
    dtype: str,
    types: Mapping[str, GGMLQuantizationType],
    sizes: Mapping[str, int],
) -> IO[bytes]:
    """Write everything before the tensors; gives the open file."""
    _add_header(writer, facts, _FILE_TYPE[dtype])
    for name, tensor in facts.tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float16), sizes[name], raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    return writer.fout[0]


def require_dtype(dtype: str) -> None:
    """Raise `UnknownName` unless `dtype` is one that `convert` writes."""
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)


def _scan(name: str, tensor: StoredTensor, dtype: str) -> Loss:
    """Count what F16 cannot hold. A tensor that would overflow keeps its stored type. Refuses NaN and infinity."""
    target = _target_type(name, tensor.shape, dtype)
    over, tiny = _F16_RANGE.get(tensor.dtype, (np.inf, 0.0))
    n_overflow = n_zeroed = 0
    for chunk in tensor.chunks():
        # absolute values; those of BF16 stay bit patterns, which sort as the numbers do
        magnitude = chunk & np.uint16(0x7FFF) if tensor.dtype == "BF16" else np.abs(chunk)
        largest = magnitude.max(initial=0)
        if not largest < _FINITE_LIMIT[tensor.dtype]:
            raise BrokenCheckpoint(f"{tensor.file}: {name} holds values that are not finite; the file is damaged.")
        if target == "F16" and tensor.dtype != "F16":
            n_overflow += int(np.count_nonzero(magnitude > over)) if largest > over else 0
            n_zeroed += int(np.count_nonzero(magnitude[magnitude <= tiny]))
    return Loss(name, n_overflow, n_zeroed, tensor.dtype if n_overflow else target)


def _target_type(name: str, shape: tuple[int, ...], dtype: str) -> str:
    is_f32 = len(shape) < 2 or name.endswith(_ALWAYS_F32) or not name.endswith(".weight")
    return "F32" if is_f32 else dtype.upper()


def _bf16_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32) >> 16)


_FINITE_LIMIT: dict[str, Any] = {"F32": np.inf, "F16": np.inf, "BF16": _bf16_bits(np.inf)}
# magnitudes beyond which F16 overflows (up to half a step over 65504 still rounds down to it), and up to which it
# rounds to zero (half of its smallest subnormal)
_F16_RANGE = {"F32": (65519.996, 2.0**-25), "BF16": (_bf16_bits(65504.0), _bf16_bits(2.0**-25))}


def _converted(dtype: str, target: str, chunk: NDArray[Any]) -> NDArray[Any]:
    """A chunk of stored values of `dtype` as the bytes of a GGUF tensor of the type `target`."""
    if dtype == target:
        return chunk
    if (dtype, target) == ("BF16", "F16"):
        return bf16_to_f16(chunk)
    if target == "F16":
        return chunk.astype(np.float16)
    values = as_float32(dtype, chunk)
    return _to_bf16(values) if target == "BF16" else values


def bf16_to_f16(bits: NDArray[np.uint16]) -> NDArray[np.float16]:
    """F16 of BF16 bit patterns with a magnitude up to 65504: the bits that a cast to F32 and on to F16 gives.

    This is four times as fast. A BF16 mantissa fits into an F16 one, so a normal number only changes its exponent's
    bias, from 127 to 15. A table holds the numbers below F16's normal range (2**-14).
    """
    magnitude = bits & np.uint16(0x7FFF)
    moved = ((bits << np.uint16(3)) - np.uint16((127 - 15) << 10 & 0xFFFF)) & np.uint16(0x7FFF)
    moved |= bits & np.uint16(0x8000)
    small = np.flatnonzero(magnitude < np.uint16(_bf16_bits(2.0**-14)))
    moved[small] = _bf16_to_f16_table()[bits[small]]
    return moved.view(np.float16)


@cache
def _bf16_to_f16_table() -> NDArray[np.uint16]:
    with np.errstate(over="ignore"):  # in patterns that nobody looks up
        return as_float32("BF16", np.arange(1 << 16, dtype=np.uint16)).astype(np.float16).view(np.uint16)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as ggml_compute_fp32_to_bf16 does (no NaN here: `_scan` refuses it)."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], NDArray[Any]], items: Iterable[T]
) -> Iterator[NDArray[Any]]:
    """The results in order. A few of them are computed while the caller writes the one before."""
    waiting: deque[Future[NDArray[Any]]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > _N_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
    _add_values(writer, f"{architecture}.", facts.shape)
    writer.add_uint32(f"{architecture}.pooling_type", keys.POOLING_IDS[facts.pooling])
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_string(keys.KEY_VERSION, version("f2gguf"))
    writer.add_string(keys.KEY_SOURCE_SHA256, UNKNOWN_SHA256)
    writer.add_string(keys.KEY_SEAL, UNSEALED)
    writer.add_uint32(keys.KEY_MAX_TOKENS, facts.max_tokens)
    writer.add_bool(keys.KEY_NORMALIZE, facts.checkpoint.modules.is_normalized)
    writer.add_array(keys.KEY_MATRYOSHKA_DIMS, list(facts.dims))
    for name, text in facts.prompts.items():
        writer.add_key_value(keys.KEY_PROMPT + name, text, GGUFValueType.STRING)  # add_string leaves out empty ones
    if facts.default_prompt:
        writer.add_string(keys.KEY_DEFAULT_PROMPT, facts.default_prompt)
    writer.add_string(keys.KEY_TOKENIZER, vocabulary.tokenizer)
    add_golden(writer, facts)
    add_int8_steps(writer, facts)
    _add_vocabulary(writer, facts)


def _add_vocabulary(writer: GGUFWriter, facts: Facts) -> None:
    vocabulary, family = facts.vocabulary, facts.vocabulary.family
    writer.add_tokenizer_model(family.model)
    writer.add_tokenizer_pre(family.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    if family.merges:
        writer.add_token_merges(family.merges)
    if family.scores:
        writer.add_token_scores(family.scores)
    if family.score_steps:
        sub_type = GGUFValueType.INT8 if max(map(abs, family.score_steps)) < 1 << 7 else GGUFValueType.INT32
        writer.add_key_value(keys.KEY_SCORE_STEPS, family.score_steps, GGUFValueType.ARRAY, sub_type)
    if family.charsmap:
        writer.add_precompiled_charsmap(family.charsmap)
    for name, token_id in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    for name, flag in family.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)
    _add_values(writer, "tokenizer.ggml.", facts.architecture.tokenizer_facts(facts.checkpoint))


def _add_values(writer: GGUFWriter, prefix: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        writer.add_key_value(prefix + key, value, GGUFValueType(VALUE_TYPES[type(value)][0]))


def _size_label(n_parameters: int) -> str:
    """7_341_312 -> '7.3M', 4_022_468_096 -> '4.0B'."""
    scale, letter = (1e9, "B") if n_parameters >= 1e9 else (1e6, "M")
    return f"{n_parameters / scale:.1f}{letter}" if n_parameters < 10 * scale else f"{n_parameters / scale:.0f}{letter}"
