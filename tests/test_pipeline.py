"""`quantize all`, end to end: measured, labelled, resumable, the same bytes every time."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forking
import numpy as np
import pytest
from checkpoints import edit_tensors, tiny_tensors
from conftest import COMMAND, NANO_QUICK, QUICK, Release, Run, contents, facts_of
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.repair.plan import plan_variant
from f2gguf.quantize.report.report import read_report
from f2gguf.quantize.report.tables import drift_rows
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import UnknownName
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.header import KEY_SEAL, read_header
from f2gguf.runtime.llama.kernels import own
from huggingface_hub import ModelCard

FILES = {"F16", "Q8_0", "Q4_K_M", "Q4_0"}


def report_of(release: Release) -> dict:
    return json.loads((release.folder / "drift.json").read_text())


def test_release_holds_every_file_and_prints_their_paths(nano_release: Release) -> None:
    names = {f"f2llm-nano-{variant}.gguf" for variant in FILES}
    names |= {
        "f2llm-nano.imatrix.gguf",
        "README.md",
        "Modelfile",
        "SHA256SUMS",
        "drift.json",
        "drift.png",
        "report.html",
    }
    assert nano_release.process.returncode == 0, nano_release.process.stderr
    assert {path.name for path in nano_release.folder.iterdir()} == names
    assert nano_release.process.stdout.splitlines()[-len(names) :] == sorted(
        str(nano_release.folder / n) for n in names
    )


def test_every_variant_of_nano_is_under_the_bound(nano_release: Release) -> None:
    report = report_of(nano_release)
    assert report["conversion"]["holds"]
    assert report["conversion"]["n"] == 594
    assert all(verdict["holds"] for verdict in report["variants"].values())
    assert 0 < report["variants"]["Q8_0"]["mean"] < report["variants"]["Q4_K_M"]["mean"] < 0.005


def test_stock_minilm_drifts_as_published(minilm_release: Release) -> None:
    """Stock variants on 800 English texts, measured elsewhere: 0.03%, 0.74%, 2.8%.

    llama.cpp rounds inputs to 8 bits, which is half of the first. f2gguf's own kernels do not.
    """
    report = report_of(minilm_release)
    stock = {**report["variants"], **report["stock"]}
    means = {name: verdict["languages"]["en"]["mean"] for name, verdict in stock.items()}
    assert report["conversion"]["min_cosine"] >= 0.9999
    assert means["Q8_0"] == pytest.approx(0.00015 if own.units() == "AMX" else 0.0003, rel=0.25)
    assert means["Q4_K_M"] == pytest.approx(0.0074, rel=0.25)
    assert means["Q4_0"] == pytest.approx(0.028, rel=0.25)
    assert [name for name, verdict in stock.items() if not verdict["holds"]] == ["Q4_0"]


def test_over_the_bound_is_said_in_report_card_and_header(run: Run, tiny: Path, tmp_path: Path) -> None:
    arguments = (tiny, "--stock", "--variants", "Q4_0", "--out", tmp_path / "dist")
    stock = Release(tmp_path / "dist" / "tiny", run("quantize", "all", *arguments, prelude=QUICK))
    assert stock.process.returncode == 3
    assert "over the bound of 2%: tiny Q4_0" in stock.process.stderr
    assert "OVER 2%" in stock.process.stdout
    assert "**Q4_0 is over the bound: " in (stock.folder / "README.md").read_text()
    assert "OVER the bound of 2%" in run("f2gguf", "inspect", stock.file("Q4_0")).stdout
    assert read_header(stock.file("Q4_0")).values["f2gguf.drift.holds"] is False
    assert (stock.folder / "Modelfile").read_text().startswith("FROM ./tiny-F16.gguf\n")


def test_header_and_report_state_the_same_drift(nano_release: Release) -> None:
    for variant, verdict in report_of(nano_release)["variants"].items():
        values = read_header(nano_release.file(variant)).values
        assert values["f2gguf.variant"] == variant
        assert values["f2gguf.drift.mean"] == pytest.approx(verdict["mean"], abs=1e-6)
        assert values["f2gguf.drift.n_texts"] == verdict["n"]


def test_measured_drift_is_that_of_the_file_on_disk(nano_release: Release) -> None:
    texts = ["how do I compress a folder?", "ein Texteditor", "画像を表示する"]
    with Embedder(nano_release.file("F16")) as reference, Embedder(nano_release.file("Q4_0")) as candidate:
        drifts = 1 - (reference.encode(texts) * candidate.encode(texts)).sum(axis=1)
    assert 0 < drifts.mean() < 3 * report_of(nano_release)["variants"]["Q4_0"]["mean"]


def test_checksums_are_those_of_the_files(nano_release: Release) -> None:
    lines = (nano_release.folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [path for path in nano_release.folder.iterdir() if path.name != "SHA256SUMS"]
    assert sums == {path.name: sha256_file(path) for path in files}


def test_card_has_front_matter_that_the_hub_reads(minilm_release: Release) -> None:
    card = ModelCard.load(minilm_release.folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.base_model_relation == "quantized"
    assert card.data.language == ["en"]
    for file in report_of(minilm_release)["files"].values():
        assert file["sha256"] in card.text


def test_second_run_makes_nothing_again(nano_release: Release, run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in nano_release.folder.glob("*.gguf")}
    again = run("quantize", "all", "f2llm-nano", "--out", nano_release.folder.parent, prelude=NANO_QUICK)
    assert again.returncode == 0
    assert again.stdout == nano_release.process.stdout
    assert {path: path.stat().st_mtime_ns for path in nano_release.folder.glob("*.gguf")} == before


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_ends_in_the_same_bytes(
    tiny: Path, tmp_path: Path, rng: random.Random
) -> None:
    def begin(out: Path) -> subprocess.Popen[bytes]:
        code = QUICK + COMMAND.format(name="quantize")
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        arguments = ("all", tiny, "--out", out, "--variants", "Q8_0,Q4_0")
        return forking.start(code, *arguments, is_real=True, **streams)  # each with its seed of hash()

    began = time.monotonic()
    assert begin(tmp_path / "whole").wait() == 0
    whole_s = time.monotonic() - began
    wanted = contents(tmp_path / "whole" / "tiny")
    for _ in range(2):
        process = begin(tmp_path / "killed")
        time.sleep(rng.uniform(0.03, 0.9) * whole_s)
        process.kill()
        process.wait()
        for path in (tmp_path / "killed" / "tiny").glob("*.gguf"):
            assert contents(path.parent)[path.name] == wanted[path.name], "a final name carries other bytes"
    assert begin(tmp_path / "killed").wait() == 0
    assert contents(tmp_path / "killed" / "tiny") == wanted


def test_interrupted_run_says_so_and_leaves_no_part(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from f2gguf.quantize.cli import quantize; quantize()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "all", tiny, "--out", tmp_path / "dist"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "F16: " not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "interrupted: nothing is half written" in err
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.slow
def test_changed_weights_are_noticed(tiny: Path, tiny_repaired: Release, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(tiny_repaired.folder, tmp_path / "dist" / "tiny")
    first = contents(folder)
    edit_tensors(tiny, norm__weight=tiny_tensors(seed=1)["norm.weight"])
    again = run("quantize", "all", tiny, "--out", tmp_path / "dist", "--variants", "Q4_0", prelude=QUICK)
    assert again.returncode == 0, again.stderr
    second = contents(folder)
    for name in ("tiny-F16.gguf", "tiny-Q4_0.gguf", "tiny.imatrix.gguf"):
        assert first[name] != second[name]


@pytest.mark.slow
def test_damaged_variant_is_made_again(tiny: Path, tiny_repaired: Release, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(tiny_repaired.folder, tmp_path / "dist" / "tiny")
    wanted, path = contents(folder), folder / "tiny-Q4_0.gguf"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert contents(folder) != wanted
    again = run("quantize", "all", tiny, "--out", tmp_path / "dist", "--variants", "Q4_0", prelude=QUICK)
    assert again.returncode == 0, again.stderr
    assert contents(folder) == wanted


def test_without_transformers_the_stored_vectors_are_the_reference(
    nano_release: Release, minilm_release: Release
) -> None:
    without, others = (report_of(release)["conversion"] for release in (nano_release, minilm_release))
    assert without["reference"] == "stored vectors (transformers float32)"
    assert others["reference"] == "transformers float32"
    assert min(without["min_cosine"], others["min_cosine"]) >= 0.9999


def test_what_cannot_be_checked_is_said(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from f2gguf.evals import conversion, full_precision

    monkeypatch.setattr(full_precision, "available_memory_bytes", lambda: 1)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    check = conversion.check_conversion(
        np.ones((1, 2), np.float32),
        [],
        folder=tmp_path,
        checkpoint_sha256="0",
        n_parameters=10**9,
        token_ids=list,
        pooling="last",
    )
    assert (check.reference, check.holds) == ("not checked", None)
    assert "need 5.0 GB" in check.why


def test_plan_is_what_llama_cpp_writes_and_names_fallbacks(tiny: Path, tmp_path: Path) -> None:
    convert(facts_of(tiny), tmp_path / "x.gguf")
    plan = plan_variant(tmp_path / "x.gguf", "Q4_K_M")
    types = {tensor.name: (tensor.new_type, tensor.unfit_type) for tensor in plan.tensors}
    assert types["blk.0.ffn_up.weight"] == ("Q5_0", "Q4_K")
    assert types["output_norm.weight"] == ("F32", None)
    assert "instead of Q4_K: their rows do not fill its blocks" in "\n".join(plan.lines())


def test_stamp_moves_no_other_byte(nano_release: Release, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    before = nano_release.file("Q8_0").read_bytes()
    path.write_bytes(before)
    fill_in(path, {"f2gguf.drift.mean": 0.5})
    after = path.read_bytes()
    seal = read_header(path).offsets[KEY_SEAL]
    changed = [i for i in range(len(before)) if before[i] != after[i] and not seal <= i < seal + 72]
    assert read_header(path).values["f2gguf.drift.mean"] == 0.5
    assert is_sealed(read_header(path))
    assert 0 < len(changed) <= 4
    with pytest.raises(ValueError, match="does not fit"):
        fill_in(path, {"f2gguf.variant": "Q4_K_M"})


def test_verify_measures_a_file_against_another_and_against_its_checkpoint(
    tiny_variants: Release, nano_release: Release, run: Run, tmp_path: Path
) -> None:
    for variant, exit_code in (("Q8_0", 0), ("Q4_0", 3)):
        files = tiny_variants.file(variant), "--against", tiny_variants.file("F16")
        against_file = run("quantize", "verify", *files, "--json", prelude=QUICK)
        verdict = json.loads(against_file.stdout)
        assert against_file.returncode == exit_code
        assert verdict["mean"] == pytest.approx(report_of(tiny_variants)["variants"][variant]["mean"], abs=1e-6)
    texts = tmp_path / "texts.jsonl"
    rows = [{"text": text.text, "kind": text.kind} for text in load_texts() if text.kind in ("query", "document")]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows[:80]))
    arguments = ("--against", "f2llm-nano", "--max-drift", "0.0001", "--corpus", texts)
    strict = run("quantize", "verify", nano_release.file("Q4_0"), *arguments)
    assert strict.returncode == 3
    assert "over the bound of 0.01%" in strict.stderr


@pytest.mark.slow
def test_variant_command_makes_one_measured_file(tiny_repaired: Release, run: Run, tmp_path: Path) -> None:
    assert tiny_repaired.process.returncode == 0, tiny_repaired.process.stderr
    path = tmp_path / "one.gguf"
    arguments = ("quantize", "variant", tiny_repaired.file("F16"), "q4_0", "-o", path)
    too_small = run(*arguments, "--max-size", "1KB", prelude=QUICK)
    assert (too_small.returncode, "no Q4_0 of 1.0 kB" in too_small.stderr) == (3, True)
    process = run(*arguments, prelude=QUICK)  # goes on from there
    assert process.returncode == 0, process.stderr
    assert {it.name for it in tmp_path.iterdir()} == {"one.gguf", "one.imatrix.gguf"}
    assert process.stdout.splitlines()[-1] == str(path)
    assert path.read_bytes() == tiny_repaired.file("Q4_0").read_bytes()


def test_unknown_names_are_answered_with_the_nearest(run: Run, nano_release: Release) -> None:
    model = run("quantize", "all", "F2LLM-v2-4b-x")
    assert (model.returncode, "Did you mean 'F2LLM-v2-4B'?" in model.stderr) == (2, True)
    variant = run("quantize", "all", "f2llm-nano", "--variants", "Q4_M")
    assert (variant.returncode, "Did you mean 'Q4_K_M'?" in variant.stderr) == (2, True)
    with pytest.raises(UnknownName, match="no pooling is called 'lst'"):
        Embedder(nano_release.file("Q8_0"), pooling="lst")


def test_dry_run_says_what_would_be_done_and_does_nothing(run: Run, tmp_path: Path) -> None:
    process = run("quantize", "all", "--out", tmp_path / "dist", "--dry-run")
    assert process.returncode == 0
    assert "F2LLM-v2-4B: from codefuse-ai/F2LLM-v2-4B@e04d1a0" in process.stdout
    assert "F2LLM-v2-4B-Q4_K_M.gguf: would be made and measured" in process.stdout
    assert not (tmp_path / "dist").exists()


def test_table_has_a_row_for_every_file(nano_release: Release) -> None:
    """Q8_0 is llama.cpp's own recipe, which was made and measured once."""
    rows = [row[0] for row in drift_rows(read_report(nano_release.folder))]
    assert rows == ["F16", "Q8_0", "Q4_K_M", "Q4_K_M stock", "Q4_0", "Q4_0 stock"]
