"""The model card: what the Hub's validator takes, what its reader copies, what comes along with the weights."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Release
from f2gguf.quantize.release.write import copy_legal_files, write_release
from f2gguf.quantize.report.card import model_card
from f2gguf.quantize.report.report import Report, read_report, write_report
from hub.card import check_card, front_matter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def report(nano_release: Release) -> Report:
    """f2llm-nano's, as if the model came from the Hub."""
    report = read_report(nano_release.folder)
    return replace(report, source=replace(report.source, repo="org/nano", revision=COMMIT, languages=("en", "no")))


def test_front_matter_is_what_the_hub_validates(report: Report) -> None:
    card = model_card(report)
    assert check_card(card) == ([], [])
    stated = front_matter(card)
    assert stated["base_model"] == "org/nano"
    assert stated["base_model_relation"] == "quantized"
    assert stated["language"] == ["en", "no"], "unquoted, YAML reads Norwegian as False"


def test_model_index_states_what_was_measured(report: Report) -> None:
    [model] = front_matter(model_card(report))["model-index"]
    metrics = {
        (result["dataset"]["config"], metric["type"]): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }
    assert model["name"] == "f2llm-nano"
    assert len(metrics) == 9
    for variant, verdict in report.variants.items():
        assert metrics[variant, "mean_drift"] == verdict.mean
        assert metrics[variant, "mean_drift_upper"] == verdict.upper
        assert metrics[variant, "ndcg_at_10"] == verdict.ndcg10


def test_provenance_goes_down_to_the_commit(nano_release: Release, report: Report) -> None:
    card = model_card(report)
    for said in ("org/nano", COMMIT, report.source.sha256):
        assert f" {said} |" in card
    recipe = report.variants["Q4_0"].recipe
    assert f"importance matrix of {recipe.n_calibration_texts} calibration texts" in nano_release.process.stderr
    assert f"{recipe.n_calibration_texts} texts, SHA-256 {recipe.calibration_sha256} |" in card
    assert re.search(r"\| Made with ggml \| \d+\.\d+\.\d+ \(\w+", card)


def test_what_fits_where_is_said_of_every_file(nano_release: Release, report: Report) -> None:
    """4 layers, 2 KV heads of 64 values, keys and values of 2 bytes: 2,048 bytes a token."""
    card = model_card(report)
    assert report.source.cache_bytes == 2048
    assert "Every 1,000 tokens more take 2.0 MB (keys and values)" in card
    assert set(report.performances) == set(report.files)
    for name, performance in report.performances.items():
        assert performance.memory.weights_bytes == nano_release.file(name).stat().st_size
        assert f"| {performance.texts_per_s:,.1f} | {report.files[name].sha256[:12]} |" in card
    assert re.search(r"^\| RTX 4090 \| 24 GB \| fits \| about [\d,]+ tokens/s \|", card, re.MULTILINE)


def test_python_of_the_card_runs(nano_release: Release) -> None:
    """Copied as it stands, beside the files: f2gguf's own, and LangChain's."""
    snippets = re.findall(r"```python\n(.*?)```", (nano_release.folder / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=nano_release.folder, capture_output=True, text=True, check=True
        )
        for code in snippets
    ]
    assert re.fullmatch(r"\[\[0\.\d+\]\]\n", outputs[0].stdout)
    assert "a file of tensors" in outputs[1].stdout


def test_callers_of_other_servers_are_told_both_prompts(report: Report) -> None:
    for prompts, said in (
        ({"query": "q: ", "document": "d: "}, "```text\nq: \n```\n\nAnd this before every document:\n\n```text\nd: \n"),
        ({"document": "d: "}, "put nothing before a query.\n\nAnd this before every document:\n\n```text\nd: \n```"),
        ({"query": "q: "}, "every query:\n\n```text\nq: \n```\n\nAnd nothing before a document."),
        ({}, "The model needs no prompt."),
    ):
        assert said in model_card(replace(report, source=replace(report.source, prompts=prompts)))


def test_languages_without_a_text_are_named(report: Report) -> None:
    source = replace(report.source, languages=("en", "xx"))
    texts = replace(report.texts, languages=source.languages)
    assert "languages (en; no text is in xx)" in model_card(replace(report, source=source, texts=texts))


def test_licence_and_notice_of_the_source_come_along(tiny: Path, report: Report, tmp_path: Path) -> None:
    (tiny / "LICENSE").write_text("Do as you like.")
    (tiny / "NOTICE.txt").write_text("By us.")
    (out := tmp_path / "out").mkdir()
    copy_legal_files(tiny, out)
    write_report(out, report)
    paths = write_release(out, report)
    assert (out / "LICENSE").read_text() == "Do as you like."
    assert {out / "LICENSE", out / "NOTICE.txt"} <= set(paths)
    assert {"LICENSE", "NOTICE.txt"} <= {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
