"""Gate 1 names why a file does not do what its checkpoint does, from which layer's output leaves first."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import edit_json, save_tensors, write_tiny, write_tiny_bert
from conftest import FEW_EVALUATED, Run, facts_of
from f2gguf.evals.diagnosis import likely_cause
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.convert.gate import pass_sampled_gate_1
from f2gguf.quantize.convert.readback import checkpoint_ids
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime.errors import ConversionMismatch
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

TEXT = "A lighthouse keeper trims the lamp at dusk, winds the clockwork, and writes the weather down."
Fault = Callable[[Path], object]


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_tensors(folder, {**tensors, name: np.ascontiguousarray(change(tensors[name]))})

    return fault


def permuted(rows: np.ndarray) -> np.ndarray:
    """As rows of heads are reordered for llama.cpp's other kind of RoPE."""
    return rows.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)


def edit(**changes: object) -> Fault:
    return lambda folder: edit_json(folder / "config.json", **changes)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (
            edit(is_causal=False),
            r"the attention of layer 1 differs first: it is as with both ways attention \(the mask\)",
        ),
        (
            tensor("layers.1.self_attn.q_proj.weight", permuted),
            "the attention of layer 2 differs first: its first token is right, which points to queries and keys",
        ),
        (edit(rope_theta=77.0), "the attention of layer 1 differs first: its first token is right, .* RoPE"),
        (
            tensor("layers.0.self_attn.v_proj.weight", np.flipud),
            "the attention of layer 1 differs first: a norm before it, its values, or its output matrix",
        ),
        (
            tensor("layers.1.post_attention_layernorm.weight", lambda w: w * np.linspace(0, 3, 32, dtype=np.float32)),
            "the feed-forward part of layer 2 differs first: a norm, the activation",
        ),
        (
            tensor("norm.weight", lambda w: w * np.linspace(0, 3, 32, dtype=np.float32)),
            "the last layer differs first: the final norm",
        ),
        (lambda folder: None, "every layer gives the same, so it is the pooling"),
    ],
)
def test_the_cause_in_a_qwen3_is_found(fault: Fault, cause: str, tiny: Path, tmp_path: Path) -> None:
    require_cause(tiny, fault, cause, tmp_path)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (
            tensor("embeddings.position_embeddings.weight", lambda w: np.roll(w, -2, axis=0)),
            "the embedding layer differs first: its positions are those of a model that counts from 2",
        ),
        (
            tensor("embeddings.LayerNorm.bias", lambda b: b + np.linspace(0, 3, 32, dtype=np.float32)),
            "the embedding layer differs first: the token table, the positions, or the norm behind them",
        ),
        (
            tensor("encoder.layer.1.attention.output.LayerNorm.weight", lambda w: -w),
            "the attention of layer 2 differs first: a norm before it",
        ),
    ],
)
def test_the_cause_in_a_bert_is_found(fault: Fault, cause: str, tmp_path: Path) -> None:
    require_cause(write_tiny_bert(tmp_path / "tiny"), fault, cause, tmp_path)


def require_cause(right: Path, fault: Fault, cause: str, tmp_path: Path) -> None:
    wrong = shutil.copytree(right, tmp_path / "wrong")
    fault(wrong)
    facts = facts_of(wrong)
    convert(facts, tmp_path / "x.gguf", dtype="f32")
    (ids,) = checkpoint_ids(facts, [TEXT])
    found = likely_cause(tmp_path / "x.gguf", right, ids)
    assert re.search(cause, found), found


def test_gate_1_says_the_cause(tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    edit_json(other / "config.json", is_causal=False)
    convert(facts_of(other), tmp_path / "x.gguf", dtype="f32")
    with pytest.raises(ConversionMismatch, match=r"x.gguf: does not do .* Likely cause: .*\(the mask\)"):
        pass_sampled_gate_1(facts_of(tiny), tmp_path / "x.gguf", load_texts())


def test_convert_checks_vectors_or_says_that_nothing_did(tmp_path: Path, run: Run) -> None:
    folder = write_tiny(tmp_path / "tiny")
    done = run("quantize", "convert", folder, "-o", tmp_path / "x.gguf", prelude=FEW_EVALUATED)
    assert done.stderr.splitlines()[-1] == (
        "Nothing compared its vectors with the checkpoint's. Do it: "
        f"quantize verify {tmp_path / 'x.gguf'} --against {folder} (with the extra 'evals')"
    )
    checked = run("quantize", "convert", folder, "-o", tmp_path / "y.gguf", "--check", prelude=FEW_EVALUATED)
    assert checked.returncode == 0, checked.stderr
    assert "gate 1, transformers float32: minimum cosine 0.99999" in checked.stderr.splitlines()[-1]
