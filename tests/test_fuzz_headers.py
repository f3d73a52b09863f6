"""A small run of `scripts/fuzz-headers`: damaged headers end in an error, a warning, or the same vectors."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from others import write_other

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "fuzz-headers"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="imported")


def test_no_damage_of_a_header_goes_without_a_word(
    script: dict[str, Any], own: Path, request: pytest.FixtureRequest
) -> None:
    results = script["fuzz"](own, 60, int(request.config.option.hypothesis_seed), 2)
    assert {result.outcome for result in results} >= {"refused", "warned"}
    assert script["lines"](own, results)[1:] == []


def test_damage_of_anothers_header_is_seen_where_it_does_not_fit(
    script: dict[str, Any], own: Path, tmp_path: Path
) -> None:
    """Always the same damages: no check can tell two tokens that changed places, once in thousands."""
    path = write_other(tmp_path / "other.gguf", own)
    results = script["fuzz"](path, 60, 0, 2)
    assert {result.outcome for result in results} >= {"refused", "warned", "same"}
    assert script["lines"](path, results)[1:] == []


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("os.abort()", "CRASHES"),
        ("time.sleep(60)", "HANGS"),
        ('print(\'{"outcome": "RAISES"}\', flush=True)', "RAISES"),
    ],
)
def test_crashes_and_hangs_are_seen_and_the_next_file_gets_another_process(
    script: dict[str, Any], own: Path, tmp_path: Path, end: str, outcome: str
) -> None:
    code = (
        f"import os, resource, sys, time; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); sys.stdin.readline(); {end}"
    )
    opener = script["Opener"](tmp_path / "x.gguf", 2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    opener._process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert opener.open_copy(own.read_bytes())["outcome"] == outcome
    opener.end()
    opener.timeout_s = 60
    assert opener.open_copy(own.read_bytes())["outcome"] == "vectors"
    opener.end()


def test_other_vectors_without_a_new_warning_are_a_violation(script: dict[str, Any]) -> None:
    judged, reference = script["_judged"], {"vectors": [[1.0, 0.0]], "warnings": ["known"]}
    answer = {"outcome": "vectors", "vectors": [[0.0, 1.0]], "warnings": ["known"]}
    assert judged(answer, reference)[0] == "OTHER VECTORS"
    assert judged({**answer, "warnings": ["known", "new"]}, reference) == ("warned", "new")
    assert judged({**answer, "vectors": [[1.0, 0.0]]}, reference)[0] == "same"
