"""`scripts/rivals`: a rival that cannot run is a row that says why, and files of another checkpoint are refused."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from f2gguf.quantize.source.facts import open_facts
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.gguf.header import read_header

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "rivals"


@pytest.fixture
def rivals() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="imported")


def test_rival_without_its_package_is_a_row_that_names_it(rivals: dict[str, Any]) -> None:
    rivals["RIVALS"]["another"] = rivals["Rival"](print, ("numpy", "no-such-package"))
    failed = rivals["Row"]()
    with rivals["noting_failure"]("another", failed), contextlib.ExitStack() as stack:
        rivals["start"]("another", rivals["Task"]("x.gguf", "mean", "cpu", 1), stack)
    measured = rivals["Row"](20_000_000, np.array([0.01, 0.03]), [0.5, 0.1, 0.2], [0.004, 0.003, 0.005])
    table = rivals["table"]({"another": failed, "a file": measured}, SimpleNamespace(texts=("a",)))
    assert table.splitlines()[2:] == [
        "| a file | 20.0 MB | 2.000% | 2.980% | 3.000% | 5 | 4.0 ms |",
        "| another | did not run: not installed. Run: pip install no-such-package |  |  |  |  |  |",
    ]


def test_error_of_a_rivals_own_process_becomes_its_row(rivals: dict[str, Any], nano_f16: Path, tmp_path: Path) -> None:
    name, row = "llama.cpp Q4_0, our imatrix", rivals["Row"]()
    task = rivals["Task"](str(nano_f16), "last", "cpu", 1, weights=str(tmp_path / "0"), imatrix="none.gguf")
    with rivals["noting_failure"](name, row), contextlib.ExitStack() as stack:
        rivals["start"](name, task, stack)
    assert row.failure.startswith("NotGGUF: none.gguf: no such file.")


def test_files_of_another_checkpoint_are_refused(rivals: dict[str, Any], nano_f16: Path) -> None:
    header = read_header(nano_f16)
    rivals["require_source"](open_facts("f2llm-nano"), [header])
    with pytest.raises(WrongUsage, match=r"F16\.gguf: was not made from .*Make it again: quantize all all-MiniLM"):
        rivals["require_source"](open_facts("all-MiniLM-L6-v2"), [header])
