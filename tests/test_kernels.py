"""Matrices are repacked where llama.cpp's kernels are faster for it, and no vector depends on that."""

from __future__ import annotations

import random
import re
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from f2gguf.evals.drift import drift
from f2gguf.quantize.repair.recipe import Recipe, make
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama import engine
from f2gguf.runtime.llama.kernels import amx, choice, own, trial
from f2gguf.runtime.llama.kernels.buffers import AMX, REPACK, allocated_bytes, extra_buffers
from f2gguf.runtime.llama.library import log_to

TEXTS = ["an archiver for zip files", "how do I play chess?", "数据库服务器", "x " * 100]
x86 = pytest.mark.skipif(b"AVX2 = 1" not in llama_cpp.llama_print_system_info(), reason="kernels are chosen on x86")


@pytest.fixture(autouse=True)
def llama_cpps_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without f2gguf's own, which test_own_kernels.py tries."""
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")


@pytest.fixture(scope="module")
def mixed(nano_f16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with types that are repacked and types that are not, side by side."""
    weights, path = Weights(nano_f16), tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    kinds = {".attn_v.": "Q4_0", ".attn_output.": "IQ4_NL", ".ffn_up.": "Q4_K", "blk.1.ffn_down.": "Q4_0"}
    types = {
        name: next(
            (kind for part, kind in kinds.items() if part in name), "Q8_0" if len(info.shape) == 2 else info.type
        )
        for name, info in weights.infos.items()
    }
    make(weights, path, Recipe("Q4_0"), {}, types=types)
    return path


def loaded(path: Path) -> tuple[np.ndarray, str, str]:
    """Vectors of TEXTS, what the model says of its way of computing, and llama.cpp's log."""
    lines: list[str] = []
    with log_to(lambda _, line: lines.append(line)), Embedder(path, device="cpu") as embedder:
        return embedder.encode(TEXTS), embedder.description, "".join(lines)


@x86
def test_just_the_types_that_are_faster_are_repacked(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "works", lambda: False)
    header = read_header(mixed)
    names = choice.choose(header)[REPACK]
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert {types[name] for name in names} == {"Q4_0", "IQ4_NL"}
    assert len(names) == sum(kind in choice.TYPES[REPACK] for kind in types.values()) == 9
    vectors, description, log = loaded(mixed)
    assert ", 9 matrices repacked" in description
    words = "4 IQ4_NL matrices repacked, 5 Q4_0 matrices repacked"
    assert choice.describe_kernels(header).partition(". AMX is not used")[0] == words
    sizes = {tensor.name: tensor.size_bytes for tensor in header.tensors}
    assert choice.copied_bytes(header) == sum(sizes[name] for name in names)
    size_mib = choice.copied_bytes(header) / 2**20
    assert re.findall(r"CPU_REPACK model buffer size = +([\d.]+) MiB", log) == [f"{size_mib:.2f}"]
    monkeypatch.setattr(engine, "choose", lambda _header: {})
    plain, _, log = loaded(mixed)
    assert "CPU_REPACK" not in log
    assert drift(vectors, plain).max() < 1e-3, "other kernels round activations otherwise"


def test_patterns_match_just_their_names(rng: random.Random) -> None:
    kinds = ("attn_q", "attn_qkv", "attn_output", "ffn_down", "ffn_gate")
    every = [f"blk.{i}.{kind}.weight" for i in range(24) for kind in kinds]
    others = ["blk.1.ffn_norm.weight", "token_embd.weight", "blk.1.attn_q_norm.weight", "blk.1.attn_q.bias"]
    for n in (0, 1, 40, len(every)):
        names = set(rng.sample(every, n))
        patterns = choice._patterns(sorted(names))
        assert {name for name in [*every, *others] if any(re.search(it, name) for it in patterns)} == names
    assert len(patterns) == 1, "llama.cpp compiles each pattern for each tensor"


def test_rows_that_cannot_be_interleaved_are_left(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ROWS", {REPACK: 7, AMX: 7})
    assert choice.choose(read_header(mixed)) == {}


@x86
def test_where_llama_cpp_chooses_it_repacks_what_it_can(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_buffers", dict)
    monkeypatch.setattr(amx, "is_built_in", lambda: True)
    assert choice.describe_kernels(read_header(mixed)) == "as llama.cpp chooses on this processor"
    _, description, log = loaded(mixed)
    assert "repacked" not in description
    assert "CPU_REPACK" not in log, "not where AMX would crash"


@x86
def test_products_of_other_kernels_are_compared_with_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    repacking = extra_buffers()[REPACK]
    assert trial.products_are_right(repacking, ("Q4_0", "IQ4_NL"), tolerance=1e-3)
    assert not trial.products_are_right(repacking, ("Q4_0",), tolerance=0), (
        "they round otherwise, so nothing compares a thing with itself"
    )


@x86
def test_what_a_copy_takes_is_what_ggml_says() -> None:
    assert allocated_bytes(extra_buffers()[REPACK], "Q4_0", (64, 512)) == 64 * 512 // 32 * 18


CHILDREN = {  # what the child process does -> whether AMX is used, and whether that is remembered
    "print('right')": (True, True),
    "print('')": (False, True),
    "import os, signal; os.kill(os.getpid(), signal.SIGILL)": (False, True),
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (False, False),  # where memory is short
    "import no_such_module": (False, False),
    "import time; time.sleep(60)": (False, False),
}


@pytest.mark.parametrize(("code", "outcome"), CHILDREN.items())
def test_amx_is_used_where_a_child_process_ended_well(
    code: str, outcome: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, is_remembered = outcome
    monkeypatch.setenv("F2GGUF_CACHE", str(tmp_path))
    monkeypatch.setattr(amx, "is_built_in", lambda: True)
    monkeypatch.setattr(amx, "extra_buffers", lambda: {AMX: 1})
    monkeypatch.setattr(trial, "_TIMEOUT_S", 5)
    monkeypatch.setattr(amx, "_CODE", code)
    assert amx.works.__wrapped__() is found
    monkeypatch.setattr(amx, "_CODE", "print('')" if found else "print('right')")
    assert amx.works.__wrapped__() is (found if is_remembered else True)
    monkeypatch.setattr(trial, "library_stamp", lambda: ["another build"])
    assert amx.works.__wrapped__() is not found, "another build is tried anew"


def test_a_processor_without_amx_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "is_built_in", lambda: False)
    monkeypatch.setattr(trial.subprocess, "run", lambda *_, **__: pytest.fail("a child"))
    assert amx.works.__wrapped__() is False


@x86
def test_amx_takes_what_it_has_kernels_for_and_leaves_the_rest(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "is_built_in", lambda: True)
    header = read_header(mixed)
    monkeypatch.setattr(amx, "works", lambda: True)
    monkeypatch.setattr(choice, "extra_buffers", lambda: {AMX: 1, REPACK: 2})
    types = {tensor.name: tensor.type for tensor in header.tensors}
    placement = choice.choose(header)
    assert {types[name] for name in placement[AMX]} == {"Q8_0", "Q4_0", "Q4_K"}
    assert {types[name] for name in placement[REPACK]} == {"IQ4_NL"}
    monkeypatch.setattr(amx, "works", lambda: False)
    assert AMX not in choice.choose(header)
    monkeypatch.setattr(own, "cannot_be_compiled", lambda: False)
    assert "AMX is not used, because a trial of it failed" in choice.describe_kernels(header)


@pytest.mark.skipif(not amx.works(), reason="needs AMX, and a llama-cpp-python that was compiled without the fault")
def test_vectors_on_amx_are_those_of_other_kernels(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, description, log = loaded(mixed)
    assert "matrices on AMX" in description
    assert choice.copied_bytes(read_header(mixed)) / 2**20 == pytest.approx(
        sum(map(float, re.findall(r"(?:AMX|CPU_REPACK) model buffer size = +([\d.]+) MiB", log))), abs=0.02
    )
    monkeypatch.setattr(engine, "choose", lambda _header: {})
    assert drift(vectors, loaded(mixed)[0]).max() < 1e-3, "other kernels round activations otherwise"
