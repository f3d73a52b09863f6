"""Scales, norms and biases that are trained on the drift, with codes as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_tiny, write_tiny_bert
from conftest import Run, facts_of
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.repair import study as studies
from f2gguf.quantize.repair.calibration import PATH
from f2gguf.quantize.repair.codes import gradients, training
from f2gguf.quantize.repair.codes import tune as tuning
from f2gguf.quantize.repair.codes.blocks import unpack
from f2gguf.quantize.repair.codes.compensate import vector_names
from f2gguf.quantize.repair.codes.gradients import gradient_weights
from f2gguf.quantize.repair.codes.layers import Texts
from f2gguf.quantize.repair.codes.tune import tuning_arithmetic
from f2gguf.quantize.repair.recipe import Recipe, make
from f2gguf.quantize.repair.search import Search
from f2gguf.quantize.repair.study import Study, study_source, vectors_of
from f2gguf.runtime.errors import ExtraMissing

WRITERS = {"qwen3": write_tiny, "bert": write_tiny_bert}


@pytest.fixture(scope="module", params=WRITERS)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "tiny-F16.gguf"
    convert(facts_of(WRITERS[request.param](folder / "tiny")), source)
    texts = load_texts(PATH)[::16]
    return study_source(source, imatrix_path=folder / "x.imatrix.gguf", work=folder / "work", texts=texts, device="cpu")


@pytest.fixture(scope="module", params=["Q4_0", "Q4_K_M"])
def recipe(request: pytest.FixtureRequest, study: Study) -> Recipe:
    return replace(study.recipe(request.param), compensated="tried")


def tuned(recipe: Recipe) -> Recipe:
    return replace(recipe, tuned=tuning_arithmetic())


def drift_of(study: Study, recipe: Recipe, ready: studies.Ready, path: Path) -> float:
    make(study.weights, path, recipe, study.imatrix, ready=ready)
    return float(drift(vectors_of(path, study.judged.ids, "cpu"), study.judged.reference).mean())


def test_training_lowers_the_drift_of_the_file_and_moves_no_code(study: Study, recipe: Recipe, tmp_path: Path) -> None:
    types, before, after = study.types(recipe), study.ready(recipe), study.ready(tuned(recipe))
    drifts = [drift_of(study, recipe, ready, tmp_path / "x.gguf") for ready in (before, after)]
    # Q4_0 gains 10% here. Random weights in Q4_K_M gain 0 to 5%, by how products happen to be rounded.
    assert drifts[1] < drifts[0] * (1 if recipe.variant == "Q4_0" else 1.01)
    assert after.keys() >= before.keys()
    n_trained = 0
    for name in before:
        assert after[name].nbytes == before[name].nbytes
        if name.endswith(".weight") and types[name] != "F16":
            old, new = unpack(before[name], types[name]), unpack(after[name], types[name])
            assert np.array_equal(old.codes, new.codes)
            n_trained += not np.array_equal(old.d, new.d)
    assert n_trained >= len(study.compensation(recipe).matrices) / 2
    assert any(name.endswith("norm.weight") for name in after)


def test_the_model_that_is_trained_is_the_file(study: Study, recipe: Recipe, tmp_path: Path) -> None:
    """torch's layers give the vectors that llama.cpp gives, but for the rounding of activations."""
    ready = study.ready(recipe)
    make(study.weights, tmp_path / "x.gguf", recipe, study.imatrix, ready=ready)
    vectors = vectors_of(tmp_path / "x.gguf", study.judged.ids, "cpu")
    compensation = study.compensation(recipe)
    names = vector_names(study.weights.header)
    own = {n: ready[n].view(np.float32)[0] if n in ready else compensation.vector(n) for n in names}
    model = training.Model(study.weights, study.types(recipe), ready, own)
    assert model.drift(model.batches(training.Objective(study.judged.ids, vectors))) < 1e-3


