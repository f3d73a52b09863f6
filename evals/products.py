"""Linear layers of a checkpoint on AMX, the matrix units of Intel's processors, nearly as exact as in float32.

Most checkpoints store bfloat16 weights. A product of two bfloat16 numbers is exact in float32, in which the units sum
products up. So inputs become the sum of two bfloat16 numbers, which keep 16 of their 24 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from f2gguf.runtime.llama.threads import cpu_flags

_TOLERANCE = 1e-5  # of the results' norm: 2e-6 was measured, and 2e-3 with inputs as one bfloat16 number


@contextlib.contextmanager
def fast_products(module: Any) -> Iterator[None]:
    """Let the linear layers within `module` that have bfloat16 weights use AMX while the block runs, where that works.

    The weights are float32 tensors, and stay as they are.
    """
    import torch

    chosen = []
    if _works():
        layers = [layer for layer in module.modules() if type(layer) is torch.nn.Linear]
        chosen = [layer for layer in layers if torch.equal(layer.weight, layer.weight.bfloat16().float())]
    for layer in chosen:
        vars(layer)["forward"] = partial(_linear, weight=layer.weight, bias=layer.bias)  # before the class's own
    try:
        yield
    finally:
        for layer in chosen:
            del vars(layer)["forward"]


def _linear(inputs: Any, *, weight: Any, bias: Any) -> Any:
    import torch

    rows = inputs.reshape(-1, inputs.shape[-1])
    high = rows.bfloat16().float()
    with _bfloat16_products():
        results = torch.nn.functional.linear(torch.cat([high, rows - high]), weight)
    total = (results[: len(rows)] + results[len(rows) :]).reshape(*inputs.shape[:-1], -1)
    return total if bias is None else total + bias


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let torch round the float32 inputs of products to bfloat16, which alone makes it use AMX."""
    import torch

    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@cache
def _works() -> bool:
    """Whether the processor has AMX, torch can be told to use it, and a product is right."""
    import torch

    if "amx_bf16" not in cpu_flags() or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator).bfloat16().float()
    inputs = torch.randn(48, 256, generator=generator)
    wanted = inputs.double() @ weight.double().T
    error = (_linear(inputs, weight=weight, bias=None).double() - wanted).norm() / wanted.norm()
    return bool(error < _TOLERANCE)
