"""Smaller variants of a .gguf file, by llama.cpp's own quantiser through its C structs."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from f2gguf.runtime import llama
from f2gguf.runtime.errors import OutputError, QuantizationFailed, UnknownName
from f2gguf.runtime.files import format_size, require_free_space
from f2gguf.runtime.header import read_header
from f2gguf.runtime.worker import interruptible

# name of a variant -> llama.cpp's file type
FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
# llama.cpp logs one such line a tensor; the plan of a dry run ends in the new type
_TENSOR_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+) +- \[([\d, ]+)\], type = +(\w+), size = +(.*)")
_TENSOR_STARTS = re.compile(r"\[\s*\d+/\s*\d+\] ")
_NEW_TYPE = re.compile(r"-> +[\d.]+ MiB \((\w+)\)")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\w+)\)")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor, its type before and after; `wanted` is the type whose block its rows do not fill."""

    name: str
    old_type: str
    new_type: str
    wanted: str | None = None


@dataclass(frozen=True)
class Plan:
    """What the quantiser will do, as llama.cpp itself says in a dry run."""

    variant: str
    tensors: tuple[PlannedTensor, ...]
    size_bytes: int

    def lines(self) -> list[str]:
        """The plan for people: tensors by type, and every fallback."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.new_type] = counts.get(tensor.new_type, 0) + 1
        mix = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        lines = [f"{self.variant}: {len(self.tensors)} tensors ({mix}), {format_size(self.size_bytes)}"]
        fallbacks: dict[tuple[str, str], int] = {}
        for tensor in self.tensors:
            if tensor.wanted:
                key = (tensor.wanted, tensor.new_type)
                fallbacks[key] = fallbacks.get(key, 0) + 1
        for (wanted, new_type), n in fallbacks.items():
            lines.append(f"  {n} tensors become {new_type} instead of {wanted}: their rows do not fill its blocks")
        return lines


def require_variant(name: str) -> str:
    """The variant's name as llama.cpp spells it; `UnknownName` with the nearest one otherwise."""
    exact = {variant.lower(): variant for variant in FILE_TYPES}
    if name.lower() not in exact:
        raise UnknownName("variant", name, FILE_TYPES)
    return exact[name.lower()]


def plan_variant(source: Path, variant: str) -> Plan:
    """Ask llama.cpp what it would write: nothing is."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    shapes = {tensor.name: tensor.shape for tensor in read_header(source).tensors}
    lines = _run_quantizer(source, source.with_name(source.name + ".dry"), variant, dry_run=True)
    wanted: dict[str, str] = {}
    tensors = []
    size_bytes = 0
    for line in lines:
        if fallback := _FALLBACK.search(line):
            wanted[fallback[1]] = fallback[4].upper()
        elif match := _TENSOR_LINE.search(line):
            new = _NEW_TYPE.search(match[6])
            name, old_type = match[3], match[5].upper()
            new_type = new[1].upper() if new else old_type
            tensors.append(PlannedTensor(name, old_type, new_type, wanted.get(name)))
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[new_type]]
            n_elements = 1
            for n in shapes[name]:
                n_elements *= n
            size_bytes += n_elements // block * block_bytes
    return Plan(variant, tuple(tensors), size_bytes)


def quantize_gguf(
    source: Path,
    target: Path,
    plan: Plan,
    *,
    header: Mapping[str, bool | int | float | str],
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `source` quantised as planned to `target`, with `header` values added.

    `on_progress` is told of each tensor. Raises `OutputError` before a disk that is too small, `QuantizationFailed`
    with llama.cpp's reason, or where the written types are not the planned ones.
    """
    header_bytes = source.stat().st_size - sum(tensor.size_bytes for tensor in read_header(source).tensors)
    require_free_space(target.parent, plan.size_bytes + header_bytes, target.name)
    _run_quantizer(source, target, plan.variant, header=header, on_progress=on_progress)
    written = {tensor.name: tensor.type for tensor in read_header(target).tensors}
    planned = {tensor.name: tensor.new_type for tensor in plan.tensors}
    if written != planned:
        names = sorted(name for name in planned.keys() | written.keys() if planned.get(name) != written.get(name))
        raise QuantizationFailed(
            f"{target}: llama.cpp wrote {names[0]} as {written.get(names[0])}, planned was {planned.get(names[0])}."
        )


def _run_quantizer(
    source: Path,
    target: Path,
    variant: str,
    *,
    dry_run: bool = False,
    header: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Run llama_model_quantize and give its log lines."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[variant]
    params.nthread = llama.default_threads()
    params.dry_run = dry_run
    overrides = llama.kv_overrides(header or {})
    params.kv_overrides = overrides
    fragments: list[str] = []
    errors: list[str] = []

    def listen(level: int, text: str) -> None:
        fragments.append(text)
        if level == llama.ERROR:
            errors.append(text.strip())
        if on_progress and _TENSOR_STARTS.match(text):
            on_progress(1)

    def work() -> int:
        return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))

    with llama.log_to(listen):
        status = interruptible(work)
    if status != 0:
        reason = errors[0] if errors else f"status {status}"
        if "iostream" in reason:
            raise OutputError(f"{target}: cannot be written, as on a full disk ({reason}). Free some space.")
        raise QuantizationFailed(f"{source}: llama.cpp could not make {variant}: {reason}")
    return "".join(fragments).splitlines()
