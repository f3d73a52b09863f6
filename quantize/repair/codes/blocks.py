"""ggml's quantised blocks, taken apart into codes and scales, and put together again.

A row is cut into sub-blocks of 16 or 32 values. A value is step * level + offset: its code chooses one of the type's
levels, and its sub-block has a step and an offset. Source: https://github.com/ggml-org/ggml, ggml-common.h and
ggml-quants.c. What ggml's quantiser made comes out of `pack` again, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_D, _M, _DMIN, _QS = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2"), ("qs", "u1", 16)
_K_SCALES, _K_QS = ("scales", "u1", 12), ("qs", "u1", 128)
_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Format:
    """How a type lays out one block."""

    fields: tuple[tuple[Any, ...], ...]  # of a block, in order
    levels: Floats  # value of each code, before step and offset
    block: int = 32  # values in a block
    sub_block: int = 32  # values with one step
    half: int = 16  # values between two that share a byte

    def has(self, name: str) -> bool:
        """Whether blocks have the field `name`."""
        return any(own[0] == name for own in self.fields)

    @property
    def is_even(self) -> bool:
        """Whether the levels lie one apart."""
        return bool((np.diff(self.levels) == 1).all())


def _counting(first: int, n: int) -> Floats:
    return np.arange(first, first + n, dtype=np.float32)


FORMATS = {
    "Q4_0": Format((_D, _QS), _counting(-8, 16)),
    "Q4_1": Format((_D, _M, _QS), _counting(0, 16)),
    "Q5_0": Format((_D, ("qh", "u1", 4), _QS), _counting(-16, 32)),
    "Q5_1": Format((_D, _M, ("qh", "u1", 4), _QS), _counting(0, 32)),
    "Q8_0": Format((_D, ("qs", "i1", 32)), _counting(-128, 256)),
    "IQ4_NL": Format((_D, _QS), np.array(_NL_LEVELS, dtype=np.float32)),
    "Q4_K": Format((_D, _DMIN, _K_SCALES, _K_QS), _counting(0, 16), 256, 32, 32),
    "Q5_K": Format((_D, _DMIN, _K_SCALES, ("qh", "u1", 32), _K_QS), _counting(0, 32), 256, 32, 32),
    "IQ4_XS": Format(
        (_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), _K_QS), np.array(_NL_LEVELS, dtype=np.float32), 256
    ),
    "Q6_K": Format((("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D), _counting(-32, 64), 256, 16, 64),
}


@dataclass
class Blocks:
    """The blocks of a matrix's rows. What a type does not have is None."""

    kind: str
    codes: Codes  # (n_rows, n_cols), each an index into the levels
    d: NDArray[np.float16]  # (n_rows, n_blocks) step, or unit of the sub-blocks' steps
    minimum: NDArray[np.float16] | None = None  # (n_rows, n_blocks) "m", or "dmin": unit of the sub-blocks' offsets
    sub_steps: NDArray[Any] | None = None  # (n_rows, n_sub_blocks) whole numbers
    sub_minima: NDArray[Any] | None = None
    format: Format = field(init=False)

    def __post_init__(self) -> None:
        self.format = FORMATS[self.kind]

    @property
    def steps(self) -> Floats:
        """(n_rows, n_sub_blocks)."""
        steps = self.d.astype(np.float32)
        return steps if self.sub_steps is None else self._spread(steps) * self.sub_steps.astype(np.float32)

    @property
    def offsets(self) -> Floats | None:
        """(n_rows, n_sub_blocks); None for types whose values lie around zero."""
        if self.minimum is None:
            return None
        offsets = self.minimum.astype(np.float32)
        return offsets if self.sub_minima is None else -self._spread(offsets) * self.sub_minima.astype(np.float32)

    def values(self) -> Floats:
        """What the blocks stand for, (n_rows, n_cols)."""
        width, offsets = self.format.sub_block, self.offsets
        values = np.repeat(self.steps, width, axis=1) * self.format.levels[self.codes]
        return values if offsets is None else values + np.repeat(offsets, width, axis=1)

    def shapes(self) -> list[Floats]:
        """What each of `scales` is multiplied by for the values, (n_rows, n_cols) each; the values are their sum."""
        width = self.format.sub_block
        levels = self.format.levels[self.codes]
        shapes = [levels if self.sub_steps is None else levels * np.repeat(self.sub_steps.astype(np.float32), width, 1)]
        if self.minimum is not None:
            ones = np.ones_like(levels)
            minima = self.sub_minima
            shapes.append(ones if minima is None else -np.repeat(minima.astype(np.float32), width, 1))
        return shapes

    def scales(self) -> Floats:
        """The halves of a row's blocks, (n_rows, n_scales): all steps, then all offsets where the type has them."""
        halves = self.d if self.minimum is None else np.concatenate([self.d, self.minimum], axis=1)
        return halves.astype(np.float32)

    def with_scales(self, scales: Floats) -> Blocks:
        """The same codes under other `scales`, (n_rows, n_scales), which are rounded to halves."""
        halves = scales.astype(np.float16)
        d, minimum = np.split(halves, 2, axis=1) if self.minimum is not None else (halves, None)
        return replace(self, d=d, minimum=minimum)

    def rows(self, part: slice) -> Blocks:
        """The blocks of some rows."""
        return self._with(lambda name: self._array(name)[part])

    @classmethod
    def joined(cls, parts: Sequence[Blocks]) -> Blocks:
        """The blocks of the rows of all `parts`, one part after another."""
        return parts[0]._with(lambda name: np.concatenate([part._array(name) for part in parts]))

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = getattr(self, name)
        return array

    def _with(self, new: Callable[[str], NDArray[Any]]) -> Blocks:
        """The same type with the arrays that `new` gives by their names."""
        arrays: dict[str, Any] = {
            name: new(name) for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **arrays)

    def _spread(self, of_blocks: Floats) -> Floats:
        return np.repeat(of_blocks, self.format.block // self.format.sub_block, axis=1)


def unpack(data: Codes, kind: str) -> Blocks:
    """The blocks of quantised rows (n_rows, n_bytes) of the type `kind`."""
    form, n_rows = FORMATS[kind], len(data)
    stored = np.ascontiguousarray(data).view(np.dtype(list(form.fields)))
    codes = _read_codes(stored, kind, form).reshape(n_rows, -1)
    if kind in ("Q4_K", "Q5_K"):
        sub_steps, sub_minima = (part.reshape(n_rows, -1) for part in _read_k_scales(stored["scales"]))
        return Blocks(kind, codes, stored["d"], stored["dmin"], sub_steps, sub_minima)
    if kind in ("Q6_K", "IQ4_XS"):
        steps = stored["scales"] if kind == "Q6_K" else _read_xs_scales(stored["scales_l"], stored["scales_h"])
        return Blocks(kind, codes, stored["d"], None, steps.reshape(n_rows, -1))
    return Blocks(kind, codes, stored["d"], stored["m"] if form.has("m") else None)


def pack(blocks: Blocks) -> Codes:
    """Quantised rows, (n_rows, n_bytes)."""
    kind, form, n_rows = blocks.kind, blocks.format, len(blocks.codes)
    stored = np.zeros(blocks.d.shape, dtype=np.dtype(list(form.fields)))
    stored["d"] = blocks.d
    if blocks.minimum is not None:
        stored["m" if form.has("m") else "dmin"] = blocks.minimum
    if blocks.sub_steps is not None:
        steps = blocks.sub_steps.reshape(*blocks.d.shape, -1)
        minima = blocks.sub_minima
        if kind == "IQ4_XS":
            stored["scales_l"], stored["scales_h"] = _xs_scales(steps)
        else:
            stored["scales"] = steps if minima is None else _k_scales(steps, minima.reshape(steps.shape))
    _write_codes(stored, blocks.codes.reshape(*blocks.d.shape, form.block), kind, form)
    return stored.view(np.uint8).reshape(n_rows, -1)


def _read_codes(stored: NDArray[Any], kind: str, form: Format) -> Codes:
    """(n_rows, n_blocks, block)."""
    if kind == "Q8_0":
        return (stored["qs"].astype(np.int16) + 128).astype(np.uint8)
    codes = _nibbles(stored["ql" if kind == "Q6_K" else "qs"], form.half)
    if form.has("qh"):
        codes |= _high_bits(stored["qh"], kind) << np.uint8(4)
    return codes


def _write_codes(stored: NDArray[Any], codes: Codes, kind: str, form: Format) -> None:
    if kind == "Q8_0":
        stored["qs"] = codes.astype(np.int16) - 128
        return
    pairs = (codes & 15).reshape(*codes.shape[:2], -1, 2, form.half)
    low = pairs[..., 0, :] | pairs[..., 1, :] << 4
    stored["ql" if kind == "Q6_K" else "qs"] = low.reshape(*codes.shape[:2], -1)
    if form.has("qh"):
        stored["qh"] = _packed_high_bits(codes >> np.uint8(4), kind)


def _nibbles(data: Codes, half: int) -> Codes:
    """Bytes (..., n) as codes (..., 2 n): `half` low nibbles, then the high nibbles of the same bytes, and so on."""
    chunks = data.reshape(*data.shape[:-1], -1, 1, half)
    return np.concatenate([chunks & 15, chunks >> 4], axis=-2, dtype=np.uint8).reshape(*data.shape[:-1], -1)


def _high_bits(data: Codes, kind: str) -> Codes:
    """The bits of every code from the fifth up, (n_rows, n_blocks, block)."""
    lead = data.shape[:-1]
    if kind == "Q6_K":  # two bits a code; byte l of a half holds those of the codes l, l + 32, l + 64 and l + 96
        pairs: Codes = data.reshape(*lead, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & np.uint8(3)
        return pairs.reshape(*lead, -1)
    if kind == "Q5_K":  # bit j of byte l is that of code 32 j + l
        return np.unpackbits(data[..., None], axis=-1, bitorder="little").swapaxes(-1, -2).reshape(*lead, -1)
    return np.unpackbits(data, axis=-1, bitorder="little")


def _packed_high_bits(bits: Codes, kind: str) -> Codes:
    lead = bits.shape[:-1]
    if kind == "Q6_K":
        quarters = bits.reshape(*lead, 2, 4, 32) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
        packed: Codes = np.bitwise_or.reduce(quarters, axis=-2).reshape(*lead, -1)
        return packed
    if kind == "Q5_K":
        return np.packbits(bits.reshape(*lead, 8, 32).swapaxes(-1, -2), axis=-1, bitorder="little")[..., 0]
    return np.packbits(bits, axis=-1, bitorder="little")


def _read_k_scales(packed: Codes) -> tuple[Codes, Codes]:
    """Twelve bytes as eight steps and eight minima of six bits each."""
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    steps = np.concatenate([first & 63, last & 15 | first >> 6 << 4], axis=-1, dtype=np.uint8)
    return steps, np.concatenate([second & 63, last >> 4 | second >> 6 << 4], axis=-1, dtype=np.uint8)


def _k_scales(steps: Codes, minima: Codes) -> Codes:
    first, second = (part[..., :4] | part[..., 4:] >> 4 << 6 for part in (steps, minima))
    return np.concatenate([first, second, steps[..., 4:] & 15 | (minima[..., 4:] & 15) << 4], axis=-1, dtype=np.uint8)


def _read_xs_scales(low: Codes, high: NDArray[np.uint16]) -> NDArray[np.int8]:
    """Eight steps of six bits each, from -32: four bits in half a byte, and two in sixteen bits."""
    upper = high[..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    lower = np.stack([low & 15, low >> 4], axis=-1).reshape(upper.shape)
    steps: NDArray[np.int8] = ((upper << np.uint16(4) | lower).astype(np.int16) - 32).astype(np.int8)
    return steps


def _xs_scales(steps: NDArray[np.int8]) -> tuple[Codes, NDArray[np.uint16]]:
    codes = (steps.astype(np.int16) + 32).astype(np.uint16)
    pairs = (codes & 15).astype(np.uint8).reshape(*codes.shape[:-1], -1, 2)
    high = (codes >> np.uint16(4) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=-1, dtype=np.uint16)
    return pairs[..., 0] | pairs[..., 1] << np.uint8(4), high
