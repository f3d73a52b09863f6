"""`scripts/device-check` without a GPU, and on files that it is given."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.library import backends

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "device-check"


@pytest.mark.skipif(
    sys.platform == "darwin" or backends() != ["CPU"] or shutil.which("nvidia-smi") is not None, reason="has a GPU"
)
def test_a_machine_without_a_gpu_gets_one_line(nano_f16: Path) -> None:
    process = subprocess.run([sys.executable, SCRIPT, nano_f16], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == "error: no GPU here to check: llama.cpp finds only CPU, and nvidia-smi no card.\n"


@pytest.mark.parametrize(("angle", "is_sound"), [(0.0, True), (0.2, False)])
def test_vectors_that_differ_are_told_in_the_row(nano_f16: Path, angle: float, is_sound: bool) -> None:
    """The sides are stand-ins: a real one embeds thousands of texts."""
    script = runpy.run_path(str(SCRIPT))
    vectors = {"cpu": np.array([[1.0, 0.0]]), "other": np.array([[np.cos(angle), np.sin(angle)]])}

    def measure(_header: object, device: str, _works: object, **_: object) -> object:
        its = vectors["cpu" if len(asked) == 0 else "other"].astype(np.float32)
        asked.append(device)
        return script["Measured"]([its, its], 10.0, 2.0)

    asked: list[str] = []
    check = script["check"]
    check.__globals__.update(measure=measure, served=lambda *_, **__: 5.0)
    row, found = check(read_header(nano_f16), "cpu", n_rounds=1, n_clients=1)
    assert found is is_sound
    assert row == [nano_f16.stem, "none", *[f"{np.cos(angle):.7f}"] * 2, "10.0 / 10.0", "2.0 / 2.0", "5.0 / 5.0"]
