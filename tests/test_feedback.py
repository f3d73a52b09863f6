"""Blocks taken apart and put together, codes that compensate for each other's errors, layers in plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import load_texts, prompted
from f2gguf.quantize.repair.calibration import fitting, judging, layer_shapes, load_calibration, sampled, token_budget
from f2gguf.quantize.repair.codes import compiled, feedback, parallel
from f2gguf.quantize.repair.codes.blocks import FORMATS, pack, unpack
from f2gguf.quantize.repair.codes.compensate import COMPENSATED, Compensation
from f2gguf.quantize.repair.codes.feedback import choose_codes, factor
from f2gguf.quantize.repair.codes.layers import Shape, Texts, first_states, run_layer
from f2gguf.quantize.repair.recipe import arithmetic
from f2gguf.quantize.repair.tensors import Rows, Weights, as_multiplied, dequantized, quantize_rows
from f2gguf.runtime import Embedder
from f2gguf.runtime.gguf.header import read_header

RNG = np.random.default_rng(13)


@pytest.fixture(params=["compiled loops", "numpy's loops"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to choose codes."""
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0" if request.param.startswith("numpy") else "1")
    assert (compiled.library() is None) == request.param.startswith("numpy")
    return str(request.param)


def correlated(n_rows: int, n_cols: int) -> Rows:
    """Inputs whose channels depend on each other, and differ in size."""
    mix = RNG.standard_normal((n_cols, n_cols)) * RNG.lognormal(0, 1, n_cols)
    return (RNG.standard_normal((n_rows, n_cols)) @ mix / n_cols**0.5).astype(np.float32)


def matrix(n_rows: int, n_cols: int) -> Rows:
    rows = RNG.standard_normal((n_rows, n_cols)) * RNG.lognormal(0, 1, (n_rows, 1)) * 0.05
    rows[1] = 0
    rows[2, :40] = 0
    rows[3, 7] = 40 * np.abs(rows[3]).max()
    return rows.astype(np.float32)


def error(rows: Rows, values: Rows, inputs: Rows) -> float:
    return float(np.square(inputs @ (values - rows).T, dtype=np.float64).sum())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("weighed", [False, True])
def test_ggmls_own_blocks_come_out_bit_for_bit(kind: str, weighed: bool) -> None:
    rows = matrix(48, 768)
    data = quantize_rows(rows, kind, RNG.lognormal(0, 1, 768).astype(np.float32) if weighed else None)
    blocks = unpack(data, kind)
    assert np.array_equal(pack(blocks), data)
    assert np.array_equal(blocks.values(), dequantized(data, kind))
    blocks.codes = RNG.integers(0, len(FORMATS[kind].levels), blocks.codes.shape, dtype=np.uint8)
    assert np.array_equal(dequantized(pack(blocks), kind), blocks.values()), "any codes, not only ggml's"


