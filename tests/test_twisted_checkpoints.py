"""Checkpoints that state their facts in unusual places: the same ids and vectors as sentence-transformers, or refused.

A twist is a function that changes a copy of a small checkpoint. What it must become is never written down here: it is
what sentence-transformers computes from the same folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import edit_json, edit_tensors, save_tensors, tiny_tensors, write_tiny_bert
from conftest import facts_of
from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES
from f2gguf.quantize.checkpoint.config_keys import known_keys
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.source.facts import Stated
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BrokenCheckpoint, CheckpointError, ConfigKeyWarning, UnsupportedCheckpoint, WrongUsage
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

Twist = Callable[[Path], object]
MODULE = "sentence_transformers.models."
TEXTS = (
    "",
    "a lighthouse",
    "Paris in FRANCE, 1999: Ça va?  Übung macht den Meister",
    "query: 量子コンピュータ and 👍🏽",
    " ".join(f"Step {i}: add {7 * i % 90} grams of flour and stir." for i in range(12)),
)
OVER_EVERY_LIMIT = TEXTS[-1] * 10  # for token ids only: attention over it would take most of the time


def edit(name: str, **changes: Any) -> Twist:
    def twist(folder: Path) -> None:
        path = folder / name
        if not path.exists():
            path.write_text("{}")
        edit_json(path, **changes)

    return twist


def both(*twists: Twist) -> Twist:
    def twist(folder: Path) -> None:
        for one in twists:
            one(folder)

    return twist


def remove(*names: str) -> Twist:
    return lambda folder: [(folder / name).unlink() for name in names]


def modules(**paths: str) -> Twist:
    """modules.json with these modules, in this order, at these paths."""
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": MODULE + kind} for i, (kind, path) in enumerate(paths.items())
    ]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(rows))


def normalize(**stated: object) -> Twist:
    """The file of the module Normalize."""

    def twist(folder: Path) -> None:
        (folder / "2_Normalize").mkdir(exist_ok=True)
        (folder / "2_Normalize" / "config.json").write_text(json.dumps(stated))

    return twist


def shared_name(folder: Path) -> None:
    """A Dropout that has the name of Normalize, and so takes its place."""
    modules(Transformer="", Pooling="1_Pooling", Normalize="2_Normalize", Dropout="3_Dropout")(folder)
    rows = json.loads((folder / "modules.json").read_text())
    rows[3]["name"] = rows[2]["name"]
    (folder / "modules.json").write_text(json.dumps(rows))


def saved_again(folder: Path) -> None:
    model = sentence_transformer(folder)
    shutil.rmtree(folder)
    model.save_pretrained(str(folder))


def moved_modules(folder: Path) -> None:
    (folder / "0_Transformer").mkdir()
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    (folder / "1_Pooling").rename(folder / "pooling of mine")
    modules(Transformer="0_Transformer", Pooling="pooling of mine", Normalize="2_Normalize")(folder)


def sharded(folder: Path) -> None:
    save_tensors(folder, load_file(folder / "model.safetensors"), n_shards=3)


def stale_index(folder: Path) -> None:
    index = {"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_shards_beside(folder: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    save_tensors(folder, tiny_tensors(seed=5), n_shards=2)
    (folder / "model.safetensors").write_bytes(single)


def named_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    save_tensors(folder, tiny_tensors(seed=5))
    edit_json(folder / "config.json", transformers_weights="mine.safetensors")


def prefixed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    head = np.ones((16384, 32), dtype=np.float32)
    save_tensors(folder, {"lm_head.weight": head, **{f"model.{name}": tensor for name, tensor in tensors.items()}})
    edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)


def mixed_types(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    half = {name: tensor.astype(np.float16) for name, tensor in list(tensors.items())[::2]}
    save_tensors(folder, tensors | half)


PLAIN = {"method": "forward", "method_output_name": "last_hidden_state"}
POOLING = "1_Pooling/config.json"
ONE_WORD = {"pooling_mode_lasttoken": ..., "pooling_mode_mean_tokens": ...}
SETTINGS = "sentence_bert_config.json"
PROMPTS = {"query": "Find: ", "passage": "Text: ", "mine": "Mine: ", "none": None}

TWISTS: dict[str, Twist] = {
    "as it is": lambda folder: None,
    "saved again": saved_again,
    "modules elsewhere": moved_modules,
    "sharded": sharded,
    "a stale index beside the weights": stale_index,
    "other shards beside the weights": other_shards_beside,
    "weights that config.json names": named_weights,
    "weights of a causal LM": prefixed,
    "weights of several types": mixed_types,
    "attention both ways, mean": both(
        edit("config.json", is_causal=False), edit(POOLING, **ONE_WORD, pooling_mode="mean")
    ),
    "attention both ways, last token": edit("config.json", is_causal=False),
    "causal, mean": edit(POOLING, **ONE_WORD, pooling_mode="mean"),
    "causal, CLS": edit(POOLING, **ONE_WORD, pooling_mode="cls"),
    "pooling in a list": edit(POOLING, **ONE_WORD, pooling_mode=["lasttoken"]),
    "pooling by one word, against the old keys": edit(POOLING, pooling_mode="mean"),
    "no pooling key": edit(POOLING, **ONE_WORD),
    "not normalised": modules(Transformer="", Pooling="1_Pooling"),
    "a Normalize that states its vectors": normalize(
        module_input_name="sentence_embedding", module_output_name="sentence_embedding"
    ),
    "a dropout module": modules(Transformer="", Pooling="1_Pooling", Dropout="2_Dropout", Normalize=""),
    "the tokenizer's limit": both(remove(SETTINGS), edit("tokenizer_config.json", model_max_length=24)),
    "the tokenizer's old limit": both(
        remove(SETTINGS), edit("tokenizer_config.json", max_len=24, model_max_length=...)
    ),
    "no limit but the model's": both(
        remove(SETTINGS),
        edit("tokenizer_config.json", model_max_length=1e30),
        edit("config.json", max_position_embeddings=40),
    ),
    "a limit over the tokenizer's": both(
        edit(SETTINGS, max_seq_length=60), edit("tokenizer_config.json", model_max_length=24)
    ),
    "a limit in another file": both(
        remove(SETTINGS), edit("sentence_roberta_config.json", max_seq_length=31, do_lower_case=False)
    ),
    "a limit among arguments": edit(SETTINGS, max_seq_length=60, tokenizer_args={"model_max_length": 33}),
    "prompts of other names": edit("config_sentence_transformers.json", prompts=PROMPTS),
    "a default prompt": edit("config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="mine"),
    "a default prompt that is empty": edit(
        "config_sentence_transformers.json", prompts={"query": "Find: "}, default_prompt_name="document"
    ),
    "one RoPE table": edit(
        "config.json", rope_theta=..., rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "two RoPE tables": edit(
        "config.json", rope_scaling={"type": "default", "rope_theta": 4e4}, rope_parameters={"rope_theta": 5e5}
    ),
    "heads of the usual width left out": both(
        edit("config.json", head_dim=...), lambda folder: save_tensors(folder, tiny_tensors(head_dim=128))
    ),
}
BERT_TWISTS: dict[str, Twist] = {
    "as it is": lambda folder: None,
    "saved again": saved_again,
    "the smaller limit": both(remove(SETTINGS), edit("tokenizer_config.json", model_max_length=1000)),
    "the tokenizer's limit": both(remove(SETTINGS), edit("tokenizer_config.json", model_max_length=17)),
    "CLS": edit(POOLING, pooling_mode_mean_tokens=..., pooling_mode="cls"),
    "last token": edit(POOLING, pooling_mode="lasttoken"),
    "settings of today": lambda folder: (folder / SETTINGS).write_text(
        json.dumps(
            {
                "transformer_task": "feature-extraction",
                "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
            }
        )
    ),
}


def sentence_transformer(folder: Path) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, local_files_only=True)


def require_same(folder: Path, path: Path) -> None:
    """The folder's file gives the token ids and vectors of sentence-transformers, for every way to encode."""
    right = sentence_transformer(folder)
    convert(facts_of(folder), path, dtype="f32")
    with Embedder(path) as model:
        assert model.max_seq_length == min(right.max_seq_length, model.header.n_ctx_train)
        for text in (*TEXTS, OVER_EVERY_LIMIT):
            assert model.tokenize(text).tolist() == right.tokenize([text])["input_ids"][0].tolist()
        for way in ("encode", "encode_query", "encode_document"):
            ours, theirs = (getattr(one, way)(list(TEXTS)) for one in (model, right))
            lengths = [np.linalg.norm(vectors, axis=1) for vectors in (ours, theirs)]
            assert lengths[0] == pytest.approx(lengths[1], rel=1e-3), way
            assert np.einsum("ij,ij->i", ours, theirs) / np.multiply(*lengths) == pytest.approx(1, abs=1e-5), way


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.TruncationWarning")
@pytest.mark.parametrize("twist", TWISTS)
def test_a_twisted_qwen3_is_what_sentence_transformers_computes(twist: str, tiny: Path, tmp_path: Path) -> None:
    TWISTS[twist](tiny)
    require_same(tiny, tmp_path / "x.gguf")


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.TruncationWarning")
@pytest.mark.parametrize("twist", BERT_TWISTS)
def test_a_twisted_bert_is_what_sentence_transformers_computes(twist: str, tmp_path: Path) -> None:
    folder = write_tiny_bert(tmp_path / "tiny")
    BERT_TWISTS[twist](folder)
    require_same(folder, tmp_path / "x.gguf")


