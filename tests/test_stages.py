"""A stage of `quantize all` is done again when, and only when, what it is made from has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json, edit_tensors, tiny_tensors, write_tiny
from conftest import contents, facts_of
from f2gguf.evals.texts import load_texts
from f2gguf.quantize import job as job_module
from f2gguf.quantize import pipeline
from f2gguf.quantize.convert import gate
from f2gguf.quantize.job import Job
from f2gguf.quantize.pipeline import make_release
from f2gguf.quantize.release.check import read_release
from f2gguf.quantize.release.write import write_release
from f2gguf.quantize.repair import calibration, search, study
from f2gguf.quantize.report import picture
from f2gguf.quantize.report.report import Report, read_report, write_report
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import OutputError, UnfitRelease, WrongUsage
from f2gguf.runtime.gguf.describe import describe
from f2gguf.runtime.gguf.header import read_header

SOME = {
    "repo": "org/tiny",
    "revision": "a" * 40,
    "license": "mit",
    "languages": ("en", "de"),
    "max_tokens": 512,
    "matryoshka_dims": (16,),
    "prompts": {"title": "title: "},
}
CONVERT, GATE_1, MAKE = "convert", "gate 1", "make Q8_0"
ALL = {CONVERT, GATE_1, MAKE}
TEXTS = tuple(text for text in load_texts() if text.kind != "long" and text.language in ("en", "de", "und"))[:24]
Change = Callable[
    [Path], dict[str, Any]
]  # of the checkpoint's folder; gives what else is stated, or options of the job


def facts_stated(folder: Path, **stated: Any) -> Facts:
    return facts_of(folder, **{**SOME, **stated})


class Runs:
    """Runs of `quantize all` on one checkpoint and one folder, and the stages that each did."""

    def __init__(self, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.stages = folder, out, set[str]()
        monkeypatch.setattr(pipeline, "load_texts", lambda: TEXTS)
        monkeypatch.setattr(calibration, "N_SPLICED", 0)
        monkeypatch.setattr(study, "_budget", lambda _weights: 8_000.0)  # of tokens: a tenth of all texts
        monkeypatch.setattr(picture, "find_spec", lambda _name: None)  # drawing would take most of the time
        self._spy(monkeypatch, pipeline, "convert", lambda *_: CONVERT)
        self._spy(monkeypatch, gate, "check_conversion", lambda *_: GATE_1)
        for module in (pipeline, search):
            self._spy(
                monkeypatch, module, "make_measured", lambda _weights, _path, recipe, *_: f"make {recipe.variant}"
            )

    def _spy(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, stage: Callable[..., str]) -> None:
        real = getattr(module, name)

        def spied(*arguments: Any, **options: Any) -> Any:
            self.stages.add(stage(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, spied)

    def __call__(self, *, variants: tuple[str, ...] = ("Q8_0",), **changes: Any) -> Report:
        """One run with the facts and options in `changes`; `stages` are those that it did."""
        self.stages.clear()
        fields = Job.__dataclass_fields__
        options: dict[str, Any] = {"max_drift": 1.9, "stock": True, "tune": False}
        options |= {name: changes.pop(name) for name in fields if name in changes}
        pooling = changes.pop("pooling", None)
        facts = facts_stated(self.folder, **changes)
        job = Job(replace(facts, pooling=pooling or facts.pooling), self.out, device="cpu", **options)
        return make_release(job, variants)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the release of a first run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs = Runs(write_tiny(folder / "tiny"), folder / "dist", monkeypatch)
        runs()
        assert runs.stages == ALL
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    shutil.copytree(finished, tmp_path / "copy")
    return Runs(tmp_path / "copy" / "tiny", tmp_path / "copy" / "dist", monkeypatch)


def weights(folder: Path) -> dict[str, Any]:
    edit_tensors(folder, norm__weight=tiny_tensors(seed=1)["norm.weight"])
    return {}


def tokenizer(folder: Path) -> dict[str, Any]:
    edit_json(folder / "tokenizer_config.json", chat_template="{{ x }}")
    return {}


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        pytest.param(lambda _: {}, set(), id="nothing"),
        pytest.param(weights, ALL, id="weights"),
        pytest.param(tokenizer, ALL, id="tokenizer"),
        pytest.param(lambda _: {"revision": "b" * 40}, ALL, id="revision"),
        pytest.param(lambda _: {"license": "apache-2.0"}, ALL, id="license"),
        pytest.param(lambda _: {"languages": ("en",)}, ALL, id="languages"),
        pytest.param(lambda _: {"max_tokens": 256}, ALL, id="max_tokens"),
        pytest.param(lambda _: {"matryoshka_dims": (8, 16)}, ALL, id="dims"),
        pytest.param(lambda _: {"prompts": {"title": "Title: "}}, ALL, id="prompts"),
        pytest.param(lambda _: {"pooling": "mean"}, ALL, id="pooling"),
        pytest.param(lambda _: {"force": True}, ALL, id="force"),
        pytest.param(lambda _: {"max_drift": 1.8}, {MAKE}, id="max_drift"),
        pytest.param(lambda _: {"stock": False, "max_size": 10**7}, {MAKE}, id="max_size"),
        pytest.param(lambda _: {"variants": ("Q8_0", "Q4_0")}, {"make Q4_0"}, id="another variant"),
    ],
)
def test_a_changed_fact_repeats_just_its_stages(runs: Runs, change: Change, stages: set[str]) -> None:
    runs(**change(runs.folder))
    assert runs.stages == stages


def test_changed_texts_and_versions_repeat_everything(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_texts", lambda: TEXTS[1:])
    runs()
    assert runs.stages == ALL
    monkeypatch.setattr(job_module, "made_with", lambda: {"f2gguf": "0.0.1"})
    runs()
    assert runs.stages == ALL


def test_calibration_and_importance_matrix_are_inputs_of_variants(runs: Runs, tmp_path: Path) -> None:
    """With another bound llama.cpp's own recipe is not measured again, and the recipe in use is looked for anew."""
    report = runs(stock=False, variants=("Q4_0",))
    assert runs.stages == {"make Q4_0"}
    assert set(report.variants) == {"Q8_0", "Q4_0"}, "what was not asked for stays"
    runs(stock=False, variants=("Q4_0",))
    assert runs.stages == set()
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"A text of our own, number {i}."}) + "\n" for i in range(70)))
    runs(stock=False, variants=("Q4_0",), calibration=own)
    assert runs.stages == {"make Q4_0"}
    imatrix = shutil.copy(runs.out / "tiny" / "tiny.imatrix.gguf", tmp_path / "own.gguf")
    report = runs(stock=False, variants=("Q4_0",), imatrix=Path(imatrix))
    assert runs.stages == {"make Q4_0"}
    assert report.variants["Q4_0"].inputs.imatrix_sha256


