"""A model is quantised layer by layer, each matrix for the inputs that the layers before it give once quantised.

Two models run side by side over the calibration texts: the exact one, and the one that is being quantised. Where their
layers differ, a matrix aims half-way at undoing the difference. Aiming all the way fits the calibration texts too well.
Sources: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.quantize.checkpoint.weights import DTYPES
from f2gguf.quantize.repair.assemble import Imatrix, Scale
from f2gguf.quantize.repair.codes.blocks import FORMATS, Codes, Floats, pack, unpack
from f2gguf.quantize.repair.codes.feedback import Moments, choose_codes, factor
from f2gguf.quantize.repair.codes.layers import Layer, Shape, Texts, first_states, run_layer
from f2gguf.quantize.repair.codes.parallel import all_cores, by_rows, gram, product, side_by_side
from f2gguf.quantize.repair.tensors import (
    OnProgress,
    Rows,
    Weights,
    as_multiplied,
    dequantized,
    quantize_rows,
    rounding_width,
)
from f2gguf.runtime.files import writing
from f2gguf.runtime.gguf.header import Header
from f2gguf.runtime.llama.packing import Ids
from numpy.typing import NDArray

SHIFT = 0.5  # of the way to the weights that undo the difference
LAST_SHARE = 0.5  # of all weight is on the last tokens, where they alone give the vector
# Of a token's weight that does not follow from gradients, where there are any. With a quarter of the texts, MiniLM's
# Q4_0 drifts 0.664% with 0, 0.653% with 0.1, 0.655% with 0.3 and 0.730% with 1 on texts that judge; f2llm-nano's Q4_K_M
# 0.0230%, 0.0242%, 0.0240% and 0.0253%.
PLAIN_SHARE = 0.1
N_ROWS = 256  # of a matrix, to price a type
N_CHECKED = 1024  # tokens, or up to twice as many, of texts that judge: whether feedback pays in a matrix
TOKEN_TABLE = "token_embd.weight"
# Types whose codes are chosen with feedback. llama.cpp rounds inputs as coarsely as Q8_0 rounds weights.
COMPENSATED = tuple(kind for kind in FORMATS if kind != "Q8_0")

Groups = Callable[[str, bool], "_Group"]
Products = Callable[[tuple[str, ...], Sequence[Rows]], Sequence[Sequence[Rows]]]


@dataclass(frozen=True)
class Fitted:
    """A matrix in its type, and its bias where the architecture has one."""

    data: Codes  # (n_rows, n_bytes)
    bias: Floats | None  # (n_rows,)


def cost(shape: Sequence[int], n_tokens: int) -> int:
    """About how long a matrix takes, in products of numbers: for the tokens, and for columns with each other."""
    n_rows, n_cols = shape
    return n_rows * n_cols * (4 * n_tokens + 16 * n_cols)


class Compensation:
    """The layers of `weights`, with re-scaled channels, over calibration texts.

    `fitting` and `judging` are token ids of texts: the first choose codes. Codes that do worse on some of the second
    than ggml's own are not used. `gradients` are what `gradient_weights` gives for `fitting`, if there are any.
    """

    def __init__(
        self,
        weights: Weights,
        fitting: Sequence[Ids],
        judging: Sequence[Ids],
        imatrix: Imatrix,
        scales: Mapping[str, Scale],
        gradients: Mapping[str, Floats] | None = None,
    ) -> None:
        self.weights, self.imatrix, self.scales, self.gradients = weights, imatrix, scales, gradients
        self.fitting, self.judging = fitting, judging
        self.matrices = matrix_names(weights.header)
        checked = judging[:: max(1, sum(map(len, judging)) // N_CHECKED)]
        self.texts, self.shape = Texts.of([*fitting, *checked]), Shape(weights.header)
        judged = np.array(self.texts.order) >= len(fitting)
        self._judged = np.repeat(judged, self.texts.lengths)
        self._token_weights = _token_weights(self.texts, weights.header)[~self._judged]
        starts = np.concatenate([[0], np.cumsum(list(map(len, fitting)))])
        kept = [i for i in self.texts.order if i < len(fitting)]
        self._places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in kept])  # of tokens in `gradients`

    @cached_property
    def costs(self) -> dict[str, int]:
        """About how long each matrix takes, in products of numbers."""
        return {name: cost(self.weights.infos[name].shape, len(self.texts.ids)) for name in self.matrices}

    def run(
        self, types: Mapping[str, str], folder: Path, on_progress: OnProgress = lambda _: None
    ) -> dict[str, NDArray[np.uint8]]:
        """Every matrix of the layers in its type, (n_rows, n_bytes), and every bias that changed, as bytes.

        They are kept in `folder`, and a run that was stopped goes on from there. Progress is in units of `costs`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if all(_path(folder, name).exists() for name in self.matrices):
            on_progress(sum(self.costs.values()))
        else:
            self._fit(types, folder, on_progress)
        ready: dict[str, NDArray[np.uint8]] = {}
        for name in self.matrices:
            fitted = _load(_path(folder, name))
            ready[name] = fitted.data
            if fitted.bias is not None:
                ready[_bias_name(name)] = fitted.bias.view(np.uint8)[None]
        return ready

    def _fit(self, types: Mapping[str, str], folder: Path, on_progress: OnProgress) -> None:
        """Write what `folder` does not hold yet."""

        def products(names: tuple[str, ...], inputs: Sequence[Rows]) -> tuple[list[Rows], list[Rows]]:
            both: tuple[list[Rows], list[Rows]] = ([], [])
            rounded = _rounding(inputs[1], is_kept=len(names) > 1)
            groups = self._groups(names, inputs[0], rounded)
            for name in names:
                rows, bias, path = self._rows(name), self._bias(name), _path(folder, name)
                exact = product(inputs[0], rows.T)
                if not path.exists():
                    _save(path, self._fitted(name, rows, bias, groups, types[name], exact[self._judged]))
                fitted = _load(path)
                near = product(rounded(types[name]), dequantized(fitted.data, types[name]).T)
                if bias is not None and fitted.bias is not None:
                    exact, near = exact + bias, near + fitted.bias
                both[0].append(exact)
                both[1].append(near)
                on_progress(self.costs[name])
            return both

        table = {TOKEN_TABLE: types[TOKEN_TABLE]}
        with all_cores():
            states = [first_states(self.weights, self.texts, tables) for tables in ({}, table)]
            for i in range(self.shape.n_layers):
                states = self._through(i, states, products)

    def errors(
        self, types: Mapping[str, Sequence[str]], on_progress: OnProgress = lambda _: None
    ) -> dict[str, dict[str, float]]:
        """Relative squared error of each matrix's products in each of its `types`, on the texts that judge.

        Some of the rows are tried, with the inputs that the exact model gives.
        """
        found: dict[str, dict[str, float]] = {}

        def products(names: tuple[str, ...], inputs: Sequence[Rows]) -> list[list[Rows]]:
            groups, sent = self._groups(names, inputs[0], _rounding(inputs[0], is_kept=False)), []
            for name in names:
                rows, bias = self._rows(name), self._bias(name)
                some = rows[:: max(1, len(rows) // N_ROWS)]
                found[name] = {kind: self._error(name, some, groups, kind) for kind in types.get(name, ())}
                sent.append(product(inputs[0], rows.T) + (0 if bias is None else bias))
                on_progress(self.costs[name])
            return [sent]

        with all_cores():
            states = [first_states(self.weights, self.texts, {})]
            for i in range(self.shape.n_layers):
                states = self._through(i, states, products)
        return {name: by_type for name, by_type in found.items() if by_type}

    def _through(self, i: int, states: Sequence[Rows], products: Products) -> list[Rows]:
        """What leaves layer `i` for each of `states`, with the products that `products` gives."""
        prefix = f"blk.{i}."
        vectors = self._vectors(prefix)
        layers = [run_layer(vectors, entering, self.texts, self.shape.at(i)) for entering in states]
        sent: Sequence[Sequence[Rows] | None] = [None] * len(layers)
        while True:
            names, inputs = zip(*side_by_side(_go_on, zip(layers, sent, strict=True)), strict=True)
            if not names[0]:
                return list(inputs)
            sent = ()  # the last products are as large as the inputs
            sent = products(tuple(f"{prefix}{name}.weight" for name in names[0]), inputs)

    def _groups(self, names: Sequence[str], exact: Rows, rounded: Callable[[str], Rows]) -> Groups:
        """What gives the inputs of products with the matrices `names`, by their type and whether there is a bias."""
        weights = self._token_weights
        if self.gradients:
            found = np.mean([self.gradients[name] for name in names], axis=0)[self._places]
            weights = (1 - PLAIN_SHARE) * found + PLAIN_SHARE * weights

        @cache
        def of_rounding(width: int, has_bias: bool) -> _Group:
            near = rounded("Q8_K" if width == 256 else "Q8_0")
            judged = exact[self._judged], near[self._judged]
            chosen = exact[~self._judged], near[~self._judged]
            del near
            return _Group.of(*chosen, *judged, weights, has_bias=has_bias)

        return lambda kind, has_bias: of_rounding(rounding_width(kind), has_bias)

    def _fitted(self, name: str, rows: Rows, bias: Floats | None, groups: Groups, kind: str, exact: Rows) -> Fitted:
        """`exact` are the products that the exact model has in the texts that judge, without a bias."""
        group = groups(kind, bias is not None)
        plain = by_rows(lambda part: quantize_rows(part, kind, self.imatrix.get(name)), rows)
        if kind not in COMPENSATED or group.moments is None:
            return Fitted(plain, bias)
        data = _with_feedback(rows, plain, kind, group)
        change = group.bias_change(rows, dequantized(data, kind))
        errors = [
            float(np.square(product(group.judged_near, dequantized(codes, kind).T) + added - exact).mean())
            for codes, added in ((plain, np.float32(0)), (data, change))
        ]
        if not errors[1] < errors[0]:
            return Fitted(plain, bias)
        return Fitted(data, None if bias is None else bias + change)

    def _error(self, name: str, rows: Rows, groups: Groups, kind: str) -> float:
        group = groups(kind, self._bias(name) is not None)
        data = quantize_rows(rows, kind, self.imatrix.get(name))
        if kind in COMPENSATED and group.moments is not None:
            data = _with_feedback(rows, data, kind, group)
        values, exact = dequantized(data, kind), group.judged_exact @ rows.T
        products = group.judged_near @ values.T + group.bias_change(rows, values)
        return float(np.square(products - exact).mean() / np.square(exact).mean())

    def _rows(self, name: str) -> Rows:
        return self.scales.get(name, Scale()).apply(self.weights.rows(name))

    def _bias(self, name: str) -> Floats | None:
        name = _bias_name(name)
        return self.vector(name) if name in self.weights.infos else None

    def _vectors(self, prefix: str) -> dict[str, Floats]:
        names = [t.name for t in self.weights.header.tensors if t.name.startswith(prefix) and len(t.shape) == 1]
        return {name.removeprefix(prefix): self.vector(name) for name in names}

    def vector(self, name: str) -> Floats:
        """A vector of the re-scaled model, (n,)."""
        vector: Floats = self._rows(name)[0]
        return vector


@dataclass(frozen=True)
class _Group:
    """What feedback needs of the inputs of products: in the exact model, and in the one that is being quantised.

    The latter are rounded as llama.cpp rounds them. That counts where some channels are far stronger than others in
    their block: a weak one would lose there what it makes up for.
    """

    moments: Moments | None
    rounded: Rows  # (n_tokens, n_cols) of the texts that choose, times the roots of their weights
    missing: Rows | None  # what the exact model has more, (n_tokens, n_cols); None where the models do not differ
    means: tuple[Floats, Floats] | None  # of the inputs, (n_cols,), where a bias can take up the mean of the error
    judged_exact: Rows  # (n_tokens, n_cols) of the texts that judge
    judged_near: Rows

    @classmethod
    def of(
        cls, exact: Rows, rounded: Rows, judged_exact: Rows, judged_near: Rows, weights: Floats, *, has_bias: bool
    ) -> _Group:
        """The group of inputs (n_tokens, n_cols), which it keeps for itself; token `weights` have the mean 1."""
        weights = weights / np.float32(len(weights))
        means, differ = None, not np.array_equal(exact, rounded)
        if has_bias:
            exact_mean: Floats = weights @ exact
            near_mean: Floats = weights @ rounded
            means = exact_mean, near_mean
            exact -= exact_mean  # in place: no array is larger
            rounded -= near_mean
        exact -= rounded
        for part in (exact, rounded):
            part *= np.sqrt(weights)[:, None]
        return cls(factor(gram(rounded)), rounded, exact if differ else None, means, judged_exact, judged_near)

    def target(self, rows: Rows) -> Rows:
        """What the codes of `rows` aim at: part of the way to the weights that undo the difference of the models."""
        if self.missing is None or self.moments is None:
            return rows
        if len(rows) < rows.shape[1]:  # the order with fewer multiplications
            return rows + self.moments.solve(product(self.rounded.T, product(self.missing, SHIFT * rows.T))).T
        return rows + product(rows, self._shift)

    @cached_property
    def _shift(self) -> Floats:
        """What `rows @ shift` adds to a matrix, (n_cols, n_cols)."""
        assert self.missing is not None and self.moments is not None
        return (SHIFT * self.moments.solve(product(self.rounded.T, self.missing))).T

    def bias_change(self, rows: Rows, values: Rows) -> Floats | np.float32:
        """What keeps the mean of the products `rows` give when `values` take their place, (n_rows,)."""
        return self.means[0] @ rows.T - self.means[1] @ values.T if self.means else np.float32(0)


def _go_on(step: tuple[Layer, Any]) -> tuple[tuple[str, ...], Rows]:
    """Run a layer up to its next products, after it was sent the last ones."""
    layer, products = step
    return layer.send(products)


def _rounding(rows: Rows, *, is_kept: bool) -> Callable[[str], Rows]:
    """What gives `rows` as llama.cpp rounds them for a type; it may keep them for the next matrix."""

    def of_width(width: int) -> Rows:
        return by_rows(lambda part: as_multiplied(part, "Q8_K" if width == 256 else "Q8_0"), rows)

    rounded = cache(of_width) if is_kept else of_width
    return lambda kind: rows if kind in DTYPES else rounded(rounding_width(kind))


def _with_feedback(rows: Rows, plain: Codes, kind: str, group: _Group) -> Codes:
    """`rows` in ggml's scales of `plain`, with codes chosen for the inputs of `group`."""
    assert group.moments is not None
    return pack(choose_codes(group.target(rows), unpack(plain, kind), group.moments))


def _token_weights(texts: Texts, header: Header) -> Floats:
    """How much each token counts, (n_tokens,), 1 on average."""
    lengths = texts.lengths
    if header.pooling != "last":
        return np.ones(int(lengths.sum()), dtype=np.float32)
    weights = np.repeat((1 - LAST_SHARE) * lengths / np.maximum(lengths - 1, 1), lengths)
    weights[np.cumsum(lengths) - 1] = LAST_SHARE * lengths
    return weights.astype(np.float32)


def matrix_names(header: Header) -> list[str]:
    """Those of the layers."""
    return [tensor.name for tensor in header.tensors if len(tensor.shape) == 2 and tensor.name.startswith("blk.")]


def vector_names(header: Header) -> list[str]:
    """Norms and biases of the layers and behind them."""
    return [t.name for t in header.tensors if len(t.shape) == 1 and t.name.startswith(("blk.", "output_norm."))]


def _bias_name(name: str) -> str:
    return name.removesuffix(".weight") + ".bias"


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def _save(path: Path, fitted: Fitted) -> None:
    arrays: dict[str, Any] = {"data": fitted.data} | ({} if fitted.bias is None else {"bias": fitted.bias})
    with writing(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def _load(path: Path) -> Fitted:
    with np.load(path) as file:
        return Fitted(file["data"], file.get("bias"))
