"""The model card: what the Hub's validator takes, what its reader copies, what comes along with the weights."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import NANO
from conftest import Release, facts_of
from f2gguf.quantize.release.card import model_card
from f2gguf.quantize.release.write import write_release
from f2gguf.quantize.source.facts import Facts, settle_facts
from f2gguf.quantize.source.lock import read_lock
from hub.card import check_card, front_matter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def report(nano_release: Release) -> dict[str, Any]:
    return dict(json.loads((nano_release.folder / "drift.json").read_text()))


@pytest.fixture
def facts() -> Facts:
    """f2llm-nano, as if it came from the Hub."""
    entry = replace(read_lock().entry("f2llm-nano"), repo="org/nano", revision=COMMIT, languages=("en", "no"))
    return settle_facts(entry, NANO)


def test_front_matter_is_what_the_hub_validates(facts: Facts, report: dict[str, Any]) -> None:
    card = model_card(facts, report)
    assert check_card(card) == ([], [])
    stated = front_matter(card)
    assert stated["base_model"] == "org/nano"
    assert stated["base_model_relation"] == "quantized"
    assert stated["language"] == ["en", "no"], "unquoted, YAML reads Norwegian as False"


def test_model_index_states_what_was_measured(facts: Facts, report: dict[str, Any]) -> None:
    [model] = front_matter(model_card(facts, report))["model-index"]
    found = {
        (result["dataset"]["config"], metric["type"]): metric["value"]
        for result in model["results"]
        for metric in result["metrics"]
    }
    assert model["name"] == "f2llm-nano"
    assert len(found) == 9
    for variant, verdict in report["variants"].items():
        assert found[variant, "mean_drift"] == verdict["mean"]
        assert found[variant, "mean_drift_upper"] == verdict["upper"]
        assert found[variant, "ndcg_at_10"] == verdict["ndcg10"]


def test_provenance_goes_down_to_the_commit(facts: Facts, report: dict[str, Any]) -> None:
    card = model_card(facts, {**report, "source": {**report["source"], "repo": "org/nano", "revision": COMMIT}})
    for said in ("org/nano", COMMIT, facts.checkpoint.sha256, report["calibration"]["sha256"]):
        assert f"`{said}` |" in card
    assert re.search(r"\| Made with ggml \| \d+\.\d+\.\d+ \(\w+", card)


def test_what_fits_where_is_said_by_file_and_longest_text(facts: Facts, report: dict[str, Any]) -> None:
    """4 layers, 2 KV heads of 64 values, keys and values of 2 bytes: 2,048 bytes a token."""
    files = {name: {**file, "size_bytes": 10**9 * (name == "F16")} for name, file in report["files"].items()}
    card = model_card(facts, {**report, "files": files})
    [f16] = re.findall(r"^\| F16 .*$", card, re.MULTILINE)
    assert "| 2 GB |" in f16
    [q8] = re.findall(r"^\| Q8_0 \|.*$", card, re.MULTILINE)
    assert "| 0.5 GB |" in q8
    assert "2.0 MB for every 1,000 tokens" in card


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


def test_licence_and_notice_of_the_source_come_along(tiny: Path, report: dict[str, Any], tmp_path: Path) -> None:
    (tiny / "LICENSE").write_text("Do as you like.")
    (tiny / "NOTICE.txt").write_text("By us.")
    shutil.copytree(tiny, tmp_path / "named")
    (out := tmp_path / "out").mkdir()
    (out / "drift.json").write_text(json.dumps(report))
    paths = write_release(facts_of(tmp_path / "named"), out, report)
    assert (out / "LICENSE").read_text() == "Do as you like."
    assert {out / "LICENSE", out / "NOTICE.txt"} <= set(paths)
    assert {"LICENSE", "NOTICE.txt"} <= {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
