"""Every damaged or foreign checkpoint gives one clear error that names the file, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import f2gguf.quantize.checkpoint.vocabulary as vocabulary_module
import f2gguf.quantize.checkpoint.weights as weights_module
import numpy as np
import pytest
from checkpoints import NANO, edit_json, edit_tensors, save_tensors, tiny_tensors, write_tiny_bert
from conftest import facts_of
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime.errors import BrokenCheckpoint, CheckpointError, Disagreement, UnsupportedCheckpoint
from safetensors.numpy import load_file

Damage = Callable[[Path], object]


def cut_file(name: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def edit(name: str, **changes: object) -> Damage:
    return lambda folder: edit_json(folder / name, **changes)


def index_alone(content: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def flip_header_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20] ^= 0x80
    (folder / "model.safetensors").write_bytes(data)


def shard_without_file(folder: Path) -> None:
    save_tensors(folder, load_file(folder / "model.safetensors"), n_shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_index_misplaces(folder: Path) -> None:
    save_tensors(folder, load_file(folder / "model.safetensors"), n_shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["norm.weight"] = "model-00002-of-00002.safetensors"
    index["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shards_elsewhere(folder: Path) -> None:
    """As sentence-transformers reads them: other tensors in a folder below, which the index names."""
    save_tensors(folder, load_file(folder / "model.safetensors"), n_shards=2)
    (folder / "other").mkdir()
    save_tensors(folder / "other", tiny_tensors(seed=5), n_shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"other/{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_split_pattern(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\s+"
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def edit_tokens(folder: Path, token: dict[str, object]) -> None:
    """Add a token to tokenizer.json, and take it from the vocabulary's own id."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"].append({**defaults, **token})
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    values = tiny_tensors()["norm.weight"].copy()
    values[3] = np.nan
    edit_tensors(folder, norm__weight=values)


def wrong_dtype(folder: Path) -> None:
    edit_tensors(folder, norm__weight=np.ones(32, dtype=np.int32))


