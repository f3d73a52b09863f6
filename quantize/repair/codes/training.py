"""The last step, which sees the true objective: scales, norms and biases are trained on the drift, and codes stay.

The layers run in torch with the values that the codes stand for. Trained are the scales of blocks (the halves `d`,
`dmin` and `m`) and the model's vectors, so that a file keeps its types and its size. The loss is 1 - cosine with the
16-bit file's vectors on the texts that chose the codes; the texts that judge say when to stop.
Source: EfficientQAT, arXiv 2407.11062, whose second stage trains scales alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from f2gguf.quantize.repair.assemble import Ready
from f2gguf.quantize.repair.codes.blocks import FORMATS, Codes, Floats, pack, unpack
from f2gguf.quantize.repair.codes.compensate import TOKEN_TABLE, matrix_names
from f2gguf.quantize.repair.codes.layers import Layer, Shape, Texts, final_norm, first_states, pooled, run_layer
from f2gguf.quantize.repair.codes.tune import Objective
from f2gguf.quantize.repair.tensors import DENSE, OnProgress, Weights, dequantized
from f2gguf.runtime.llama import packing
from f2gguf.runtime.llama.threads import default_threads
from numpy.typing import NDArray
from torch import Tensor

MAX_EPOCHS = 4
PATIENCE = 2  # epochs in a row that are no better than the best
STEP_RATE, VECTOR_RATE = 5e-4, 2e-4  # of Adam, as a part of the value
DECAY = 0.75  # of both rates after each epoch
BATCH_TOKENS = 1024  # of texts of like length
_SEED = 0
_PASSES = 6  # operations for each weight and token in a step: there, and twice on the way back, two each
_SHARE = 0.4  # of the speed of large products that a step comes to


def device() -> str:
    """Where torch computes: a GPU that it knows, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def estimated_seconds(n_weights: int, n_tokens: int, passes: int = MAX_EPOCHS * _PASSES) -> float:
    """How long `train` takes at most for `n_weights` in matrices and `n_tokens` in texts: a product is timed.

    Or what else takes `passes` operations for each weight and token.
    """
    square, side = torch.ones((2, 1024, 1024), device=device()), 1024
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        float((square[0] @ square[1])[0, 0])
        seconds.append(time.perf_counter() - begin)
    return passes * n_tokens * n_weights / (_SHARE * 2 * side**3 / min(seconds))


def n_steps(fitting: Objective) -> int:
    """How many times `train` reports progress at most."""
    return MAX_EPOCHS * len(batches_of(fitting.ids))


def train(
    weights: Weights,
    types: Mapping[str, str],
    ready: Ready,
    vectors: Mapping[str, Floats],
    *,
    fitting: Objective,
    judging: Objective,
    on_progress: OnProgress = lambda _: None,
) -> dict[str, NDArray[np.uint8]]:
    """The matrices of `ready` with trained scales, and `vectors` (name -> (n,) float32) trained, all as bytes.

    The same inputs, version and processor give the same bytes. Where no epoch lowers the drift on the texts that judge,
    all is what it was.
    """
    with threads():
        model = Model(weights, types, ready, vectors)
        batches, judged = model.batches(fitting), model.batches(judging)
        generator = torch.Generator().manual_seed(_SEED)
        optimizer = torch.optim.Adam(
            [{"params": model.scale_parts, "lr": STEP_RATE}, {"params": model.vector_parts, "lr": VECTOR_RATE}]
        )
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
        least, best, n_worse = model.drift(judged), model.copy(), 0
        for _ in range(MAX_EPOCHS):
            for i in torch.randperm(len(batches), generator=generator).tolist():
                optimizer.zero_grad()
                torch.autograd.backward(model.loss(batches[i]).mean())
                optimizer.step()
                on_progress(1)
            decay.step()
            drift = model.drift(judged)
            n_worse = 0 if drift < least else n_worse + 1
            if drift < least:
                least, best = drift, model.copy()
            elif n_worse == PATIENCE:
                break
        model.restore(best)
        return model.as_bytes()


