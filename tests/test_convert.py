"""Conversion: every value where llama.cpp's own converter puts it, streamed, from any layout of the checkpoint."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import MINILM, NANO, edit_json, edit_tensors, save_tensors, tiny_tensors
from conftest import NO_TRANSFORMERS, Run, facts_of
from f2gguf.evals.texts import HOSTILE, load_texts
from f2gguf.quantize.checkpoint.tokenizer_files import build_tokenizer
from f2gguf.quantize.convert.readback import checkpoint_ids, read_back
from f2gguf.quantize.convert.write import bf16_to_f16, convert
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.errors import ConversionMismatch
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.header import read_header
from llama_cpp._ggml import libggml
from safetensors import safe_open

# What llama.cpp's converter (llama-cpp-python 0.3.36) calls the tensors, and which of them it keeps in F32.
QWEN3_NAMES = {
    "embed_tokens.weight": ("token_embd.weight", "F16"),
    "norm.weight": ("output_norm.weight", "F32"),
    "layers.1.input_layernorm.weight": ("blk.1.attn_norm.weight", "F32"),
    "layers.1.self_attn.q_norm.weight": ("blk.1.attn_q_norm.weight", "F32"),
    "layers.1.self_attn.o_proj.weight": ("blk.1.attn_output.weight", "F16"),
    "layers.1.post_attention_layernorm.weight": ("blk.1.ffn_norm.weight", "F32"),
    "layers.1.mlp.gate_proj.weight": ("blk.1.ffn_gate.weight", "F16"),
    "layers.1.mlp.down_proj.weight": ("blk.1.ffn_down.weight", "F16"),
}
BERT_NAMES = {
    "embeddings.word_embeddings.weight": ("token_embd.weight", "F16"),
    "embeddings.position_embeddings.weight": ("position_embd.weight", "F32"),
    "embeddings.token_type_embeddings.weight": ("token_types.weight", "F32"),
    "embeddings.LayerNorm.bias": ("token_embd_norm.bias", "F32"),
    "encoder.layer.5.attention.self.key.weight": ("blk.5.attn_k.weight", "F16"),
    "encoder.layer.5.attention.self.key.bias": ("blk.5.attn_k.bias", "F32"),
    "encoder.layer.5.attention.output.LayerNorm.weight": ("blk.5.attn_output_norm.weight", "F32"),
    "encoder.layer.5.output.LayerNorm.weight": ("blk.5.layer_output_norm.weight", "F32"),
    "encoder.layer.5.intermediate.dense.weight": ("blk.5.ffn_up.weight", "F16"),
}


@functools.cache
def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("folder", "fixture", "names"), [(NANO, "nano_f16", QWEN3_NAMES), (MINILM, "minilm_f16", BERT_NAMES)]
)
def test_every_value_is_the_cast_of_the_stored_one(
    folder: Path, fixture: str, names: dict[str, tuple[str, str]], request: pytest.FixtureRequest
) -> None:
    import torch

    written = tensors_of(request.getfixturevalue(fixture))
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        for name, (gguf_name, kind) in names.items():
            wanted = stored.get_tensor(name).to(torch.float32).numpy()
            assert written[gguf_name].tensor_type.name == kind
            np.testing.assert_array_equal(written[gguf_name].data, wanted.astype({"F16": "f2", "F32": "f4"}[kind]))


def test_bf16_to_f16_is_exact_for_every_pattern_in_range() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7FFF) <= 0x477F]  # 65280, the largest BF16 that F16 holds
    by_casts = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    np.testing.assert_array_equal(bf16_to_f16(bits).view(np.uint16), by_casts.view(np.uint16))


def test_bf16_file_rounds_as_ggml_does(tiny: Path, tmp_path: Path) -> None:
    values = tiny_tensors()["layers.0.mlp.up_proj.weight"]
    wanted = np.empty(values.shape, dtype=np.uint16)
    libggml.ggml_fp32_to_bf16_row_ref.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    libggml.ggml_fp32_to_bf16_row_ref(values.ctypes.data, wanted.ctypes.data, values.size)
    convert(facts_of(tiny), tmp_path / "x.gguf", dtype="bf16")
    found = tensors_of(tmp_path / "x.gguf")["blk.0.ffn_up.weight"]
    assert found.tensor_type.name == "BF16"
    np.testing.assert_array_equal(found.data.view(np.uint16).reshape(values.shape), wanted)


@pytest.mark.slow
def test_shards_and_the_model_prefix_change_no_tensor(tiny: Path, tmp_path: Path) -> None:
    convert(facts_of(tiny), tmp_path / "single.gguf")
    tensors = tiny_tensors()
    prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {
        "lm_head.weight": tensors["embed_tokens.weight"]
    }
    save_tensors(tiny, prefixed, n_shards=3)
    convert(facts_of(tiny), tmp_path / "sharded.gguf")
    single, sharded = (tensors_of(tmp_path / f"{name}.gguf") for name in ("single", "sharded"))
    assert list(single) == list(sharded)
    assert all(np.array_equal(single[name].data, sharded[name].data) for name in single)


@pytest.mark.slow
def test_old_names_of_bert_checkpoints_are_known(minilm_f16: Path, tmp_path: Path) -> None:
    from checkpoints import copy_of
    from safetensors.numpy import load_file

    folder = copy_of(MINILM, tmp_path / "old")
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_tensors(folder, renamed)
    convert(facts_of(folder), tmp_path / "old.gguf")
    old, new = tensors_of(tmp_path / "old.gguf"), tensors_of(minilm_f16)
    assert all(np.array_equal(old[name].data, new[name].data) for name in new)


def test_a_tensor_that_overflows_f16_is_kept_wider_and_counted(tiny: Path, tmp_path: Path) -> None:
    values = tiny_tensors()["layers.0.mlp.up_proj.weight"].copy()
    values[0, :3] = 1e5, -1e5, 65504
    values[1, :2] = 1e-9, -1e-9
    edit_tensors(tiny, layers__0__mlp__up_proj__weight=values)
    conversion = convert(facts_of(tiny), tmp_path / "x.gguf")
    loss = {loss.name: loss for loss in conversion.losses}["blk.0.ffn_up.weight"]
    assert (loss.n_overflow, loss.n_zeroed, loss.kept_as) == (2, 2, "F32")
    np.testing.assert_array_equal(tensors_of(tmp_path / "x.gguf")["blk.0.ffn_up.weight"].data, values)


def test_converting_twice_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        convert(facts_of(tiny), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_header_holds_what_the_runtime_must_know(nano_f16: Path, nano_facts: Facts) -> None:
    header = read_header(nano_f16)
    assert header.pooling == "last"
    assert header.dims == (32, 64, 128, 256)
    assert header.max_tokens == 2048
    assert header.prompts["query"].startswith("Instruct: Given a question")
    assert header.values["tokenizer.ggml.add_eos_token"] is True
    assert header.values["tokenizer.ggml.eos_token_id"] == 16383
    assert header.values["tokenizer.ggml.pre"] == "qwen2"
    assert header.values[keys.KEY_SOURCE_SHA256] == nano_facts.checkpoint.sha256
    assert header.values["general.license"] == "apache-2.0"
    assert "ja" in header.languages


@pytest.mark.slow
def test_gate_on_token_ids_holds_on_every_text_and_hostile_string(
    nano_f16: Path, nano_facts: Facts, minilm_f16: Path, minilm_facts: Facts
) -> None:
    texts = load_texts()
    n_samples = len(texts) + len(HOSTILE)
    for path, facts in ((nano_f16, nano_facts), (minilm_f16, minilm_facts)):
        stock_differs = read_back(path, facts, texts)
        assert 0 < len(stock_differs) < n_samples / 5  # decomposed Unicode, and for BERT marks and long words


def test_a_file_that_splits_texts_differently_is_refused(
    nano_f16: Path, minilm_facts: Facts, nano_facts: Facts
) -> None:
    other = Facts(**{**nano_facts.__dict__, "checkpoint": minilm_facts.checkpoint})
    with pytest.raises(ConversionMismatch, match="its added_tokens, normalizer, pre_tokenizer, model differ"):
        read_back(nano_f16, other, load_texts())


def test_cutting_keeps_the_special_tokens(nano_facts: Facts) -> None:
    (whole,) = checkpoint_ids(nano_facts, ["word " * 50])
    (cut,) = checkpoint_ids(nano_facts, ["word " * 50], max_tokens=10)
    assert cut.tolist() == [*whole[:9], whole[-1]]


def test_lock_may_force_a_closing_token_that_the_checkpoint_leaves_out(tiny: Path, tmp_path: Path) -> None:
    edit_json(tiny / "tokenizer.json", post_processor=None)
    facts = facts_of(tiny, eos_token="<|im_end|>")
    convert(facts, tmp_path / "x.gguf")
    read_back(tmp_path / "x.gguf", facts, load_texts())
    assert build_tokenizer(facts.checkpoint).encode("a").ids[-1] != 16383
    assert checkpoint_ids(facts, ["a"])[0][-1] == 16383


def test_convert_command_writes_the_file_and_says_its_path(run: Run, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.gguf"
    process = run("quantize", "convert", tiny, "-o", path, "--dtype", "f32", prelude=NO_TRANSFORMERS)
    assert (process.returncode, process.stdout.strip()) == (0, str(path))
    assert read_header(path).file_type == "F32"
    again = run("quantize", "convert", tiny, "-o", path, prelude=NO_TRANSFORMERS)
    assert again.returncode == 1
    assert "--force" in again.stderr
