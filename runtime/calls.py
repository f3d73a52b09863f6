"""The arguments of sentence-transformers' `encode`: texts as a list, and what an `Embedder` can do with the others."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, SupportsIndex

import numpy as np
from f2gguf.runtime.errors import ExtraMissing, TextError, WrongUsage
from numpy.typing import NDArray

Texts = str | Iterable[str]
Vectors = NDArray[np.floating[Any]]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 40


def texts_of(inputs: Any) -> list[str]:
    """The texts as a list: a single one, or those of a list, tuple, generator, numpy array or column of a table.

    Raises `TextError` for anything else, such as the NaN of an empty cell, with its number and type.
    """
    if isinstance(inputs, str):
        return [inputs]
    # Of these Python would take the keys, the names of the columns, the numbers of the bytes, or any order
    is_one = isinstance(inputs, Mapping | set | frozenset | bytes | bytearray) or getattr(inputs, "ndim", 1) != 1
    if is_one or not isinstance(inputs, Iterable):
        raise TextError(f"the input is no text and no list of texts, but {described(inputs)}. Pass strings.")
    texts = list(inputs)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextError(f"text {i + 1} of {len(texts)}: is no text, but {described(text)}. Pass strings.")
    return texts


def require_call(*, batch_size: int, output_value: str | None) -> None:
    """Raise `WrongUsage` for what a `SentenceTransformer` can do and an `Embedder` cannot."""
    if not isinstance(batch_size, SupportsIndex) or batch_size < 1:
        raise WrongUsage(f"batch_size is {batch_size!r}: it must be positive. (f2gguf packs batches by tokens itself.)")
    if output_value != "sentence_embedding":
        raise WrongUsage(
            f"output_value is {output_value!r}: f2gguf gives one vector for each text, 'sentence_embedding'."
        )


def require_device(device: Any, in_use: str) -> None:
    """Raise `WrongUsage` unless `device` is None, or names the device `in_use` as torch or f2gguf do ('cuda:0')."""
    if device is None:
        return
    name = str(device).removesuffix(":0")
    if name not in ("auto", in_use) and (name, in_use) != ("metal", "mps"):
        raise WrongUsage(
            f"device is {str(device)!r}: this Embedder computes on {in_use!r}, and stays there. Leave the argument "
            "out, or open another one: Embedder(path, device=...)."
        )


@contextlib.contextmanager
def progress_bar(n_texts: int, on_progress: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or in a notebook. Gives the function that advances it, and tells `on_progress` as well."""
    from tqdm.auto import tqdm

    with tqdm(total=n_texts, desc="Texts", unit=" texts") as bar:

        def advance(n: int) -> None:
            bar.update(n)
            if on_progress:
                on_progress(n)

        yield advance


def require_torch() -> None:
    """Raise `ExtraMissing` unless there is torch."""
    if not find_spec("torch"):
        raise ExtraMissing("torch is not installed, and only torch has tensors. Run: pip install torch")


def as_tensors(vectors: Vectors, *, one: bool) -> Any:
    """A torch tensor (n_texts, n_dims), or with `one=False` a list of tensors (n_dims,)."""
    import torch

    tensor = torch.from_numpy(vectors)
    return tensor if one else list(tensor)


def described(value: Any) -> str:
    """A value for an error: nan -> 'nan of type float'."""
    return f"{' '.join(_SHORT.repr(value).split())} of type {type(value).__name__}"
