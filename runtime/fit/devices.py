"""Devices that are not here: what their vendors state, and what follows from it. All of it is an estimate."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from f2gguf.runtime.errors import UnknownName
from f2gguf.runtime.fit.memory import Memory
from f2gguf.runtime.fit.speed import Speed
from f2gguf.runtime.gguf.header import Header

PATH = Path(__file__).resolve().parents[1] / "devices.toml"
# Milliseconds that 2,048 tokens take on an H200: for their splitting, which the processor does; for each layer; and for
# each 10**12 products of 8-bit weights. A profile says 23.3 ms for 0.6B in Q4_K_M, of which 12.7 are products. So
# estimated, 80M in Q8_0 does 376,000 tokens/s, and 0.6B 91,000; 363,000, 92,900 (Q4_K_M) and 99,700 (Q4_0) were
# measured (CHANGELOG.md, "On a GPU"). 4B in Q4_0 does 19,200; one context on an H100 did 16,400.
_BATCH, _SPLIT_MS, _LAYER_MS, _PRODUCTS_MS, _H200_TOPS = 2048, 2.0, 0.33, 12.5, 1979
_LEAST_MS = 0.1  # of a query: no model answers in less
DEVICES_NOTE = (
    "documents: estimated from three files on an H200, which it gives within 10%, and scaled by the vendor's rate of "
    "8-bit products, which is unchecked on other devices; a query: the least, the time to read its weights once"
)


@dataclass(frozen=True)
class Work:
    """What computing with a file takes, which its speed on a device is estimated from."""

    n_layers: int
    products: int | None  # of weights for a token; None where none like them were measured: 16-bit weights, experts
    weights_bytes: int  # of the layers


@dataclass(frozen=True)
class Device:
    """A device of runtime/devices.toml."""

    name: str
    bandwidth_gb_s: float
    source: str  # the vendor's page
    memory_gb: float | None = None  # None for processors, whose machines have what they have
    int8_tops: float | None = None
    shared: bool = False  # the memory, by processor and GPU
    price: float | None = None  # of an hour of a rented one, in US dollars
    price_source: str | None = None  # whose price, and when

    def holds(self, memory: Memory) -> bool | None:
        """Whether a file that takes `memory` runs on it; None where that depends on the machine."""
        if self.memory_gb is None:
            return None
        needed = memory.vram_bytes + (memory.host_bytes if self.shared else 0)
        return needed <= self.memory_gb * 1e9

    def speed(self, work: Work) -> Speed:
        """The estimated speed of documents, and the least that a query takes: every weight is read once.

        Where that takes no time, other things take longer, and nothing is known of a query.
        """
        tokens_per_s = None
        if self.int8_tops is not None and work.products is not None:
            computing = work.n_layers * _LAYER_MS + _BATCH * work.products / 1e12 * _PRODUCTS_MS
            tokens_per_s = 1000 * _BATCH / (_SPLIT_MS + computing * _H200_TOPS / self.int8_tops)
        query_ms = work.weights_bytes / self.bandwidth_gb_s / 1e6
        return Speed(tokens_per_s, query_ms if query_ms >= _LEAST_MS else None)


def work_of(header: Header) -> Work:
    """The work of a file, or of a plan whose tensors have the types that they would get."""
    layers = [tensor for tensor in header.tensors if tensor.name.startswith("blk.")]
    matrices = [tensor for tensor in layers if len(tensor.shape) > 1]
    is_usual = all(len(it.shape) == 2 and it.type not in ("F16", "BF16", "F32") for it in matrices)
    return Work(
        n_layers=int(header.values.get(f"{header.architecture}.block_count", 1)),
        products=sum(math.prod(tensor.shape) for tensor in matrices) if is_usual else None,
        weights_bytes=sum(tensor.size_bytes for tensor in layers),
    )


def device_cell(device: Device, memory: Memory, work: Work) -> str:
    """What a file does on a device, in a table's cell: 'about 16,000 tokens/s, 2.1 ms', 'fits', or 'too large'."""
    fits = device.holds(memory)
    if fits is False:
        return "too large"
    speed = device.speed(work)
    parts = [f"about {rounded(speed.tokens_per_s)} tokens/s"] if speed.tokens_per_s else []
    if speed.query_ms:
        parts.append(f"{rounded(speed.query_ms)} ms")
    return ", ".join(parts) or ("fits" if fits else "not known")


def rounded(value: float) -> str:
    """Two significant digits, which is more than an estimate has."""
    return f"{float(f'{value:.2g}'):,.{max(0, 1 - math.floor(math.log10(value)))}f}"


@cache
def devices() -> Mapping[str, Device]:
    """Name -> device, as runtime/devices.toml lists them."""
    return {name: Device(name, **table) for name, table in tomllib.loads(PATH.read_text(encoding="utf-8")).items()}


def require_device(name: str) -> Device:
    """The device called `name`, upper or lower case. Raises `UnknownName` with the nearest one."""
    by_lower = {known.lower(): device for known, device in devices().items()}
    if device := by_lower.get(name.strip().lower()):
        return device
    raise UnknownName("device of `f2gguf fit`", name, devices(), " Without --device, this machine is measured.")