CASES: dict[str, tuple[Damage, type[CheckpointError], str]] = {
    "unsupported architecture": (
        edit("config.json", model_type="gpt_neox"),
        UnsupportedCheckpoint,
        r"config.json: model_type 'gpt_neox' is not supported; .*bert, .*qwen3",
    ),
    "attention with biases": (
        edit("config.json", attention_bias=True),
        UnsupportedCheckpoint,
        "attention_bias is True",
    ),
    "scaled RoPE": (
        edit("config.json", rope_scaling={"rope_type": "yarn", "factor": 4}),
        UnsupportedCheckpoint,
        "RoPE scaling is not supported: {'rope_type': 'yarn'",
    ),
    "no config": (remove("config.json"), BrokenCheckpoint, "config.json: no such file"),
    "config is no JSON": (write("config.json", "{"), BrokenCheckpoint, "config.json: does not parse as JSON"),
    "config is a list": (write("config.json", "[]"), BrokenCheckpoint, "config.json: holds a JSON list"),
    "config lacks a key": (edit("config.json", hidden_size=...), BrokenCheckpoint, "config.json: has no 'hidden_size'"),
    "config of another size": (
        edit("config.json", intermediate_size=128),
        BrokenCheckpoint,
        r"layers.0.mlp.gate_proj.weight has the shape \(64, 32\), but config.json implies \(128, 32\)",
    ),
    "more layers than tensors": (
        edit("config.json", num_hidden_layers=3),
        BrokenCheckpoint,
        r"layers.2.input_layernorm.weight, .* and 8 more are missing",
    ),
    "fewer layers than tensors": (edit("config.json", num_hidden_layers=1), BrokenCheckpoint, "no part of a qwen3"),
    "no weights": (remove("model.safetensors"), BrokenCheckpoint, "model.safetensors: no such file"),
    "pickle only": (pickle_only, UnsupportedCheckpoint, "pytorch_model.bin: is a pickle, but no archive of torch"),
    "foreign weights only": (
        lambda f: (f / "model.safetensors").rename(f / "model.h5"),
        UnsupportedCheckpoint,
        "only pickle or foreign weights",
    ),
    "weights cut in the data": (cut_file("model.safetensors", 0.9), BrokenCheckpoint, "model.safetensors: truncated: "),
    "weights cut in the header": (cut_file("model.safetensors", 0.0001), BrokenCheckpoint, "cut off in its header"),
    "weights empty": (cut_file("model.safetensors", 0), BrokenCheckpoint, "cut off in its header"),
    "bit flip in the header": (flip_header_bit, BrokenCheckpoint, "model.safetensors, its header: is damaged"),
    "values that are not finite": (not_finite, BrokenCheckpoint, "output_norm.weight holds values that are not finite"),
    "integers for weights": (wrong_dtype, UnsupportedCheckpoint, "has the dtype I32"),
    "missing tensor": (lambda f: edit_tensors(f, norm__weight=...), BrokenCheckpoint, "norm.weight is missing"),
    "surplus tensor": (
        lambda f: edit_tensors(f, score__weight=np.ones(4, dtype=np.float32)),
        BrokenCheckpoint,
        "score.weight is in the weights",
    ),
    "shard that is not there": (shard_without_file, BrokenCheckpoint, "model-00002-of-00002.safetensors: no such file"),
    "shard that lacks a tensor": (shard_index_misplaces, BrokenCheckpoint, "which the shard index places there"),
    "shards in another folder": (
        shards_elsewhere,
        UnsupportedCheckpoint,
        "index.json: names 'other/model-0000[12]-of-00002.safetensors', which is no file beside it. Move",
    ),
    "no pooling module": (remove("modules.json"), BrokenCheckpoint, "State it with --pooling last"),
    "damaged modules": (
        write("modules.json", '[{"idx": 0}]'),
        BrokenCheckpoint,
        "modules.json: is damaged, or not what it should be",
    ),
    "modules that are no list": (write("modules.json", "5"), BrokenCheckpoint, "modules.json: is damaged"),
    "shard index that is no table": (
        index_alone('{"weight_map": {"a": 5}}'),
        BrokenCheckpoint,
        r"index.json: is damaged, .*weight_map\.a: ",
    ),
    "shard index without files": (
        index_alone('{"weight_map": {}}'),
        BrokenCheckpoint,
        "has an empty 'weight_map'",
    ),
    "dense module": (
        write("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]'),
        UnsupportedCheckpoint,
        "modules.json: has Dense; f2gguf converts Transformer, Pooling, Dense, Normalize, in this order",
    ),
    "two pooling modes": (
        edit("1_Pooling/config.json", pooling_mode_mean_tokens=True),
        UnsupportedCheckpoint,
        "pools by mean and lasttoken; last token, mean or CLS",
    ),
    "no tokenizer": (remove("tokenizer.json"), BrokenCheckpoint, "tokenizer.json: no such file"),
    "broken tokenizer": (cut_file("tokenizer.json", 0.5), BrokenCheckpoint, "tokenizer.json: does not parse"),
    "tokenizer that does not hold together": (
        edit("tokenizer.json", pre_tokenizer={"type": "Nonsense"}),
        BrokenCheckpoint,
        "tokenizer.json: is no working tokenizer",
    ),
    "tokenizer of another kind": (
        lambda f: (
            edit_json(f / "tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
            edit_json(f / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
        ),
        UnsupportedCheckpoint,
        "the tokenizer 'WordLevel' is not supported",
    ),
    "tokenizer.json of another class": (
        edit("tokenizer.json", model={"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}),
        Disagreement,
        r"the tokenizer_class is 'Qwen2TokenizerFast', which takes BPE, but .*tokenizer.json holds",
    ),
    "unknown split pattern": (other_split_pattern, UnsupportedCheckpoint, r"no pre-tokenizer for its split '\\\\w\+"),
    "token ids past the vocabulary": (
        lambda f: (
            edit_json(f / "config.json", vocab_size=16000),
            edit_tensors(f, embed_tokens__weight=np.ones((16000, 32), np.float32)),
        ),
        BrokenCheckpoint,
        "token ids past config.json's vocab_size 16000",
    ),
    "width that is no number": (
        edit("config.json", hidden_size="32"),
        BrokenCheckpoint,
        "hidden_size is '32', which is not",
    ),
    "epsilon that is no number": (edit("config.json", rms_norm_eps=-1), BrokenCheckpoint, "rms_norm_eps is -1"),
    "giant vocabulary": (edit("config.json", vocab_size=2**31 - 1), BrokenCheckpoint, "but config.json implies"),
    "prompts that are no texts": (
        edit("config_sentence_transformers.json", prompts={"query": 5}),
        BrokenCheckpoint,
        "config_sentence_transformers.json: is damaged",
    ),
    "maximum length that is no number": (
        edit("sentence_bert_config.json", max_seq_length="x"),
        BrokenCheckpoint,
        "max_seq_length is 'x'",
    ),
    "lower-casing outside the tokenizer": (
        edit("sentence_bert_config.json", do_lower_case=True),
        UnsupportedCheckpoint,
        "do_lower_case is True",
    ),
    "closing token under two ids": (
        lambda f: edit_tokens(f, {"id": 16380, "content": "<mask>", "special": True}),
        BrokenCheckpoint,
        r"its post-processor gives <\|im_end\|> the id 16383, its vocabulary 16384",
    ),
    "tensor twice": (
        lambda f: edit_tensors(f, model__norm__weight=np.ones(32, dtype=np.float32)),
        BrokenCheckpoint,
        "a tensor twice",
    ),
    "nothing closes a text": (
        edit("tokenizer.json", post_processor=None),
        BrokenCheckpoint,
        r"which token ends a text. State it with --eos-token TOKEN \(or none\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named(case: str, tiny: Path, tmp_path: Path) -> None:
    damage, kind, message = CASES[case]
    damage(tiny)
    with pytest.raises(kind, match=message):
        convert(facts_of(tiny), tmp_path / "x.gguf")


def test_a_type_that_cannot_be_converted_is_named_before_rows_are_taken(tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "bert")
    positions = load_file(folder / "model.safetensors")["embeddings.position_embeddings.weight"]
    edit_tensors(folder, embeddings__position_embeddings__weight=positions.astype(np.float64))
    with pytest.raises(UnsupportedCheckpoint, match=r"position_embeddings.weight has the dtype F64; BF16, F16 and F32"):
        facts_of(folder)


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, ValueError])
def test_error_of_our_own_code_is_not_called_damage(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("ours")

    monkeypatch.setattr(weights_module, "_stored_tensor", fail)
    with pytest.raises(error, match="ours"):
        facts_of(tiny)
    monkeypatch.undo()
    monkeypatch.setattr(vocabulary_module, "_tokens", fail)
    with pytest.raises(error, match="ours"):
        facts_of(tiny)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"pooling": "mean"}, r"models.lock says mean pooling for tiny, but .*modules.json leads to last"),
        (
            {"eos_token": "<|endoftext|>"},
            r"models.lock or --eos-token says that texts end with <\|endoftext\|>, but .*tokenizer.json",
        ),
        (
            {"prompts": {"query": "query: "}},
            r"models.lock gives tiny the query prompt 'query: ', but .*config_sentence",
        ),
        ({"matryoshka_dims": (64,)}, r"up to 64 dimensions, but .*config.json has a hidden_size of 32"),
    ],
)
def test_lock_and_checkpoint_that_disagree_are_both_named(tiny: Path, stated: dict[str, object], message: str) -> None:
    with pytest.raises(Disagreement, match=message):
        facts_of(tiny, **stated)


def test_wrong_layer_types_of_the_80m_are_ignored(tiny: Path) -> None:
    edit_json(tiny / "config.json", layer_types=["full_attention"] * 28)
    assert facts_of(tiny).checkpoint.count("num_hidden_layers") == 2


def test_wrong_width_in_the_pooling_module_is_ignored(tiny: Path) -> None:
    edit_json(tiny / "1_Pooling" / "config.json", word_embedding_dimension=1024)
    assert facts_of(tiny).n_embd == 32


def test_pooling_may_be_stated_by_the_new_single_word(tiny: Path) -> None:
    (tiny / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "lasttoken"}')
    assert facts_of(tiny).pooling == "last"


def test_built_in_checkpoint_is_untouched_by_the_cases() -> None:
    assert (NANO / "modules.json").exists()