def adapter_beside(folder: Path) -> None:
    stated = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(stated))


def adapter_alone(folder: Path) -> None:
    adapter_beside(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def quantized_tensors(folder: Path) -> None:
    edit_tensors(folder, layers__0__mlp__up_proj__qweight=np.ones((8, 32), dtype=np.int32))


def cut_at_the_beginning(folder: Path) -> None:
    truncation = {"direction": "Left", "max_length": 24, "strategy": "LongestFirst", "stride": 0}
    edit_json(folder / "tokenizer.json", truncation=truncation)


def dense_file(folder: Path) -> None:
    (folder / "2_Dense").mkdir()
    stated = {"in_features": 32, "out_features": 32, "bias": False}
    stated["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(stated))
    save_tensors(folder / "2_Dense", {"linear.weight": np.ones((32, 32), np.float32)})


CONFIG, PROMPT_FILE = "config.json", "config_sentence_transformers.json"
REFUSED: dict[str, tuple[Twist, str]] = {
    "a LoRA adapter beside the weights": (
        adapter_beside,
        r"adapter_config.json: is a LORA adapter of org/base.*merge_and",
    ),
    "a LoRA adapter alone": (adapter_alone, r"adapter_config.json: is a LORA adapter of org/base.*merge_and_unload"),
    "GPTQ": (
        edit(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"config.json: quantization_config says .* quantised \(gptq\). f2gguf needs the original",
    ),
    "MLX": (edit(CONFIG, quantization={"group_size": 64, "bits": 4}), r"quantization says .* \(4 bits\)"),
    "quantised tensors": (
        quantized_tensors,
        "model.safetensors: its tensor layers.0.mlp.up_proj.qweight is of quantised",
    ),
    "weights named outside": (
        edit(CONFIG, transformers_weights="../x.safetensors"),
        "transformers_weights is '../x.saf",
    ),
    "a dense module": (
        both(modules(Transformer="", Pooling="1_Pooling", Dense="2_Dense"), dense_file),
        "modules.json: has Dense modules, which llama.cpp does not compute for its architecture qwen3",
    ),
    "a module of its own": (
        lambda f: (f / "modules.json").write_text('[{"type": "custom_st.Transformer", "path": ""}]'),
        "modules.json: the module custom_st.Transformer is code of the repository's own",
    ),
    "modules in another order": (
        modules(Pooling="1_Pooling", Transformer=""),
        "has Pooling, Transformer; f2gguf converts",
    ),
    "modules of one name": (
        shared_name,
        "modules.json: two modules are called '2', of which sentence-transformers runs",
    ),
    "a Normalize of tokens": (
        normalize(module_input_name="token_embeddings"),
        "2_Normalize/config.json: module_input_name is 'token_embeddings'; f2gguf converts a Normalize of",
    ),
    "a Normalize into another place": (normalize(module_output_name="unit"), "module_output_name is 'unit'"),
    "half a letter in a prompt": (
        lambda folder: (folder / PROMPT_FILE).write_text(r'{"prompts": {"query": "\uD800: "}}'),
        r"config_sentence_transformers.json: does not parse as JSON: .*surrogates not allowed",
    ),
    "half a letter as bytes": (
        lambda folder: (folder / PROMPT_FILE).write_bytes(b'{"prompts": {"query": "\xed\xa0\x80: "}}'),
        r"config_sentence_transformers.json: does not parse as JSON: 'utf-8' codec can't decode",
    ),
    "a module outside": (modules(Transformer="../up"), r"modules.json: its path '../up' leads out"),
    "two poolings": (edit(POOLING, **ONE_WORD, pooling_mode=["mean", "cls"]), "pools by mean and cls;"),
    "another pooling": (edit(POOLING, **ONE_WORD, pooling_mode="weightedmean"), "pools by weightedmean;"),
    "prompt left out of the mean": (edit(POOLING, include_prompt=False), "include_prompt is false"),
    "texts cut at the beginning": (
        cut_at_the_beginning,
        r"tokenizer.json: long texts are cut at their beginning \(Left\)",
    ),
    "texts cut at the beginning, as the configuration says": (
        edit("tokenizer_config.json", truncation_side="left"),
        r"tokenizer_config.json: long texts are cut at their beginning \(left\)",
    ),
    "one limit for queries": (edit(SETTINGS, query_length=16), "sentence_bert_config.json: query_length is 16"),
    "texts as messages": (
        edit(SETTINGS, modality_config={"text": PLAIN, "message": {**PLAIN, "format": "flat"}}),
        "modality_config is",
    ),
    "a configuration elsewhere": (
        edit(SETTINGS, config_args={"is_causal": False}),
        "sentence_bert_config.json: config_kwargs sets is_causal to False",
    ),
    "an unknown setting": (edit(SETTINGS, lower_everything=True), "does not know its key 'lower_everything'"),
    "a width of its own": (edit(PROMPT_FILE, truncate_dim=16), "config_sentence_transformers.json: truncate_dim is 16"),
    "a sparse encoder": (edit(PROMPT_FILE, model_type="SparseEncoder"), "is of a SparseEncoder"),
    "attention in windows": (edit(CONFIG, layer_types=["full_attention", "sliding_attention"]), "layer_types has"),
    "windows for all": (edit(CONFIG, use_sliding_window=True, sliding_window=64), "use_sliding_window is True"),
    "a partial rotation": (
        edit(CONFIG, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "RoPE scaling is not supported: {.*partial_rotary_factor",
    ),
    "a rotation for each kind of layer": (
        edit(CONFIG, rope_scaling={"full_attention": {"rope_theta": 1e4}}),
        "RoPE scaling is not supported",
    ),
    "code of its own": (
        edit(CONFIG, auto_map={"AutoModel": "m.M"}),
        "does not know auto_map = .*--allow-config-key auto_map",
    ),
    "a class of its own": (
        edit(CONFIG, architectures=["Qwen3BidirectionalModel"]),
        r"does not know architectures = \['Qwen3BidirectionalModel'\].*--allow-config-key architectures",
    ),
    "both ways by another key": (
        edit(CONFIG, use_bidirectional_attention=True),
        "does not know use_bidirectional_attention = True.*--allow-config-key use_bidirectional_attention",
    ),
    "an unknown key of the arithmetic": (
        edit(CONFIG, residual_multiplier=0.22),
        "does not know residual_multiplier = 0.22",
    ),
    "an unknown key that is off": (edit(CONFIG, use_rope=False), "does not know use_rope = False"),
    "other values in a layer": (edit(CONFIG, per_layer_config={"0": {"head_dim": 4}}), "per_layer_config is"),
    "an attention direction that is no flag": (edit(CONFIG, is_causal="no"), "is_causal is 'no'"),
}


@pytest.mark.parametrize("twist", REFUSED)
def test_a_twist_that_llama_cpp_cannot_follow_is_refused(twist: str, tiny: Path) -> None:
    change, message = REFUSED[twist]
    change(tiny)
    with pytest.raises(CheckpointError, match=message):
        facts_of(tiny)


BERT_REFUSED: dict[str, tuple[Twist, str]] = {
    "a decoder": (edit(CONFIG, is_decoder=True), "is_decoder is True"),
    "causal": (edit(CONFIG, is_causal=True), "is_causal is True"),
    "another activation": (edit(CONFIG, hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "relative positions": (
        edit(CONFIG, position_embedding_type="relative_key"),
        "position_embedding_type is 'relative",
    ),
    "heads that were cut off": (edit(CONFIG, pruned_heads={"0": [1]}), "pruned_heads is"),
}


@pytest.mark.parametrize("twist", BERT_REFUSED)
def test_a_bert_that_llama_cpp_cannot_follow_is_refused(twist: str, tmp_path: Path) -> None:
    change, message = BERT_REFUSED[twist]
    folder = write_tiny_bert(tmp_path / "tiny")
    change(folder)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        facts_of(folder)


def test_a_key_may_be_allowed_by_name(tiny: Path) -> None:
    edit_json(tiny / CONFIG, residual_multiplier=1.0, auto_map={"AutoModel": "m.M"})
    stated = Stated(allowed_keys=("residual_multiplier", "auto_map"))
    assert facts_of(tiny, stated).pooling == "last"
    with pytest.raises(WrongUsage, match=r"--allow-config-key rope_thet: .*config.json has no such key"):
        facts_of(tiny, Stated(allowed_keys=("rope_thet",)))


def test_an_unknown_key_elsewhere_is_a_warning(tiny: Path) -> None:
    edit_json(tiny / CONFIG, favourite_colour="blue", mood=None)
    with pytest.warns(ConfigKeyWarning, match="does not know favourite_colour, mood; taken to be without effect"):
        facts_of(tiny)


NOT_NORMALIZED = modules(Transformer="", Pooling="1_Pooling")


@pytest.mark.parametrize(
    "twist",
    [
        edit(PROMPT_FILE, similarity_fn_name="euclidean"),
        both(NOT_NORMALIZED, edit(PROMPT_FILE, similarity_fn_name="dot")),
    ],
)
def test_vectors_that_are_not_compared_by_cosine_are_a_warning(twist: Twist, tiny: Path) -> None:
    twist(tiny)
    with pytest.warns(ConfigKeyWarning, match=r"similarity_fn_name is '\w+'. The vectors are the checkpoint's, but"):
        facts_of(tiny)


@pytest.mark.parametrize("name", ["cosine", "dot", None])
def test_of_vectors_of_length_1_the_product_is_the_cosine(name: str | None, tiny: Path) -> None:
    edit_json(tiny / PROMPT_FILE, similarity_fn_name=name)
    facts_of(tiny)  # warnings are errors in tests


QWEN3_EMBEDDING = """
    architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size
    initializer_range intermediate_size max_position_embeddings max_window_layers model_type num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_scaling rope_theta sliding_window tie_word_embeddings
    torch_dtype transformers_version use_cache use_sliding_window vocab_size
"""
F2LLM = f"{QWEN3_EMBEDDING} layer_types dtype pad_token_id"


GTE_QWEN2 = """
    _name_or_path architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range
    intermediate_size is_causal max_position_embeddings max_window_layers model_type num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_theta sliding_window tie_word_embeddings torch_dtype
    transformers_version use_cache use_sliding_window vocab_size
"""
NOMIC = """
    activation_function architectures attn_pdrop bos_token_id causal dense_seq_output embd_pdrop eos_token_id
    fused_bias_fc fused_dropout_add_ln initializer_range layer_norm_epsilon max_trained_positions mlp_fc1_bias
    mlp_fc2_bias model_type n_embd n_head n_inner n_layer n_positions pad_vocab_size_multiple parallel_block
    parallel_block_tied_norm prenorm qkv_proj_bias reorder_and_upcast_attn resid_pdrop rotary_emb_base
    rotary_emb_fraction rotary_emb_interleaved rotary_emb_scale_base rotary_scaling_factor
    scale_attn_by_inverse_layer_idx scale_attn_weights summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj torch_dtype transformers_version type_vocab_size use_cache use_flash_attn
    use_rms_norm use_xentropy vocab_size
"""
MODERNBERT = """
    architectures attention_bias attention_dropout bos_token_id classifier_activation classifier_bias
    classifier_dropout classifier_pooling cls_token_id decoder_bias deterministic_flash_attn embedding_dropout
    eos_token_id global_attn_every_n_layers global_rope_theta gradient_checkpointing hidden_activation hidden_size
    initializer_cutoff_factor initializer_range intermediate_size layer_norm_eps local_attention local_rope_theta
    max_position_embeddings mlp_bias mlp_dropout model_type norm_bias norm_eps num_attention_heads num_hidden_layers
    pad_token_id position_embedding_type reference_compile repad_logits_with_grad sep_token_id
    sparse_pred_ignore_index sparse_prediction tie_word_embeddings torch_dtype transformers_version vocab_size
"""
PUBLISHED = [("qwen3", QWEN3_EMBEDDING), ("qwen3", F2LLM), ("qwen2", GTE_QWEN2), ("nomic_bert", NOMIC)]
PUBLISHED += [("modernbert", MODERNBERT)]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_key_of_transformers_own_configuration_is_known(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    stated = CONFIG_MAPPING[kind](num_labels=3, id2label={0: "a", 1: "b", 2: "c"}).to_dict()
    assert stated.keys() - known_keys(ARCHITECTURES[kind].keys) == set()


@pytest.mark.parametrize(("kind", "keys"), PUBLISHED)
def test_every_key_of_published_models_is_known(kind: str, keys: str) -> None:
    assert set(keys.split()) - known_keys(ARCHITECTURES[kind].keys) == set()


def test_pooling_may_be_stated_where_its_file_is_missing(tiny: Path) -> None:
    shutil.rmtree(tiny / "1_Pooling")
    with pytest.raises(
        BrokenCheckpoint, match=r"lacks 1_Pooling/config.json, which modules.json names.*--pooling last"
    ):
        facts_of(tiny)
    assert facts_of(tiny, Stated(pooling="last")).pooling == "last"


def test_a_snapshot_of_the_hub_has_the_name_of_its_repository(tiny: Path, tmp_path: Path) -> None:
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock

    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--org--my-model" / "snapshots" / commit
    shutil.copytree(tiny, snapshot)
    entry, folder = find_model(str(snapshot), read_lock())
    assert (entry.name, entry.repo, entry.revision, folder) == ("my-model", "org/my-model", commit, snapshot)
    alone = shutil.copytree(tiny, tmp_path / commit)
    with pytest.raises(WrongUsage, match=r"the folder's name is a commit, is empty, or .*--name NAME"):
        find_model(str(alone), read_lock())
    assert find_model(str(alone), read_lock(), name="mine")[0].name == "mine"
    with pytest.raises(WrongUsage, match="--name a/b: is no name of files"):
        find_model(str(alone), read_lock(), name="a/b")


@pytest.mark.parametrize("name", ["two\nlines", "bell\x07"])
def test_a_folder_whose_name_no_card_can_hold_asks_for_a_name(name: str, tmp_path: Path) -> None:
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock

    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(WrongUsage, match=r"holds what cannot be printed.*--name NAME"):
        find_model(str(folder), read_lock())
    assert find_model(str(folder), read_lock(), name="mine")[0].name == "mine"


def test_a_folder_whose_path_is_no_utf8_is_refused(tmp_path: Path) -> None:
    from f2gguf.quantize.source.fetch import find_model
    from f2gguf.quantize.source.lock import read_lock

    folder = tmp_path / os.fsdecode(b"caf\xe9") / "model"
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(WrongUsage, match=r"path is no UTF-8. Rename it"):
        find_model(str(folder), read_lock(), name="mine")