def test_the_same_recipe_gives_the_same_bytes_again(study: Study, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tuned(recipe), weighed=tuning_arithmetic())
    first, again = study.ready(recipe), replace(study, work=tmp_path).ready(recipe)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_where_no_epoch_helps_nothing_changes(study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "STEP_RATE", 10.0)
    monkeypatch.setattr(training, "VECTOR_RATE", 10.0)
    recipe = replace(study.recipe("Q4_0"), compensated="tried")
    before, after = study.ready(recipe), replace(study, work=tmp_path).ready(tuned(recipe))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_search_tunes_where_it_is_wanted_or_quick(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Search(replace(study, tune=True), "Q4_0")
    recipe = found.tuned(found.start.recipe)
    assert recipe.tuned == recipe.weighed == tuning_arithmetic()
    assert "tuned" in recipe.kind
    plain = Search(replace(study, tune=False), "Q4_0")
    assert plain.start.recipe.weighed == ""
    assert plain.tuned(found.start.recipe) == found.start.recipe
    assert Search(study, "Q4_0").tuned(found.start.recipe) == recipe
    monkeypatch.setattr(tuning, "MAX_MINUTES", 0)
    assert Search(replace(study, work=tmp_path), "Q4_0").tuned(found.start.recipe) == found.start.recipe
    plain = study.recipe("Q4_0")
    assert Search(replace(study, tune=True), "Q4_0").tuned(plain) == plain


def test_what_tuning_would_take_is_said(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "estimated_seconds", lambda *_: 3600.0)
    fresh = replace(study, work=tmp_path)
    assert (fresh.weighs, fresh.trains) == (False, False)
    said = capsys.readouterr().err
    assert "tokens are not weighed by gradients, which would take about 60 minutes here (--tune)" in said
    assert "scales are not trained, which would take about 60 minutes here (--tune)" in said
    monkeypatch.setattr(training, "estimated_seconds", lambda *_: 1.0)
    resumed = replace(fresh)
    assert (resumed.weighs, resumed.trains) == (False, False), "a run that goes on does as it began"


def test_weights_of_tokens_say_what_an_error_there_does(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean square of what errors of random directions change in the vector, for each token of one text."""
    monkeypatch.setattr(gradients, "N_PROBES", 64)
    ids = max(study.fitting, key=len)[:12]
    texts, name = Texts.of([ids]), "blk.0.ffn_down"
    squares = gradient_weights(study.weights, [ids])[f"{name}.weight"] ** (1 / gradients.POWER)
    model, generator = gradients._Watched(study.weights), torch.Generator().manual_seed(1)

    def vector(token: int, error: torch.Tensor | None) -> torch.Tensor:
        def product(asked: str, inputs: torch.Tensor, own: Callable[..., torch.Tensor] = model.product) -> torch.Tensor:
            found = own(asked, inputs)
            if error is not None and asked == name:
                found = found + error * torch.eye(len(ids))[token, :, None]
            return found

        with monkeypatch.context() as watched, torch.no_grad():
            watched.setattr(model, "product", product)
            return torch.nn.functional.normalize(model.rows(model.first_states(texts), texts))[0]

    whole, width = vector(0, None), study.weights.header.n_embd
    changes = []
    for token in range(len(ids)):
        errors = 1e-3 * torch.randn((64, width), generator=generator)
        changes.append(np.mean([float((vector(token, error) - whole).square().sum()) for error in errors]))
    np.testing.assert_allclose(squares / squares.sum(), np.array(changes) / sum(changes), atol=0.1)
    assert np.corrcoef(squares, changes)[0, 1] > 0.9


def test_weights_of_tokens_depend_on_their_text_alone(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the random signs, of which there are many here."""
    monkeypatch.setattr(gradients, "N_PROBES", 64)
    some = sorted(study.fitting, key=len)[:5]
    found = [gradient_weights(study.weights, texts) for texts in (some, some[::-1])]
    for name, values in found[0].items():
        assert values.mean() == pytest.approx(1, abs=1e-4)
        backwards = np.split(found[1][name], np.cumsum(list(map(len, some[::-1])))[:-1])
        np.testing.assert_allclose(values, np.concatenate(backwards[::-1]), rtol=0.35, atol=0.1)


def test_weights_of_tokens_choose_other_codes(study: Study, recipe: Recipe, tmp_path: Path) -> None:
    drifts = [
        drift_of(study, one, study.ready(one), tmp_path / "x.gguf")
        for one in (recipe, replace(recipe, weighed=tuning_arithmetic()))
    ]
    assert drifts[0] != drifts[1] < 1.5 * drifts[0], "on a random model with few texts, either may be better"


def test_the_estimate_grows_with_the_work() -> None:
    few, many = (training.estimated_seconds(10**9, n) for n in (1000, 100_000))
    assert 20 * few < many < 500 * few


def test_without_torch(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(tuning, "find_spec", lambda name: None if name == "torch" else find(name))
    assert not replace(study, work=tmp_path).trains
    with pytest.raises(ExtraMissing, match="--tune trains scales, which takes torch"):
        _ = replace(study, work=tmp_path, tune=True).trains
    with pytest.raises(ExtraMissing, match=r"x, which takes torch. Run: pip install 'f2gguf\[evals\]'"):
        tuning.require_torch("x")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tune", "--stock"], "--stock and --tune: choose one"),
        (["--tune", "--no-compensate"], "--no-compensate and --tune: choose one"),
    ],
)
def test_flags_that_leave_nothing_to_tune(run: Run, flags: list[str], expected: str) -> None:
    process = run("quantize", "all", "f2llm-nano", *flags)
    assert process.returncode == 2
    assert expected in process.stderr


@pytest.mark.parametrize("flag", ["--tune", "--no-tune"])
def test_a_recipe_says_itself_whether_scales_are_trained(run: Run, nano_f16: Path, tmp_path: Path, flag: str) -> None:
    process = run("quantize", "variant", nano_f16, "Q4_0", "--recipe", nano_f16, flag, "-o", tmp_path / "x.gguf")
    assert process.returncode == 2
    assert f"--recipe and {flag}: choose one" in process.stderr
