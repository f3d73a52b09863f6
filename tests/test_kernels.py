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
from f2gguf.runtime.llama import kernels, model
from f2gguf.runtime.llama.library import log_to

TEXTS = ["an archiver for zip files", "how do I play chess?", "数据库服务器", "x " * 100]
x86 = pytest.mark.skipif(b"AVX2 = 1" not in llama_cpp.llama_print_system_info(), reason="kernels are chosen on x86")


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
    header = read_header(mixed)
    names = kernels.repacked(header)
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert {types[name] for name in names} == {"Q4_0", "IQ4_NL"}
    assert len(names) == sum(kind in kernels.REPACKED for kind in types.values()) == 9
    vectors, description, log = loaded(mixed)
    assert ", 9 matrices repacked" in description
    assert kernels.describe_kernels(header) == "4 IQ4_NL, 5 Q4_0 matrices are repacked on this processor"
    sizes = {tensor.name: tensor.size_bytes for tensor in header.tensors}
    size_mib = sum(sizes[name] for name in names) / 2**20
    assert re.findall(r"CPU_REPACK model buffer size = +([\d.]+) MiB", log) == [f"{size_mib:.2f}"]
    monkeypatch.setattr(model, "repack", lambda params, _names: kernels.repack(params, ()))
    plain, _, log = loaded(mixed)
    assert "CPU_REPACK" not in log
    assert drift(vectors, plain).max() < 1e-3, "other kernels round activations otherwise"


def test_patterns_match_just_their_names(rng: random.Random) -> None:
    kinds = ("attn_q", "attn_qkv", "attn_output", "ffn_down", "ffn_gate")
    every = [f"blk.{i}.{kind}.weight" for i in range(24) for kind in kinds]
    others = ["blk.1.ffn_norm.weight", "token_embd.weight", "blk.1.attn_q_norm.weight", "blk.1.attn_q.bias"]
    for n in (0, 1, 40, len(every)):
        names = set(rng.sample(every, n))
        patterns = kernels._patterns(sorted(names))
        assert {name for name in [*every, *others] if any(re.search(it, name) for it in patterns)} == names
    assert len(patterns) == 1, "llama.cpp compiles each pattern for each tensor"


def test_rows_that_cannot_be_interleaved_are_left(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_N_ROWS", 7)
    assert kernels.repacked(read_header(mixed)) == []


@x86
def test_where_llama_cpp_chooses_it_repacks_what_it_can(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_repacking_buffer", lambda: None)
    monkeypatch.setattr(model, "_has_amx", lambda: True)
    assert kernels.describe_kernels(read_header(mixed)) == "as llama.cpp chooses on this processor"
    _, description, log = loaded(mixed)
    assert "repacked" not in description
    assert "CPU_REPACK" not in log, "not where AMX would crash"
