"""Which CPU kernels multiply which matrices: f2gguf's own, or llama.cpp's, which lay some matrices out anew.

On AMX and AVX-512, f2gguf's own kernels (own.py) take every matrix of their types as it stands in the file. Elsewhere
on x86, llama.cpp would also repack Q4_K, and so lose its tiled product, which is faster and takes K-quants as they are.
Here types are chosen instead. `scripts/kernels` measures all ways: on 2 cores with AVX-512, with layers of the 0.6B
shape, Q4_K does 3,191 tokens/s as it is and 2,277 repacked, Q4_0 1,490 and 2,110, IQ4_NL 1,419 and 2,055.

Nothing is measured at load: a llama.cpp that has AVX2 alone (ggml's -DGGML_NATIVE=OFF: no AVX-512, no VNNI) leads to
the same choice on the same processor. There, on a busy machine, `scripts/kernels --layers 1` gave
Q4_K 1,727 tokens/s as it is and 960 repacked, Q4_0 1,965 and 3,519, IQ4_NL 1,122 and 2,369.

On AMX, Q8_0 does 4,757 tokens/s where it does 1,777 as it is (`scripts/kernels --layers 2 --rounds 2`), Q4_0 5,131
where it does 3,364 repacked, and Q4_K 4,728 where it does 4,806, but a query in 4.9 ms where it takes 5.5. Q6_K stays
as it is: 3,978 tokens/s, and 3,312 on AMX.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import llama_cpp
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.kernels import amx, own
from f2gguf.runtime.llama.kernels.buffers import AMX, REPACK, allocated_bytes, extra_buffers
from f2gguf.runtime.llama.library import OWN

Placement = Mapping[str, Sequence[str]]  # OWN, or names of ggml's types of buffers -> names of the matrices there
TYPES = {  # after f2gguf's own kernels, the first that is here and takes a matrix gets it
    AMX: ("Q8_0", "Q5_K", "Q4_K", "Q4_1", "Q4_0", "IQ4_XS"),
    REPACK: ("Q4_0", "IQ4_NL", "MXFP4"),
}
_WORDS = {OWN: "on {} by f2gguf's own kernels", AMX: "on AMX", REPACK: "repacked"}
_ATTENTION = ", attention, norms and activations by f2gguf's own kernels"
_NOT_COMPILED = ", without f2gguf's own kernels, which need a C++ compiler (`f2gguf inspect` says more)"
_NO_AMX = (
    ". AMX is not used, because a trial of it failed: f2gguf's runtime/README.md says how to compile llama-cpp-python"
)
_ROWS = {OWN: 32, AMX: 32, REPACK: 8}  # that are laid out together: matrices must have multiples of them
_MATRIX = re.compile(r"blk\.(\d+)\.(attn_(?:q|k|v|qkv|output)|ffn_(?:gate|up|down))\.weight")


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def choose(header: Header) -> Placement:
    """Where the matrices of a file go that are worth another layout on this processor."""
    placement: dict[str, list[str]] = {}
    for buffer in _buffers():
        taken = {name for names in placement.values() for name in names}
        kinds = TYPES[buffer] if buffer != OWN else own.products()
        names = [name for name in matrices(header, buffer, kinds) if name not in taken]
        if names or buffer == OWN:  # which compute what lies between products as well
            placement[buffer] = names
    return placement


def matrices(header: Header, buffer: str, types: Iterable[str]) -> list[str]:
    """Names of the matrices of a file that have one of `types` and can be laid out as a type of buffers does."""
    types = frozenset(types)
    return [
        tensor.name
        for tensor in header.tensors
        if tensor.type in types and _MATRIX.fullmatch(tensor.name) and tensor.shape[0] % _ROWS[buffer] == 0
    ]


def describe_kernels(header: Header) -> str:
    """Which matrices are laid out anew on this machine's CPU, in words; without loading the file."""
    if not _buffers():
        return "as llama.cpp chooses on this processor"
    types, placement = {tensor.name: tensor.type for tensor in header.tensors}, choose(header)
    words = [
        f"{n} {kind} matrices {_where(buffer, kind)}"
        for buffer, names in placement.items()
        for kind, n in sorted(Counter(types[name] for name in names).items())
    ]
    found = ", ".join(words) or "no matrix is repacked: all have faster kernels as they are"
    found += _between_products(placement)
    if own.cannot_be_compiled():
        return f"{found}. {own.NOT_COMPILED}"
    return found + (_NO_AMX if not own.works() and amx.is_built_in() and not amx.works() else "")


def copied_bytes(header: Header) -> int:
    """What the matrices take that are laid out anew, beside the file."""
    buffers, infos = _buffers(), {tensor.name: tensor for tensor in header.tensors}
    return sum(
        allocated_bytes(buffers[buffer], infos[name].type, infos[name].shape)
        for buffer, names in _laid_out(choose(header)).items()
        for name in names
    )


def _laid_out(placement: Placement) -> Placement:
    """The matrices that leave the layout of the file."""
    return {buffer: names for buffer, names in placement.items() if buffer != OWN}


def summary(header: Header, placement: Placement) -> str:
    """Such as ", 36 matrices on AMX"."""
    types = {tensor.name: tensor.type for tensor in header.tensors}
    counts = Counter(_where(buffer, types[name]) for buffer, names in placement.items() for name in names)
    words = "".join(f", {n} matrices {where}" for where, n in counts.items())
    return words + _between_products(placement) + _NOT_COMPILED * own.cannot_be_compiled()


def _between_products(placement: Placement) -> str:
    """What f2gguf's own kernels compute where they have none of a file's matrices, in words."""
    return _ATTENTION if OWN in placement and not placement[OWN] else ""


def place(params: Any, placement: Placement) -> bool:
    """Let a load with `params` lay out these matrices and no others; False where llama.cpp is left to choose."""
    buffers = _buffers()
    params.use_extra_bufts = not buffers
    own.switch(OWN in buffers)
    if not buffers:
        return False
    laid_out = _laid_out(placement).items()
    pairs = [(pattern, buffers[buffer]) for buffer, names in laid_out for pattern in _patterns(names)]
    overrides = (_Override * (len(pairs) + 1))()  # ended by an empty one
    for override, (pattern, address) in zip(overrides, pairs, strict=False):
        override.pattern, override.buffer_type = pattern.encode(), address
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    params.kept_alive = overrides
    return True


def _buffers() -> dict[str, int]:
    """What of `TYPES` is here and right, with the address of its type of buffers; nothing on other than x86.

    llama.cpp's kernels for AMX are not used beside f2gguf's own, which configure the units' tiles in another way.
    """
    if b"AVX2 = 1" not in llama_cpp.llama_print_system_info():
        return {}
    here = extra_buffers() | ({OWN: 0} if own.works() else {})
    return {
        name: here[name]
        for name in (OWN, *TYPES)
        if name in here and (name != AMX or (OWN not in here and amx.works()))
    }


def _where(buffer: str, kind: str) -> str:
    return _WORDS[buffer].format(own.products().get(kind))


def _patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions that match `names` alone, and few of them: llama.cpp tries each on every tensor."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := _MATRIX.fullmatch(name):
            layers[match[2]].append(match[1])
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, numbers in layers.items():
        kinds["|".join(numbers)].append(kind)
    return [rf"^blk\.({numbers})\.({'|'.join(some)})\.weight$" for numbers, some in kinds.items()]
