"""Codes that know each other's errors: what rounding one weight loses, the weights that are rounded later make up for.

The error of a product X @ W.T is measured by the second moments of its inputs, H = X.T @ X / n. Scales are ggml's own,
so type, size and layout stay as they are. Matrices are held transposed here, (n_cols, n_rows): a column is contiguous.

Sources: GPTQ, arXiv 2210.17323 (`_with_feedback`); QuantEase, arXiv 2309.01885 (`_polish`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from f2gguf.quantize.repair.codes import compiled
from f2gguf.quantize.repair.codes.blocks import Blocks, Codes, Floats, Format
from f2gguf.quantize.repair.codes.parallel import product, side_by_side
from numpy.typing import NDArray
from scipy.linalg import lapack

PANEL = 128  # columns that share one product with all errors
_FEWEST_ROWS, _MOST_ROWS, _N_PARTS = 256, 1280, 4  # of a matrix that a core takes at a time; parts of a matrix
DAMPING = 0.01  # of each channel's second moment
_WEAKEST = 1e-9  # of the mean: the second moment that a channel has at least
N_SWEEPS = 2
N_REFITS = 1  # of scales to their codes, and of codes to these scales
_RIDGE = 1e-6


@dataclass(frozen=True)
class Moments:
    """Second moments of a product's inputs, damped, and their triangular factor: what feedback needs of the inputs."""

    matrix: Floats  # (n_cols, n_cols)
    order: NDArray[np.intp]  # columns from the strongest to the weakest
    upper: Floats  # (n_cols, n_cols), upper triangular in that order; upper.T @ upper is the inverse of the matrix

    def solve(self, right: Floats) -> Floats:
        """The inverse of the matrix times `right` (n_cols, n)."""
        result = np.empty_like(right)
        result[self.order] = product(self.upper.T, product(self.upper, right[self.order]))
        return result


def factor(matrix: Floats) -> Moments | None:
    """Damp and factorise second moments (n_cols, n_cols); None where they are not finite or give no factor.

    Every channel is damped by its own strength, so that strong ones do not drown the others. One that is never excited
    counts as a very weak one.
    """
    diagonal = np.diagonal(matrix)
    mean = float(diagonal.mean())
    if not (np.isfinite(mean) and mean > 0):
        return None
    strengths: Floats = np.sqrt(np.maximum(diagonal, mean * _WEAKEST))
    order = np.argsort(-strengths, kind="stable")
    backward = order[::-1]
    alike = matrix / strengths / strengths[:, None]
    alike[np.diag_indices_from(alike)] = 1 + DAMPING
    lower, info = lapack.spotrf(alike[np.ix_(backward, backward)], lower=0, clean=1, overwrite_a=1)
    if info == 0:
        lower, info = lapack.strtri(lower, lower=0, overwrite_c=1)
    if info or not np.isfinite(lower).all():
        return None
    damped = matrix.copy()
    damped[np.diag_indices_from(damped)] = (1 + DAMPING) * strengths**2
    upper: Floats = np.ascontiguousarray(lower[::-1, ::-1].T)
    upper /= strengths[order]
    return Moments(damped, order, upper)


