"""Which types llama.cpp's own quantiser would give the tensors of a variant: it is asked, and writes nothing."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
from f2gguf.quantize.repair.tensors import size_as
from f2gguf.runtime.errors import QuantizationFailed, UnknownName
from f2gguf.runtime.files import format_size
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama import library as llama
from f2gguf.runtime.llama.worker import interruptible

# name of a variant -> llama.cpp's file type
VARIANTS = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
# llama.cpp logs one such line a tensor; the plan of a dry run ends in the new type
_TENSOR_LINE = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+) +- \[([\d, ]+)\], type = +(\w+), size = +(.*)")
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
class TypePlan:
    """What llama.cpp's quantiser says in a dry run."""

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
    exact = {variant.lower(): variant for variant in VARIANTS}
    if name.lower() not in exact:
        raise UnknownName("variant", name, VARIANTS)
    return exact[name.lower()]


def plan_variant(source: Path, variant: str) -> TypePlan:
    """Ask llama.cpp what it would write: nothing is."""
    infos = {tensor.name: tensor for tensor in read_header(source).tensors}
    lines = _dry_run(source, variant)
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
            size_bytes += size_as(infos[name], new_type)
    return TypePlan(variant, tuple(tensors), size_bytes)


def _dry_run(source: Path, variant: str) -> list[str]:
    """The log lines of a dry run of llama_model_quantize."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = VARIANTS[variant]
    params.dry_run = True
    fragments: list[str] = []
    errors: list[str] = []

    def listen(level: int, text: str) -> None:
        fragments.append(text)
        if level == llama.ERROR:
            errors.append(text.strip())

    def work() -> int:
        target = source.with_name(source.name + ".dry")
        return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))

    with llama.log_to(listen):
        status = interruptible(work)
    if status != 0:
        reason = errors[0] if errors else f"status {status}"
        raise QuantizationFailed(f"{source}: llama.cpp could not make {variant}: {reason}")
    return "".join(fragments).splitlines()
