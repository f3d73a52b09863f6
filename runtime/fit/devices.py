"""Devices that are not here: what their vendors state, and what follows from it. All of it is an estimate."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from f2gguf.runtime.errors import UnknownName
from f2gguf.runtime.gguf.header import Header

PATH = Path(__file__).resolve().parents[1] / "devices.toml"
# Milliseconds that 2,048 tokens take on an H100: for each layer, and for each 10**12 products of 8-bit weights. They
# follow from 47,000 tokens/s of 0.6B in Q4_K_M and 16,400 of 4B in Q4_0 (CHANGELOG.md, "On a GPU"). The third figure
# there, 135,000 of 80M in Q8_0, is not used, and the estimate is 1.5 times as much.
_BATCH, _LAYER_MS, _PRODUCTS_MS, _H100_TOPS = 2048, 1.20, 10.96, 1979
ESTIMATE = (
    "estimated from two files on an H100, and scaled by the vendor's rate of 8-bit products; for 80M on an H100 it "
    "says 1.5 times too much, and it is unchecked on other devices"
)


@dataclass(frozen=True)
class Device:
    """A device of runtime/devices.toml."""

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    source: str  # the vendor's page
    int8_tops: float | None = None
    shared: bool = False  # the memory, by processor and GPU

    def tokens_per_s(self, header: Header, types: Mapping[str, str]) -> float | None:
        """Estimated speed of documents; None without a figure or measurement, as for 16-bit weights and experts."""
        layers = [tensor for tensor in header.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
        is_plain = all(len(it.shape) == 2 and types[it.name] not in ("F16", "BF16", "F32") for it in layers)
        if self.int8_tops is None or not is_plain:
            return None
        n_layers = int(header.values.get(f"{header.architecture}.block_count", 1))
        products = _BATCH * sum(math.prod(tensor.shape) for tensor in layers) / 1e12
        return 1000 * _BATCH / (n_layers * _LAYER_MS + products * _PRODUCTS_MS) * self.int8_tops / _H100_TOPS

    def query_ms(self, weights_bytes: int) -> float:
        """The least that a query takes: every weight is read once."""
        return weights_bytes / self.bandwidth_gb_s / 1e6


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
