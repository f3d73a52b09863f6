"""The types that llama.cpp's own quantiser would give the tensors of a variant, from a dry run."""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from f2gguf.quantize.repair.tensors import size_as
from f2gguf.runtime.errors import QuantizationFailed, UnknownName
from f2gguf.runtime.files import format_size
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama import library as llama
from f2gguf.runtime.llama import llama_cpp
from f2gguf.runtime.llama.worker import interruptible

# name of a variant -> llama.cpp's file type
VARIANTS = {
    name: int(getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))
    for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS")
}
# Where rows do not fill the blocks of a K-quant, llama.cpp's fallbacks stay, although other types have faster kernels:
# none that was tried drifts as little in the same bytes (all-MiniLM-L6-v2, types by `quantize variant --recipe`).
# Q4_K_M, plain, every fourth evaluation text of all languages: Q5_0 1.39% in 21.3 MB, IQ4_NL 2.61% in 20.5 MB, IQ4_NL
# for ffn_up beside Q8_0 for attention 1.56% in 22.1 MB. Q5_K_M with importance matrix, calibration texts: Q5_1 0.36% in
# 22.0 MB, Q5_0 beside Q8_0 for attn_v 0.46% in 21.8 MB, which embeds 1.8 times as many tokens/s.
DEFAULT_VARIANTS = ("Q8_0", "Q4_K_M", "Q4_0")
# llama.cpp logs one such line a tensor: name, type, and the new type unless it stays the same
_TENSOR_LINE = re.compile(r"\[[\s\d/]+\] (\S+) +- \[[\d, ]+\], type = +(\w+), size = +(?:.*-> +[\d.]+ MiB \((\w+)\))?")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\)")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor, its type in the variant, and the type that it would get if its rows filled that type's blocks."""

    name: str
    new_type: str
    unfit_type: str | None = None


@dataclass(frozen=True)
class TypePlan:
    """The types of all tensors in a variant."""

    variant: str
    tensors: tuple[PlannedTensor, ...]
    size_bytes: int

    def lines(self) -> list[str]:
        """The plan for people: the number of tensors of each type, and every fallback."""
        counts = Counter(tensor.new_type for tensor in self.tensors)
        mix = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        fallbacks = Counter((tensor.unfit_type, tensor.new_type) for tensor in self.tensors if tensor.unfit_type)
        return [f"{self.variant}: {len(self.tensors)} tensors ({mix}), {format_size(self.size_bytes)}"] + [
            f"  {n} tensors become {new_type} instead of {unfit_type}: their rows do not fill its blocks"
            for (unfit_type, new_type), n in fallbacks.items()
        ]


def require_variant(name: str) -> str:
    """The variant's name as llama.cpp spells it; `UnknownName` with the nearest one otherwise."""
    exact = {variant.lower(): variant for variant in VARIANTS}
    if name.lower() not in exact:
        raise UnknownName("variant", name, VARIANTS)
    return exact[name.lower()]


def plan_variant(source: Path, variant: str) -> TypePlan:
    """llama.cpp's own types for `variant`; no file is written. Raises `QuantizationFailed` if llama.cpp refuses."""
    unfit: dict[str, str] = {}
    tensors = []
    for line in _dry_run(source, variant):
        if fallback := _FALLBACK.search(line):
            unfit[fallback[1]] = fallback[2].upper()
        elif match := _TENSOR_LINE.search(line):
            name, old_type, new_type = match.groups()
            tensors.append(PlannedTensor(name, (new_type or old_type).upper(), unfit.get(name)))
    infos = {info.name: info for info in read_header(source).tensors}
    size_bytes = sum(size_as(infos[tensor.name], tensor.new_type) for tensor in tensors)
    return TypePlan(variant, tuple(tensors), size_bytes)


def _dry_run(source: Path, variant: str) -> list[str]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run = VARIANTS[variant], True
    logged: list[tuple[int, str]] = []

    def work() -> int:
        target = source.with_name(source.name + ".dry")
        return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))

    with llama.log_to(lambda level, text: logged.append((level, text))):
        status = interruptible(work)
    if status != 0:
        reason = next((text.strip() for level, text in logged if level == llama.ERROR), f"status {status}")
        raise QuantizationFailed(f"{source}: llama.cpp could not make {variant}: {reason}")
    return "".join(text for _, text in logged).splitlines()