@dataclass(frozen=True)
class _Batch:
    texts: Texts
    states: Tensor  # (n_tokens, n_embd), which enter the first layer
    target: Tensor  # (n_texts, n_embd)


class _Matrix:
    """A quantised matrix: its codes, and what its scales are multiplied by."""

    def __init__(self, data: Codes, kind: str) -> None:
        self.blocks = unpack(data, kind)
        form, offsets = self.blocks.format, self.blocks.offsets
        self._codes = _tensor(self.blocks.codes.reshape(len(data), -1, form.sub_block))
        self._levels, self._is_even = _tensor(form.levels), form.is_even
        self._steps, self._offsets = _tensor(self.blocks.steps), None if offsets is None else _tensor(offsets)
        self._n_subs = form.block // form.sub_block
        self.parts = [_part(self.blocks.d.shape) for _ in range(1 if offsets is None else 2)]

    def product(self, inputs: Tensor) -> Tensor:
        """(n_tokens, n_cols) to (n_tokens, n_rows)."""
        factors = [(1 + part).repeat_interleave(self._n_subs, 1) for part in self.parts]
        offsets = None if self._offsets is None else self._offsets * factors[1]
        result: Tensor = _Product.apply(inputs, self._steps * factors[0], offsets, self)  # type: ignore[no-untyped-call]
        return result

    def levels(self) -> Tensor:
        """The level of each code, (n_rows, n_sub_blocks, sub_block)."""
        return self._codes + self._levels[0] if self._is_even else self._levels[self._codes.int()]

    def as_bytes(self) -> Codes:
        factors = 1 + torch.cat(self.parts, dim=1).detach().cpu().numpy()
        return pack(self.blocks.with_scales(self.blocks.scales() * factors))