def choose_codes(weights: Floats, blocks: Blocks, moments: Moments) -> Blocks:
    """`blocks` with the codes of least error of the product for `weights` (n_rows, n_cols), at the same scales.

    Rows do not depend on each other, so that every core takes some of them.
    """

    n_rows = min(max(-(-len(weights) // _N_PARTS), _FEWEST_ROWS), _MOST_ROWS)

    def some(first: int) -> Blocks:
        part = slice(first, first + n_rows)
        return _choose_codes(weights[part], blocks.rows(part), moments)

    return Blocks.joined(side_by_side(some, range(0, len(weights), n_rows)))


def _choose_codes(weights: Floats, blocks: Blocks, moments: Moments) -> Blocks:
    target, grid = np.ascontiguousarray(weights.T), _Grid.of(blocks)
    codes = _polish(_with_feedback(target, grid, moments), target, grid, moments)
    for _ in range(N_REFITS):
        before = _row_errors(codes, target, grid, moments)
        refitted = _refitted(replace(blocks, codes=np.ascontiguousarray(codes.T)), weights, moments)
        grid = _Grid.of(refitted)
        others = _polish(codes.copy(), target, grid, moments)
        # beside a channel 10,000 times as strong as the others, float32's rounding spoils the new scales of some rows
        kept = _row_errors(others, target, grid, moments) > before
        blocks = refitted.with_scales(np.where(kept[:, None], blocks.scales(), refitted.scales()))
        codes, grid = np.where(kept, codes, others), _Grid.of(blocks)
    return replace(blocks, codes=np.ascontiguousarray(codes.T))


def _row_errors(codes: Codes, target: Floats, grid: _Grid, moments: Moments) -> Floats:
    """The error of each row's products, (n_rows,)."""
    errors = grid.values(codes) - target
    result: Floats = np.einsum("ij,ij->j", errors, moments.matrix @ errors)
    return result


@dataclass(frozen=True)
class _Grid:
    """The values that every weight can take: step * level + offset, (n_sub_blocks, n_rows) each."""

    form: Format
    steps: Floats
    inverse: Floats  # zero where the step is
    offsets: Floats | None
    edges: Floats  # halfway between two levels; empty for levels one apart

    @classmethod
    def of(cls, blocks: Blocks) -> _Grid:
        steps, offsets, form = blocks.steps.T, blocks.offsets, blocks.format
        inverse: Floats = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
        edges = form.levels[:0] if form.is_even else (form.levels[1:] + form.levels[:-1]) / np.float32(2)
        steps, inverse = (np.ascontiguousarray(part) for part in (steps, inverse))
        return cls(form, steps, inverse, None if offsets is None else np.ascontiguousarray(offsets.T), edges)

    @property
    def as_c(self) -> compiled.Grid:
        """The same for compiled code, as long as this is there."""
        arrays = [None if it is None else it.ctypes.data for it in (self.steps, self.inverse, self.offsets)]
        n_rows, levels = self.steps.shape[1], self.form.levels
        return compiled.Grid(n_rows, self.form.sub_block, len(levels), levels.ctypes.data, *arrays, self.form.is_even)

    def nearest(self, column: int, values: Floats) -> tuple[Codes, Floats]:
        """The codes of `values` (n_rows,) in a column, and what these codes stand for."""
        i, levels = column // self.form.sub_block, self.form.levels
        scaled: Floats = (values if self.offsets is None else values - self.offsets[i]) * self.inverse[i]
        if self.edges.size:
            codes = np.searchsorted(self.edges, scaled).astype(np.uint8)
            rounded = levels[codes]
        else:
            rounded = np.rint(scaled, out=scaled)
            np.minimum(np.maximum(rounded, levels[0], out=rounded), levels[-1], out=rounded)  # np.clip takes longer
            codes = (rounded - levels[0]).astype(np.uint8)
        rounded *= self.steps[i]
        if self.offsets is not None:
            rounded += self.offsets[i]
        return codes, rounded

    def values(self, codes: Codes) -> Floats:
        """What codes (n_cols, n_rows) stand for."""
        width = self.form.sub_block
        values = self.form.levels[codes] * np.repeat(self.steps, width, axis=0)
        return values if self.offsets is None else values + np.repeat(self.offsets, width, axis=0)


def _with_feedback(target: Floats, grid: _Grid, moments: Moments) -> Codes:
    """Round column by column, the strongest first, each beside the errors that the columns before it carry on."""
    if library := compiled.library():
        return compiled.with_feedback(library, grid.as_c, target, moments.upper, moments.order)
    upper, order = moments.upper, moments.order
    codes, errors = np.empty(target.shape, dtype=np.uint8), np.empty_like(target)
    for begin in range(0, len(target), PANEL):
        end = min(begin + PANEL, len(target))
        left = target[order[begin:end]] - upper[:begin, begin:end].T @ errors[:begin]
        for j in range(begin, end):
            value = left[j - begin] - upper[begin:j, j] @ errors[begin:j]
            codes[order[j]], rounded = grid.nearest(int(order[j]), value)
            errors[j] = (value - rounded) / upper[j, j]
    return codes


def _refitted(blocks: Blocks, weights: Floats, moments: Moments) -> Blocks:
    """`blocks` with the scales of least error for `weights` (n_rows, n_cols) beside their codes.

    A row's values are a sum over its blocks of scale times shape, so that the best scales solve a small linear system.
    Those of a row stay where the solution changes one by more than half.
    """
    shapes, n_rows, width = blocks.shapes(), len(weights), blocks.format.block
    scales, n_blocks = blocks.scales(), blocks.d.shape[1]
    sums = np.empty((n_rows, len(shapes), n_blocks, len(shapes), n_blocks), dtype=np.float32)
    for i in range(n_blocks):
        block = slice(i * width, (i + 1) * width)
        for j, shape in enumerate(shapes):
            carried = shape[:, block] @ moments.matrix[block, block.start :]
            for k, other in enumerate(shapes):
                sums[:, j, i, k, i:] = sums[:, k, i:, j, i] = _block_sums(carried * other[:, block.start :], width)
    system = sums.reshape(n_rows, scales.shape[1], -1)
    aimed = weights @ moments.matrix
    wanted = np.concatenate([_block_sums(aimed * shape, width) for shape in shapes], axis=1)
    diagonal = np.einsum("rii->ri", system)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    solved: Floats = np.linalg.solve(system, wanted[..., None])[..., 0]
    sane = (np.isfinite(solved) & (np.abs(solved - scales) <= np.abs(scales) / 2)).all(axis=1)
    return blocks.with_scales(np.where(sane[:, None], solved, scales))


def _block_sums(values: Floats, width: int) -> Floats:
    """Sums over each block of a row, (n_rows, n_blocks)."""
    sums: Floats = values.reshape(len(values), -1, width).sum(axis=2)
    return sums


def _polish(codes: Codes, target: Floats, grid: _Grid, moments: Moments) -> Codes:
    """Coordinate descent: each code in turn becomes the best one beside all others. The error never grows."""
    if library := compiled.library():
        return compiled.polish(library, grid.as_c, codes, target, moments.matrix, N_SWEEPS)
    matrix, errors = moments.matrix, grid.values(codes) - target
    for _ in range(N_SWEEPS):
        before = codes.copy()
        for begin in range(0, len(codes), PANEL):
            end = min(begin + PANEL, len(codes))
            slopes, moves = matrix[begin:end] @ errors, np.zeros((end - begin, codes.shape[1]), dtype=np.float32)
            for j in range(begin, end):
                slope, now = slopes[j - begin] + matrix[j, begin:j] @ moves[: j - begin], target[j] + errors[j]
                code, value = grid.nearest(j, now - slope / matrix[j, j])
                np.multiply(value - now, code != codes[j], out=moves[j - begin])
                codes[j] = code
            errors[begin:end] += moves
        if np.array_equal(codes, before):
            break
    return codes
