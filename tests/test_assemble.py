"""Files put together by ggml's own quantiser: the bytes of llama.cpp's, and nothing lost from the header."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from f2gguf.quantize.repair.assemble import Scale, assemble
from f2gguf.quantize.repair.plan import VARIANTS, plan_variant
from f2gguf.quantize.repair.tensors import Weights, as_multiplied, as_stored, quantize_rows
from f2gguf.runtime.errors import QuantizationFailed
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.header import KEY_SEAL, read_header

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("source", ["nano_f16", "small_bert_f16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_those_of_llama_model_quantize(
    source: str, variant: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(source)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = VARIANTS[variant]
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    assert llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(theirs), ctypes.byref(params)) == 0
    types = {tensor.name: tensor.new_type for tensor in plan_variant(path, variant).tensors}
    stated = {"general.file_type": int(VARIANTS[variant]), "general.quantization_version": 2}
    assemble(Weights(path), ours, types, header=stated)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert unsealed(ours) == unsealed(theirs)
    assert (is_sealed(read_header(ours)), is_sealed(read_header(theirs))) == (True, False)


@pytest.mark.slow
def test_importance_matrix_gives_the_bytes_that_llama_model_quantize_gives(nano_f16: Path, tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"
    row = RNG.uniform(0.1, 10, 768).astype(np.float32)
    data = (llama_cpp.llama_model_imatrix_data * 2)()
    data[0].name, data[0].size = name.encode(), len(row)
    data[0].data = row.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.imatrix = VARIANTS["Q4_K_M"], data
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    assert llama_cpp.llama_model_quantize(os.fsencode(nano_f16), os.fsencode(theirs), ctypes.byref(params)) == 0
    types = {tensor.name: tensor.new_type for tensor in plan_variant(nano_f16, "Q4_K_M").tensors}
    assemble(Weights(nano_f16), ours, types, header={}, imatrix={name: row})
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assemble(Weights(nano_f16), ours, types, header={})
    differing = {name for name, data in tensor_bytes(ours).items() if data != tensor_bytes(theirs)[name]}
    assert differing == {name}


def test_importance_matrix_that_changes_nothing_is_refused(
    nano_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build of llama.cpp would, whose quantiser leaves it out."""
    name = "blk.0.ffn_up.weight"
    monkeypatch.setattr(
        "f2gguf.quantize.repair.assemble.quantize_rows", lambda rows, kind, _=None: quantize_rows(rows, kind)
    )
    types = {tensor.name: tensor.new_type for tensor in plan_variant(nano_f16, "Q4_0").tensors}
    with pytest.raises(QuantizationFailed, match=r"blk\.0\.ffn_up\.weight: the importance matrix changes no byte"):
        assemble(Weights(nano_f16), tmp_path / "x.gguf", types, header={}, imatrix={name: np.ones(256, np.float32)})


def test_header_values_are_added_and_replaced(nano_f16: Path, tmp_path: Path) -> None:
    types = {tensor.name: tensor.type for tensor in read_header(nano_f16).tensors}
    added = {
        "general.name": "another",
        "f2gguf.text": "ß\n",
        "f2gguf.flag": True,
        "f2gguf.count": 7,
        "f2gguf.part": 0.5,
    }
    assemble(Weights(nano_f16), tmp_path / "x.gguf", types, header=added)
    assert unsealed(tmp_path / "x.gguf") == {**unsealed(nano_f16), **added}
    assert is_sealed(read_header(tmp_path / "x.gguf"))
    assert tensor_bytes(tmp_path / "x.gguf") == tensor_bytes(nano_f16)


def test_scales_meet_every_row_and_column(nano_f16: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_k.weight"
    rows, columns = (2.0 ** RNG.integers(-3, 4, n) for n in (128, 256))
    scale = Scale(rows.astype(np.float32), columns.astype(np.float32))
    types = {tensor.name: tensor.type for tensor in read_header(nano_f16).tensors}
    assemble(Weights(nano_f16), tmp_path / "x.gguf", types, header={}, scales={name: scale})
    before, after = (Weights(path).rows(name) for path in (nano_f16, tmp_path / "x.gguf"))
    assert np.allclose(after, before * rows[:, None] * columns, rtol=0, atol=2**-25), "F16 rounds its subnormals"


def test_values_that_fit_no_block_are_refused() -> None:
    rows = np.ones((2, 256), dtype=np.float32)
    rows[1, 3] = np.inf
    with pytest.raises(QuantizationFailed, match="do not fit Q8_0"):
        quantize_rows(rows, "Q8_0")


def test_types_with_more_bits_are_nearer() -> None:
    rows = RNG.standard_normal((16, 256), dtype=np.float32)
    errors = [np.square(as_stored(rows, kind) - rows).sum() for kind in ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")]
    assert errors == sorted(errors, reverse=True)


def test_an_outlier_takes_the_precision_of_its_block() -> None:
    rows = np.full((1, 512), 0.01, dtype=np.float32)
    rows[0, 0] = 100
    small = as_multiplied(rows, "Q4_0") == 0
    assert small.sum() == 31, "Q4_0 is multiplied with blocks of 32"
    assert (as_multiplied(rows, "Q4_K") == 0).sum() == 255, "K-quants with blocks of 256"
    assert np.array_equal(as_multiplied(rows, "F16"), rows)


def tensor_bytes(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {t.name: data[t.begin : t.begin + t.size_bytes] for t in read_header(path).tensors}


def unsealed(path: Path) -> dict[str, object]:
    return {key: value for key, value in read_header(path).values.items() if key != KEY_SEAL}