class _Product(torch.autograd.Function):
    """A product with a `_Matrix`, whose values are made again on the way back: codes take a quarter of their memory."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, steps: Tensor, offsets: Tensor | None, matrix: _Matrix) -> Tensor:
        ctx.save_for_backward(inputs, steps, offsets)
        ctx.matrix = matrix
        return inputs @ _values(matrix.levels(), steps, offsets).T

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        inputs, steps, offsets = ctx.saved_tensors
        levels = ctx.matrix.levels()
        of_values = (sent[0].T @ inputs).view(levels.shape)
        of_offsets = None if offsets is None else of_values.sum(-1)
        return sent[0] @ _values(levels, steps, offsets), (of_values * levels).sum(-1), of_offsets, None


def _values(levels: Tensor, steps: Tensor, offsets: Tensor | None) -> Tensor:
    """(n_rows, n_cols)."""
    values = levels * steps[..., None]
    return (values if offsets is None else values + offsets[..., None]).view(len(levels), -1)


class Model:
    """The layers with what is trained of them: factors of scales, and changes of vectors, which all begin at zero.

    Without `ready` matrices, those of the 16-bit file.
    """

    def __init__(self, weights: Weights, types: Mapping[str, str], ready: Ready, vectors: Mapping[str, Floats]) -> None:
        self.weights, self.shape = weights, Shape(weights.header)
        self.table = {TOKEN_TABLE: types[TOKEN_TABLE]} if ready else {}
        matrices = {name: data for name, data in ready.items() if name not in vectors}
        self.matrices = {name: _Matrix(data, types[name]) for name, data in matrices.items() if types[name] in FORMATS}
        others = matrices.keys() - self.matrices.keys()
        self.fixed = {name: _tensor(dequantized(matrices[name], types[name])) for name in others}
        if not ready:
            self.fixed = {name: _tensor(weights.rows(name)) for name in matrix_names(weights.header)}
        self.dense = [_tensor(weights.rows(name)) for name in sorted(weights.infos) if name.startswith(DENSE)]
        self.vectors = {name: _tensor(vector) for name, vector in vectors.items()}
        self.changes = {name: _part(vector.shape) for name, vector in vectors.items()}
        self.scale_parts = [part for matrix in self.matrices.values() for part in matrix.parts]
        self.vector_parts = list(self.changes.values())

    def batches(self, objective: Objective) -> list[_Batch]:
        found = []
        for chosen in batches_of(objective.ids):
            texts = Texts.of([objective.ids[i] for i in chosen])
            target = objective.vectors[[chosen[i] for i in texts.order]]
            found.append(_Batch(texts, self.first_states(texts), _tensor(target)))
        return found

    def first_states(self, texts: Texts) -> Tensor:
        """What enters the first layer, (n_tokens, n_embd)."""
        return _tensor(first_states(self.weights, texts, self.table))

    def loss(self, batch: _Batch) -> Tensor:
        """1 - cosine of each text, (n_texts,)."""
        return 1 - torch.nn.functional.cosine_similarity(self.rows(batch.states, batch.texts), batch.target)

    def rows(self, states: Tensor, texts: Texts) -> Tensor:
        """Vectors of any length, (n_texts, n_embd), from what enters the first layer."""
        for i in range(self.shape.n_layers):
            states = self._through(i, states, texts)
        norm = {name: self._vector(name) for name in self.vectors if name.startswith("output_norm")}
        states = final_norm(norm, states, self.shape)  # type: ignore[arg-type,assignment]
        rows = pooled(states, texts, self.weights.header.require_pooling())  # type: ignore[arg-type]
        for matrix in self.dense:
            rows = rows @ matrix.T
        return rows  # type: ignore[return-value]

    def drift(self, batches: Sequence[_Batch]) -> float:
        """The mean over all texts."""
        with torch.no_grad():
            return float(torch.cat([self.loss(batch) for batch in batches]).mean())

    def copy(self) -> list[Tensor]:
        return [part.detach().clone() for part in (*self.scale_parts, *self.vector_parts)]

    def restore(self, parts: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for part, value in zip((*self.scale_parts, *self.vector_parts), parts, strict=True):
                part.copy_(value)

    def as_bytes(self) -> dict[str, NDArray[np.uint8]]:
        made = {name: matrix.as_bytes() for name, matrix in self.matrices.items()}
        vectors = {name: self._vector(name).detach().cpu().numpy() for name in self.vectors}
        return made | {name: vector.view(np.uint8)[None] for name, vector in vectors.items()}

    def _through(self, i: int, states: Tensor, texts: Texts) -> Tensor:
        prefix = f"blk.{i}."
        own = self._own(prefix)
        layer: Layer = run_layer(own, states, texts, self.shape.at(i))  # type: ignore[arg-type]
        names, inputs = next(layer)
        while names:
            products = [self.product(f"{prefix}{name}", inputs) for name in names]  # type: ignore[arg-type]
            names, inputs = layer.send(products)
        return inputs  # type: ignore[return-value]

    def product(self, name: str, inputs: Tensor) -> Tensor:
        weight, bias = f"{name}.weight", f"{name}.bias"
        product = self.matrices[weight].product(inputs) if weight in self.matrices else inputs @ self.fixed[weight].T
        return product + self._vector(bias) if bias in self.vectors else product

    def _own(self, prefix: str) -> dict[str, Tensor]:
        """The vectors whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): self._vector(name) for name in self.vectors if name.startswith(prefix)}

    def _vector(self, name: str) -> Tensor:
        vector = self.vectors[name]
        unit = torch.maximum(vector.abs(), vector.square().mean().sqrt())  # a bias may be zero
        return vector + unit * self.changes[name]


def batches_of(ids: Sequence[packing.Ids]) -> list[list[int]]:
    """Places of the texts of each batch."""
    return list(packing.pack(list(map(len, ids)), n_tokens=BATCH_TOKENS, n_texts=BATCH_TOKENS))


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.tensor(np.ascontiguousarray(values), device=device())


def _part(shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), device=device(), requires_grad=True)


@contextlib.contextmanager
def threads() -> Iterator[None]:
    """Let torch use the cores of this process while the block runs."""
    n_before = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    try:
        yield
    finally:
        torch.set_num_threads(n_before)
