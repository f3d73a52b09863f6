"""How long a run takes, as it is said before it and while it runs; and what --quick measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import NANO
from conftest import Release, Run, facts_of
from f2gguf.evals.texts import KINDS, EvalText, load_texts, quick_texts
from f2gguf.quantize import outlook
from f2gguf.quantize.job import Job
from f2gguf.quantize.outlook import Outlook
from f2gguf.quantize.repair.calibration import load_calibration


def test_every_stage_corrects_what_is_expected_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 500.0, 500.0, 600.0, 600.0, 900.0])
    monkeypatch.setattr(outlook.time, "monotonic", lambda: next(clock))
    stages = {"measure": {"llama": 1000.0}, "hash": {"bytes": 100.0}, "variant": {"llama": 200.0, "codes": 200.0}}
    run = Outlook(stages, memory_bytes=0, disk_bytes=0)
    assert run.seconds_left == 1500
    assert "expected: 25.0 min (measure 16.7 min, hash 1.7 min, variant 6.7 min)" in str(run)
    with run.stage("measure"):
        pass
    assert run.seconds_left == 100 + 100 + 200, "llama takes half the time that was expected, and the others all"
    assert capsys.readouterr().err == "measure took 8.3 min; about 6.7 min left\n"
    for name in ("hash", "variant"):
        with run.stage(name):
            pass
    assert run.seconds_left == 0
    assert run.summary() == "took 15.0 min: measure 8.3 min, hash 1.7 min, variant 5.0 min"


def test_a_long_text_is_expected_to_take_longer_than_short_ones_of_as_many_tokens(tmp_path: Path) -> None:
    job = Job(facts_of(NANO), tmp_path, 0.02, "cpu", stock=True)
    seconds = []
    for n_texts in (1, 100):
        texts = [EvalText(str(i), "long", "en", "lamp " * (1500 // n_texts)) for i in range(n_texts)]
        found = outlook.expect(job, "F16", (), texts, texts, None, speeds={"F16": 1e9, "torch": 1e9})
        seconds.append(found.stages["measure F16"]["llama.cpp"])
    assert seconds[0] > 10 * seconds[1], "attention grows with the square of a length"


def test_a_stage_that_an_earlier_run_began_corrects_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job, texts = Job(facts_of(NANO), tmp_path, 0.02, "cpu"), load_texts()
    calibration, left = load_calibration(None, job.facts.entry.languages), []
    for there in (False, True):
        if there:
            job.work.mkdir(parents=True)
        found = outlook.expect(job, None, ("Q8_0", "Q4_0"), texts, texts, calibration, speeds={})
        before = found.seconds_left - found.stages["calibrate"]["llama.cpp"]
        clock = iter([0.0, 1.0])
        with monkeypatch.context() as patch:  # of this module alone: threads of others ask for the time as well
            patch.setattr(outlook, "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
            with found.stage("calibrate"):
                pass
        left.append(found.seconds_left / before)
    assert left[0] != pytest.approx(1), "the machine is as fast as the stage says"
    assert left[1] == pytest.approx(1), "the earlier run did a part of it"


def test_dry_run_says_what_every_stage_is_expected_to_take(run: Run, tmp_path: Path) -> None:
    line = run("quantize", "all", NANO, "--out", tmp_path, "--dry-run", "--no-tune").stdout.splitlines()[-1]
    for stage in ("convert", "measure F16", "calibrate", "Q8_0", "Q4_K_M", "Q4_0"):
        assert f"{stage} " in line
    assert "of memory" in line
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_finished_release_expects_no_work_and_says_so_in_json(
    run: Run, tiny_release: Release, made: Path
) -> None:
    arguments = ("quantize", "all", made / "tiny", "-o", tiny_release.folder.parent, "--stock", "--dry-run", "--json")
    finished, more, again = (
        json.loads(run(*arguments, *options).stdout)
        for options in (("--variants", "Q8_0"), ("--variants", "Q8_0,Q4_0"), ("--variants", "Q8_0", "--force"))
    )
    assert (finished["model"], finished["expected"]) == ("tiny", None)
    assert finished["summary"] == "expected: no file is missing"
    assert not any(file["is_kept"] for file in again["files"])
    assert {"convert", "measure F16", "Q8_0"} <= again["expected"]["seconds"].keys()
    assert {Path(file["path"]).name: file["is_kept"] for file in more["files"]} == {
        "tiny-F16.gguf": True,
        "tiny-Q8_0.gguf": True,
        "tiny-Q4_0.gguf": False,
    }
    assert list(more["expected"]["seconds"]) == ["Q4_0"]


def test_quick_texts_are_of_every_kind_and_hold_the_answers() -> None:
    texts = load_texts()
    some = quick_texts(texts)
    ids = {text.id for text in some}
    assert len(texts) / 5 < len(some) < len(texts) / 3
    assert {text.kind for text in some} == set(KINDS)
    assert all(name in ids for text in some for name in text.relevant)