def test_variants_go_with_the_importance_matrix_that_is_there(runs: Runs) -> None:
    runs(stock=False, variants=("Q4_0",))
    path, report_path = runs.out / "tiny" / "tiny.imatrix.gguf", runs.out / "tiny" / "drift.json"
    data = path.read_bytes()
    path.unlink()
    runs(stock=False, variants=("Q4_0",))
    assert runs.stages == set()
    assert path.read_bytes() == data
    # As if kernels of another processor had given another matrix
    report_path.write_text(report_path.read_text().replace(hashlib.sha256(data).hexdigest(), "0" * 64))
    report = runs(stock=False, variants=("Q4_0", "Q4_K_M"))
    assert runs.stages == {"make Q4_0", "make Q4_K_M"}
    assert set(report.variants) == {"Q8_0", "Q4_0", "Q4_K_M"}


def corpus_of(path: Path, n_texts: int = 100, *, first: str = "A") -> Path:
    texts = [f"{first} text of our own, number {i}." for i in range(n_texts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_header_report_and_card_state_the_drift_on_the_held_out_texts_of_a_corpus(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "_budget", lambda _weights: 25_000.0)  # so many that codes are better on other texts
    corpus = corpus_of(tmp_path / "our own.jsonl")
    report = runs(stock=False, variants=("Q4_0",), calibration=corpus)
    of_file, of_stock = report.variants["Q4_0"].corpus, report.stock["Q4_0"].corpus
    assert of_file
    assert of_stock
    assert (of_file.name, of_file.n, of_stock.n) == ("our own.jsonl", 33, 33)
    assert 0 < of_file.mean < of_stock.mean
    folder = runs.out / "tiny"
    header = read_header(folder / "tiny-Q4_0.gguf")
    assert header.values["f2gguf.drift.corpus.name"] == "our own.jsonl"
    assert header.values["f2gguf.drift.corpus.n_texts"] == 33
    assert header.values["f2gguf.drift.corpus.mean"] == pytest.approx(of_file.mean, abs=1e-6)
    assert header.values["f2gguf.drift.corpus.upper"] == pytest.approx(of_file.upper, abs=1e-6)
    mean, upper = (header.values[f"f2gguf.drift.corpus.{name}"] for name in ("mean", "upper"))
    words = f"mean {mean:.3%}, at most {upper:.3%} with 95% confidence, over 33 held-out texts of our own.jsonl"
    assert words in describe(header, kernels="")
    for name in ("README.md", "report.html"):
        assert "Drift on your corpus (33 held-out texts of our own.jsonl)" in (folder / name).read_text()
    card = (folder / "README.md").read_text()
    assert write_release(folder, read_report(folder))
    assert (folder / "README.md").read_text() == card, "quantize card makes it again from drift.json"
    assert read_release(folder).report == report
    runs(stock=False, variants=("Q4_0",), calibration=corpus)
    assert runs.stages == set()


def test_a_push_compares_the_drift_on_the_corpus_as_well(runs: Runs, tmp_path: Path) -> None:
    runs(stock=False, variants=("Q4_0",), calibration=corpus_of(tmp_path / "own.jsonl"))
    folder = runs.out / "tiny"
    report = read_report(folder)
    verdict = report.variants["Q4_0"]
    assert verdict.corpus
    for changed in (replace(verdict.corpus, mean=0.0), replace(verdict.corpus, name="other.jsonl"), None):
        write_report(folder, replace(report, variants={**report.variants, "Q4_0": replace(verdict, corpus=changed)}))
        write_release(folder, read_report(folder))
        with pytest.raises(UnfitRelease, match=r"tiny-Q4_0\.gguf: states f2gguf\.drift\.corpus\.\w+ = "):
            read_release(folder)


def test_another_corpus_repeats_the_variant_and_its_stock_recipe(runs: Runs, tmp_path: Path) -> None:
    runs(stock=False, variants=("Q4_0",), calibration=corpus_of(tmp_path / "own.jsonl"))
    report = runs(stock=False, variants=("Q4_0",), calibration=corpus_of(tmp_path / "other.jsonl", first="Another"))
    verdicts = [report.variants["Q4_0"], report.stock["Q4_0"]]
    assert {verdict.corpus.name for verdict in verdicts if verdict.corpus} == {"other.jsonl"}
    report = runs(stock=False, variants=("Q4_0",))
    assert (report.variants["Q4_0"].corpus, report.stock["Q4_0"].corpus) == (None, None)


def test_a_run_for_a_corpus_that_was_stopped_ends_in_the_same_bytes(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(tmp_path / "own.jsonl")
    options = {"stock": False, "variants": ("Q4_0", "Q8_0"), "calibration": corpus, "tune": None}
    runs(**options, force=True)
    folder = runs.out / "tiny"
    whole = contents(folder)
    shutil.rmtree(folder)
    for module, name in ((search, "embed_texts"), (search, "fill_in"), (pipeline, "write_release")):
        with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
            stopped.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            runs(**options)
    runs(**options)
    assert contents(folder) == whole


def test_another_bound_leaves_no_variant_of_the_old_one_in_the_list(runs: Runs) -> None:
    runs(variants=("Q8_0", "Q4_0"))
    report = runs(max_drift=1.5)
    assert runs.stages == {MAKE}
    assert set(report.variants) == {"Q8_0"}
    assert {verdict.max_drift for verdict in report.variants.values()} == {1.5}
    assert "Q4_0" not in (runs.out / "tiny" / "SHA256SUMS").read_text()


def test_a_bound_of_many_digits_is_the_same_bound_in_the_next_run(runs: Runs) -> None:
    runs(max_drift=1.23456789)
    assert runs.stages == {MAKE}
    assert runs(max_drift=1.23456789).max_drift == 1.23456789
    assert runs.stages == set()


def test_a_file_that_is_gone_is_listed_nowhere(runs: Runs) -> None:
    runs(variants=("Q8_0", "Q4_0"))
    (runs.out / "tiny" / "tiny-Q8_0.gguf").unlink()
    report = runs(variants=("Q4_0",))
    assert runs.stages == set()
    assert set(report.files) == {"F16", "Q4_0"}
    for name in ("drift.json", "README.md", "SHA256SUMS", "report.html", "Modelfile"):
        assert "Q8_0" not in (runs.out / "tiny" / name).read_text()


def test_a_f16_file_that_is_gone_is_made_again_and_variants_of_the_same_bytes_stay(runs: Runs) -> None:
    (runs.out / "tiny" / "tiny-F16.gguf").unlink()
    report = runs()
    assert runs.stages == {CONVERT, GATE_1}
    assert set(report.files) == {"F16", "Q8_0"}


def test_a_report_that_is_gone_or_of_another_kind_means_a_first_run(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.out / "tiny" / "drift.json"
    path.write_text("[]")
    runs()
    assert runs.stages == ALL
    assert "is damaged" in capsys.readouterr().err
    path.unlink()
    runs()
    assert runs.stages == ALL


def test_a_conversion_that_was_not_checked_is_checked_when_it_can_be(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr("f2gguf.evals.full_precision.find_spec", lambda _name: None)
        assert runs(force=True).conversion.holds is None  # type: ignore[union-attr]
        runs()
        assert runs.stages == set()
    assert runs().conversion.holds  # type: ignore[union-attr]
    assert runs.stages == {CONVERT, GATE_1}, "the file has the same bytes, so the variant stays"


def test_header_and_card_say_the_same_pooling(runs: Runs) -> None:
    """`--pooling last`, then `--pooling mean`: header, report and card follow."""
    report = runs(pooling="mean")
    assert report.source.pooling == "mean"
    assert "| Pooling | mean |" in (runs.out / "tiny" / "README.md").read_text()


def test_a_folder_of_another_repository_is_not_overwritten(runs: Runs) -> None:
    with pytest.raises(WrongUsage, match="holds the release of org/tiny, and this model comes from other/tiny"):
        runs(repo="other/tiny")
    assert runs(repo="other/tiny", force=True).source.repo == "other/tiny"


def test_a_second_run_in_one_folder_is_told_so_at_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []

    def second(*_: Any) -> Any:
        with pytest.raises(OutputError, match="another run is at work") as refusal:
            runs()
        messages.append(str(refusal.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "start_report", second)
    with pytest.raises(KeyboardInterrupt):
        runs()
    assert messages[0].startswith(f"{runs.out / 'tiny'}: ")
