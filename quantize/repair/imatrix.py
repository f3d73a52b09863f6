"""The inputs of every weight matrix over the calibration texts: the importance matrix, and rows for trials."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.evals.texts import EvalText, texts_sha256
from f2gguf.quantize.repair.calibration import LONG_TOKENS, token_ids
from f2gguf.quantize.repair.tensors import DENSE, OnProgress, Rows, Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import GGUFError, NonFiniteActivations, WrongImatrix, parsing
from f2gguf.runtime.files import sha256_file, writing
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.header import Header, read_header
from f2gguf.runtime.llama.context import read_rows
from f2gguf.runtime.llama.encoder import Encoder
from f2gguf.runtime.llama.runner import unusable
from gguf import GGUFWriter
from llama_cpp._ggml import libggml
from numpy.typing import NDArray

KEY_CALIBRATION_SHA256 = "f2gguf.calibration.sha256"
_SUMS, _COUNTS = ".in_sum2", ".counts"  # llama.cpp, tools/imatrix
_TABLES = ("sums", "counts", "samples", "strides")  # fields of `Activations`
_SAMPLE_BYTES = 256_000_000  # for all sampled rows of a model
_SAVE_EVERY_S = 30.0
_BATCH_TEXTS = 32

libggml.ggml_op_name.argtypes = [ctypes.c_int]
libggml.ggml_op_name.restype = ctypes.c_char_p


class _Tensor(ctypes.Structure):
    """The first fields of struct ggml_tensor (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


@dataclass
class Activations:
    """Inputs of a model's matrix products over the calibration texts.

    Matrices that read the same input (q, k and v; gate and up) share one entry under the name of the first.
    """

    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # (n_cols,) sums of squares
    counts: dict[str, int] = field(default_factory=dict)  # rows in the sums
    samples: dict[str, Rows] = field(default_factory=dict)  # (n_rows, n_cols), evenly spread over all rows
    strides: dict[str, int] = field(default_factory=dict)  # one row in so many is in the samples
    readers: dict[str, str] = field(default_factory=dict)  # matrix -> the entry that holds its input
    vectors: list[NDArray[np.float32]] = field(default_factory=list)  # of the texts so far, each (n_embd,)

    def inputs(self, name: str) -> Rows:
        """Sampled inputs of a matrix, (n_rows, n_cols)."""
        return self.samples[self.readers[name]]


class _Collector:
    """Sees every product with a weight matrix, and adds up the inputs (see `context.Watch`)."""

    def __init__(self, header: Header, activations: Activations) -> None:
        self.activations = activations
        self.faults: list[str] = []
        self._widths = _matrices(header)
        self._n_samples = max(64, min(512, _SAMPLE_BYTES // (4 * sum(self._widths.values()))))
        self._entries: dict[int, str] = {}  # address of an input of this pass -> its entry
        self._names: set[str] = set()  # matrices of this pass

    def wants(self, address: int) -> bool:
        tensor = _Tensor.from_address(address)
        if libggml.ggml_op_name(tensor.op) != b"MUL_MAT":
            return False
        name = libggml.ggml_get_name(tensor.src[0]).decode()
        if name not in self._widths:
            return False
        if name in self._names:  # the next pass begins
            self._names.clear()
            self._entries.clear()
        self._names.add(name)
        self.activations.readers[name] = self._entries.setdefault(tensor.src[1], name)
        return bool(self.activations.readers[name] == name)

    def take(self, address: int) -> None:
        tensor = _Tensor.from_address(address)
        name = libggml.ggml_get_name(tensor.src[0]).decode()
        n_cols = self._widths[name]
        rows = read_rows(tensor.src[1])
        if rows.size % n_cols or _Tensor.from_address(tensor.src[1]).ne[0] != n_cols:
            self.faults.append(f"{name} (its input is not {n_cols} wide)")
            return
        rows = rows.reshape(-1, n_cols)
        squares = np.square(rows, dtype=np.float64).sum(axis=0)
        if np.isfinite(squares).all():
            self._add(name, rows, squares)
        else:
            self.faults.append(name)

    def _add(self, name: str, rows: Rows, squares: NDArray[np.float64]) -> None:
        into = self.activations
        n_before, stride = into.counts.get(name, 0), into.strides.get(name, 1)
        samples = np.concatenate([into.samples.get(name, rows[:0]), rows[-n_before % stride :: stride]])
        while len(samples) > self._n_samples:
            samples, stride = samples[::2], 2 * stride
        into.sums[name] = into.sums.get(name, 0.0) + squares
        into.counts[name], into.strides[name], into.samples[name] = n_before + len(rows), stride, samples


def _matrices(header: Header) -> dict[str, int]:
    """Every matrix of the layers, and behind the pooling -> the number of its columns."""
    return {t.name: t.shape[-1] for t in header.tensors if len(t.shape) == 2 and t.name.startswith(("blk.", DENSE))}


def collect(
    source: Path,
    texts: Sequence[EvalText],
    *,
    device: str,
    state_path: Path | None = None,
    on_progress: OnProgress = lambda _: None,
) -> tuple[Activations, Rows]:
    """Run `texts` through the model of `source`; gives the inputs of its matrices, and the vectors (n_texts, n_embd).

    Prompts and pooling are the model's own. Texts are cut (`token_ids`). Results are saved at `state_path`, and another
    call goes on from there. Raises `NonFiniteActivations`, which names tensor and text.
    """
    stamp = f"{sha256_file(source)} {texts_sha256(texts)}"
    activations = _restore(state_path, stamp) or Activations()
    header, saved, n_before = read_header(source), time.monotonic(), len(activations.vectors)
    collector = _Collector(header, activations)
    on_progress(n_before)
    max_tokens = min(LONG_TOKENS, header.max_tokens)
    with Embedder(source, device=device, watch=collector, max_tokens=max_tokens) as model:
        for first in range(n_before, len(texts), _BATCH_TEXTS):
            batch = texts[first : first + _BATCH_TEXTS]
            activations.vectors.extend(_embed(model.encoder, batch, collector))
            is_last = len(activations.vectors) == len(texts)
            if state_path and (is_last or time.monotonic() - saved > _SAVE_EVERY_S):
                _save(state_path, stamp, activations)
                saved = time.monotonic()
            on_progress(len(batch))
    return activations, np.stack(activations.vectors)


def _embed(encoder: Encoder, texts: Sequence[EvalText], collector: _Collector) -> Rows:
    rows = encoder.finish(encoder.compute(token_ids(encoder, texts)), width=encoder.header.n_embd)
    if bad := unusable(rows):
        collector.faults.append("the vector")
        texts = [texts[i] for i in bad]
    if not collector.faults:
        return rows
    name = collector.faults[0]
    if len(texts) > 1:
        for text in texts:  # to name the text
            collector.faults.clear()
            _embed(encoder, [text], collector)
    raise NonFiniteActivations(
        f"{encoder.header.path}: {name} meets values that are not finite, on the calibration text {texts[0].id} "
        f"({texts[0].text[:60]!r}). Take the text out (--calibration), or convert with --dtype bf16."
    )


def write_imatrix(path: Path, activations: Activations, source: Header, texts: Sequence[EvalText]) -> None:
    """Write the importance matrix in the format of llama.cpp's llama-imatrix, which llama-quantize reads."""
    with writing(path) as part:
        writer = GGUFWriter(part, arch="")
        writer.kv_data[0].clear()  # an imatrix has no architecture
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [f"f2gguf calibration, {len(texts)} texts"])
        writer.add_uint32("imatrix.chunk_count", len(texts))
        writer.add_uint32("imatrix.chunk_size", LONG_TOKENS)
        writer.add_string(keys.KEY_SOURCE_SHA256, str(source.values.get(keys.KEY_SOURCE_SHA256, "")))
        writer.add_string(KEY_CALIBRATION_SHA256, texts_sha256(texts))
        for name in sorted(activations.readers):
            entry = activations.readers[name]
            writer.add_tensor(name + _SUMS, activations.sums[entry].astype(np.float32)[None])
            writer.add_tensor(name + _COUNTS, np.array([[activations.counts[entry]]], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path, source: Weights) -> dict[str, Rows]:
    """Mean squares of every matrix's input channels, (n_cols,) each, from an imatrix of f2gguf or of llama.cpp.

    Raises `WrongImatrix` for the imatrix of another model, or a file of another kind.
    """
    weights = Weights(path)
    if weights.header.values.get("general.type") != "imatrix":
        old = " One in the old .dat format: llama-imatrix --in-file OLD -o NEW.gguf." if path.suffix == ".dat" else ""
        raise WrongImatrix(f"{path}: is no importance matrix (--imatrix).{old} Make one: quantize imatrix SOURCE.")
    made_for, ours = (h.values.get(keys.KEY_SOURCE_SHA256) for h in (weights.header, source.header))
    if made_for and ours and made_for != ours:
        raise WrongImatrix(f"{path}: was made for another model than {source.header.path} (--imatrix).")
    with parsing(path, WrongImatrix, "Make it again: quantize imatrix SOURCE."):
        names = [name.removesuffix(_SUMS) for name in weights.infos if name.endswith(_SUMS)]
        imatrix = {name: (weights.rows(name + _SUMS) / weights.rows(name + _COUNTS))[0] for name in names}
    for name, n_cols in _matrices(source.header).items():
        if name.startswith(DENSE) and name not in imatrix:
            continue  # llama.cpp's own has none of them
        if name not in imatrix or len(imatrix[name]) != n_cols:
            flaw = f"has {len(imatrix[name])} columns of {name}" if name in imatrix else f"has no {name}"
            raise WrongImatrix(f"{path}: {flaw}, so it is of another model than {source.header.path} (--imatrix).")
    for name, row in imatrix.items():
        if not (np.isfinite(row).all() and (row >= 0).all()):
            raise WrongImatrix(f"{path}: {name} holds values that are no mean squares. Make it again.")
    return imatrix


def _save(path: Path, stamp: str, activations: Activations) -> None:
    arrays: dict[str, Any] = {
        f"{table}/{name}": value for table in _TABLES for name, value in getattr(activations, table).items()
    }
    vectors = np.stack(activations.vectors)
    with writing(path) as part, part.open("wb") as file:
        np.savez(file, stamp=np.array(stamp), readers=list(activations.readers.items()), vectors=vectors, **arrays)


def _restore(path: Path | None, stamp: str) -> Activations | None:
    """What an earlier, interrupted call has saved for the same file and texts; None if there is nothing."""
    if path is None or not path.exists():
        return None
    with parsing(path, GGUFError, "Remove it, and run the command again."), np.load(path) as file:
        if str(file["stamp"]) != stamp:
            return None
        activations = Activations(readers=dict(file["readers"].tolist()), vectors=list(file["vectors"]))
        for key in file:
            table, _, name = key.partition("/")
            if table in _TABLES:
                getattr(activations, table)[name] = file[key] if file[key].ndim else file[key].item()
    return activations