@pytest.mark.parametrize("kind", COMPENSATED)
def test_scales_refitted_to_their_codes_lower_the_error(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rows = correlated(6000, 512), matrix(64, 512)
    moments = factor(inputs.T @ inputs / len(inputs))
    assert moments is not None
    plain = unpack(quantize_rows(rows, kind, np.diagonal(moments.matrix).copy()), kind)
    errors = []
    for n_refits in (0, 1, 2):
        monkeypatch.setattr(feedback, "N_REFITS", n_refits)
        chosen = choose_codes(rows, plain, moments)
        assert np.array_equal(unpack(pack(chosen), kind).values(), chosen.values())
        assert not chosen.values()[1].any(), "a row of zeros stays one"
        errors.append(error(rows, chosen.values(), inputs))
    assert errors[2] < 1.001 * errors[1] < 0.995 * errors[0]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kind", COMPENSATED)
def test_feedback_halves_the_error_of_the_products(kind: str) -> None:
    inputs, rows = correlated(6000, 512), matrix(64, 512)
    fit, judge = inputs[:5000], inputs[5000:]
    moments = factor(fit.T @ fit / len(fit))
    assert moments is not None
    plain = unpack(quantize_rows(rows, kind, np.diagonal(moments.matrix).copy()), kind)
    chosen = choose_codes(rows, plain, moments)
    # ggml searches longer for the scales of IQ4_XS, so that less is left to save
    most = 0.6 if kind == "IQ4_XS" else 0.5
    assert error(rows, chosen.values(), judge) < most * error(rows, plain.values(), judge)
    assert (np.abs(chosen.steps - plain.steps) <= 0.5001 * np.abs(plain.steps)).all()
    assert pack(chosen).nbytes == pack(plain).nbytes


@pytest.mark.parametrize("kind", COMPENSATED)
@pytest.mark.parametrize("n_rows", [4, 70, 128])
def test_compiled_loops_do_what_numpys_do(kind: str, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n_cols = 5 * FORMATS[kind].block  # the last panel of columns and the last rows are not full
    inputs, rows = correlated(3 * n_cols, n_cols), matrix(n_rows, n_cols)
    moments = factor(inputs.T @ inputs / len(inputs))
    assert moments is not None
    plain = unpack(quantize_rows(rows, kind), kind)
    target, grid = np.ascontiguousarray(rows.T), feedback._Grid.of(plain)
    found = []
    for setting in ("1", "0"):
        monkeypatch.setenv("F2GGUF_OWN_KERNELS", setting)
        codes = feedback._with_feedback(target, grid, moments)
        found.append((codes, feedback._polish(codes.copy(), target, grid, moments)))
    for ours, numpys in zip(*found, strict=True):
        # a sum that falls halfway between two levels may go either way, and the codes behind it with it
        assert (ours != numpys).mean() < 0.01
        errors = [error(rows, grid.values(codes).T, inputs) for codes in (ours, numpys)]
        assert errors[0] == pytest.approx(errors[1], rel=0.003)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_compiled_rounding_of_activations_has_numpys_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = correlated(700, 512)
    rows[3], rows[4, :40] = 0, 0
    rounded = as_multiplied(rows, kind)
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")
    assert np.array_equal(rounded, as_multiplied(rows, kind))
    assert 0 < np.abs(rounded - rows).max() < 0.005 * np.abs(rows).max()


def test_without_a_compiler_codes_are_chosen_by_numpy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("F2GGUF_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled, "_opened", compiled._opened.__wrapped__)
    assert compiled.library() is None
    assert "compiled" not in arithmetic()


def test_recipes_name_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that were chosen on AMX, or by other kernels of BLAS, are no part of another processor's."""
    named = {}
    for unit in ("AMX", "VNNI"):
        monkeypatch.setattr(parallel.own, "units", lambda unit=unit: unit)
        named[unit] = arithmetic()
    assert "products on AMX" in named["AMX"]
    assert "AMX" not in named["VNNI"]


@pytest.mark.usefixtures("loops")
def test_inputs_that_depend_on_nothing_leave_ggmls_rounding() -> None:
    """With the identity there is no error to make good: each code is the nearest."""
    rows = matrix(16, 256)
    moments = factor(np.eye(256, dtype=np.float32))
    assert moments is not None
    chosen = choose_codes(rows, unpack(quantize_rows(rows, "Q4_0"), "Q4_0"), moments)
    steps = np.repeat(chosen.steps, 32, axis=1)
    nearest = np.clip(np.rint(np.divide(rows, steps, out=np.zeros_like(rows), where=steps != 0)), -8, 7)
    assert np.array_equal(chosen.values(), nearest * steps)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda inputs: np.zeros_like(inputs), id="no input at all"),
        pytest.param(lambda inputs: inputs * np.where(np.arange(256) == 9, np.nan, 1).astype(np.float32), id="nan"),
        pytest.param(lambda inputs: inputs * np.float32(1e30), id="beyond float32"),
    ],
)
def test_moments_without_a_factor_are_none(change: Any) -> None:
    inputs = change(correlated(300, 256))
    with np.errstate(all="ignore"):
        assert factor(inputs.T @ inputs / len(inputs)) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda inputs: inputs[:20], id="fewer rows than columns"),
        pytest.param(lambda inputs: inputs * (np.arange(256) % 3 > 0), id="channels that are never excited"),
        pytest.param(lambda inputs: inputs * np.where(np.arange(256) == 5, 1e4, 1), id="one huge channel"),
        pytest.param(lambda inputs: np.repeat(inputs[:, :1], 256, axis=1), id="all channels the same"),
    ],
)
@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ4_NL"])
def test_hard_inputs_give_no_worse_codes(kind: str, change: Any) -> None:
    inputs, rows = change(correlated(600, 256)).astype(np.float32), matrix(32, 256)
    moments = factor(inputs.T @ inputs / len(inputs))
    assert moments is not None
    plain = unpack(quantize_rows(rows, kind, np.diagonal(moments.matrix).copy()), kind)
    values = choose_codes(rows, plain, moments).values()
    assert np.isfinite(values).all()
    assert error(rows, values, inputs) <= error(rows, plain.values(), inputs)


