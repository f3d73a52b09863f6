"""How much each token of the calibration texts counts for each matrix: by the gradients of the texts' vectors.

An error in what a matrix gives for a token changes a text's vector as its gradient says. With random signs u, the
gradient g of u . v, where v is a text's vector of length 1, has the mean square of what an error of any direction does.
Weights are the roots of these squares: the squares themselves leave too few tokens for the second moments.
Source: GuidedQuant, arXiv 2505.07004.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from f2gguf.quantize.repair.codes.blocks import Floats
from f2gguf.quantize.repair.codes.compensate import matrix_names, vector_names
from f2gguf.quantize.repair.codes.layers import Texts
from f2gguf.quantize.repair.codes.training import Model, batches_of, threads
from f2gguf.quantize.repair.tensors import OnProgress, Weights
from f2gguf.runtime.llama.packing import Ids
from torch import Tensor

N_PROBES = 2  # random signs for each text
POWER = 0.5  # of the mean square of a token's gradients
PASSES = 2 + 4 * N_PROBES  # operations for each weight and token: there, and twice on the way back of each probe
_SEED = 0


def n_steps(fitting: Sequence[Ids]) -> int:
    """How many times `gradient_weights` reports progress."""
    return len(batches_of(fitting))


def gradient_weights(
    weights: Weights, fitting: Sequence[Ids], on_progress: OnProgress = lambda _: None
) -> dict[str, Floats]:
    """Of each matrix, how much each token counts: (n_tokens of all texts in their order,), 1 on average."""
    starts = np.concatenate([[0], np.cumsum(list(map(len, fitting)))])
    squares = {name: np.zeros(starts[-1]) for name in matrix_names(weights.header)}
    generator = torch.Generator().manual_seed(_SEED)
    with threads():
        model = _Watched(weights)
        for chosen in batches_of(fitting):
            texts = Texts.of([fitting[i] for i in chosen])
            places = np.concatenate([np.arange(starts[chosen[i]], starts[chosen[i] + 1]) for i in texts.order])
            for name, found in model.squares(texts, generator).items():
                squares[name][places] = found
            on_progress(1)
    return {name: _normalised(found) for name, found in squares.items()}


class _Watched(Model):
    """The model of the 16-bit file, which keeps what its matrices give."""

    def __init__(self, weights: Weights) -> None:
        vectors = {name: weights.rows(name)[0] for name in vector_names(weights.header)}
        super().__init__(weights, {}, {}, vectors)
        self._products: dict[str, Tensor] = {}

    def product(self, name: str, inputs: Tensor) -> Tensor:
        self._products[f"{name}.weight"] = product = super().product(name, inputs)
        return product

    def squares(self, texts: Texts, generator: torch.Generator) -> dict[str, Floats]:
        """Of each matrix, the mean square of each token's gradient, (n_tokens,)."""
        vectors = torch.nn.functional.normalize(self.rows(self.first_states(texts).requires_grad_(), texts))
        products, self._products = self._products, {}
        squares = {name: np.zeros(len(product), dtype=np.float32) for name, product in products.items()}
        for i in range(N_PROBES):
            signs = 2.0 * torch.randint(0, 2, vectors.shape, generator=generator).to(vectors) - 1
            loss = (signs * vectors).sum()
            gradients = torch.autograd.grad(loss, list(products.values()), retain_graph=i + 1 < N_PROBES)
            for name, gradient in zip(products, gradients, strict=True):
                squares[name] += gradient.square().sum(dim=1).cpu().numpy() / N_PROBES
        return squares


def _normalised(squares: Floats) -> Floats:
    roots: Floats = (squares**POWER).astype(np.float32)
    roots /= max(roots.mean(), np.finfo(np.float32).tiny)
    return roots