def token_ids(path: Path, texts: Any) -> list[Any]:
    prompts = read_header(path).prompts
    with Embedder(path, max_tokens=48) as model:
        return model.encoder.tokenize([prompted(text, prompts) for text in texts]).ids


@pytest.mark.parametrize("source", ["nano_f16", "minilm_f16"])
def test_layers_in_plain_arithmetic_give_llama_cpps_vectors(source: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(source)
    weights, shape = Weights(path), Shape(read_header(path))
    ids = token_ids(path, load_texts()[::12])
    texts = Texts.of(ids)
    states = first_states(weights, texts, {})
    for i in range(shape.n_layers):
        prefix, sent = f"blk.{i}.", None
        vectors = {
            name.removeprefix(prefix): weights.rows(name)[0]
            for name, info in weights.infos.items()
            if name.startswith(prefix) and len(info.shape) == 1
        }
        layer = run_layer(vectors, states, texts, shape.at(i))
        while True:
            names, states = layer.send(sent)
            if not names:
                break
            sent = [states @ weights.rows(f"{prefix}{n}.weight").T + vectors.get(f"{n}.bias", 0) for n in names]
    ends = np.cumsum(texts.lengths)
    if weights.header.pooling == "last":
        last = states[ends - 1]
        epsilon = shape.value("attention.layer_norm_rms_epsilon")
        pooled = (
            last / np.sqrt(np.square(last).mean(axis=1, keepdims=True) + epsilon) * weights.rows("output_norm.weight")
        )
    else:
        pooled = np.add.reduceat(states, ends - texts.lengths) / texts.lengths[:, None]
    with Embedder(path) as model:
        reference = model.encoder.compute(ids)
    assert drift(pooled, reference[list(texts.order)]).max() < 2e-6


def test_a_stopped_run_goes_on_with_the_same_bytes_on_other_cores(
    nano_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights(nano_f16)
    types = {name: "Q4_0" if len(info.shape) == 2 else info.type for name, info in weights.infos.items()}
    ids = token_ids(nano_f16, load_texts()[::9])

    def run(folder: Path, stop_after: int = 10**6) -> dict[str, Any]:
        n_done = 0

        def on_progress(_: int) -> None:
            nonlocal n_done
            if (n_done := n_done + 1) == stop_after:
                raise KeyboardInterrupt

        return Compensation(weights, ids[8:], ids[:8], {}, {}).run(types, folder, on_progress)

    monkeypatch.setattr(parallel, "default_threads", lambda: 1)
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(parallel, "default_threads", lambda: 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop_after=11)
    files = sorted((tmp_path / "stopped").iterdir())
    written = {path.name: path.stat().st_mtime_ns for path in files}
    resumed = run(tmp_path / "stopped")
    assert len(written) == 11
    assert {name: (tmp_path / "stopped" / name).stat().st_mtime_ns for name in written} == written
    assert {name: data.tobytes() for name, data in resumed.items()} == {n: d.tobytes() for n, d in whole.items()}
    assert set(whole) == {name for name in types if name.startswith("blk.") and types[name] == "Q4_0"}


def test_texts_that_judge_are_not_those_that_choose(nano_f16: Path) -> None:
    texts = load_calibration(None, ()).texts
    assert len(texts) >= 1500
    both = judging(texts), fitting(texts)
    short, long = (
        [{t.text for t in some if (t.kind == "long") == is_long} for some in both] for is_long in (False, True)
    )
    assert short[0] | short[1] == {text.text for text in texts}
    assert not short[0] & short[1]
    for own, other, joined in zip(short, short[::-1], long, strict=True):
        assert len(joined) > 10
        assert all(any(text in whole for text in own) for whole in joined), "long texts begin with their own side's"
        assert not any(text in whole for text in other for whole in joined if len(text) > 60)
    budget = token_budget(layer_shapes((tensor.name, tensor) for tensor in read_header(nano_f16).tensors))
    assert sampled(texts, budget) == texts, "a small model runs through all of them"
