"""Every family that converts: random checkpoints of its shape, saved by transformers, give transformers' own vectors.

Weights, norms and biases are spread, so that one that is dropped, swapped or shifted shows.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from checkpoints import MINILM, NANO, edit_json
from conftest import facts_of
from dialects import as_granite_97m, as_modernbert, as_roberta
from f2gguf.evals.diagnosis import likely_cause
from f2gguf.evals.drift import drift
from f2gguf.evals.full_precision import streamed_vectors, transformers_vectors
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES, REFUSED, architecture_of, match_tensors
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.modules import Modules, Prompts
from f2gguf.quantize.convert.readback import read_back
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.repair.assemble import Scale
from f2gguf.quantize.repair.codes.layers import Shape, Texts, final_norm, first_states, pooled, run_layer
from f2gguf.quantize.repair.rescale import places, scales
from f2gguf.quantize.repair.tensors import Rows, Weights
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BrokenCheckpoint, CheckpointError, UnsupportedCheckpoint

pytestmark = pytest.mark.slow
TEXTS = [text.text for text in load_texts()[::48]]
LONG = " ".join(text.text for text in load_texts()[:60])[:2000]  # crosses every window


@dataclass(frozen=True)
class Family:
    """A model_type, the configuration of its tiny model, and where its tokenizer comes from."""

    kind: str
    tokenizer: Path
    pooling: str
    config: Mapping[str, Any]
    edit: Callable[[Path], None] = lambda _: None  # of the tokenizer's files


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "vocab_size": 16384, "max_position_embeddings": 4096}
ENCODER = {**SIZES, "vocab_size": 30528, "max_position_embeddings": 2048}  # some rows more than tokens
MODERN = {**ENCODER, "num_hidden_layers": 5, "vocab_size": 16448, "local_attention": 32, "norm_eps": 1e-4}
# transformers gives the padding token no position of its own; f2llm-nano's token 189 (byte 1) is in none of the texts
ROBERTA = {**ENCODER, "vocab_size": 16448, "pad_token_id": 189}
FAMILIES = {
    "qwen2": Family("qwen2", NANO, "last", DECODER),
    "qwen2 both ways": Family("qwen2", NANO, "mean", {**DECODER, "is_causal": False}),
    "qwen3 both ways": Family("qwen3", NANO, "mean", {**DECODER, "head_dim": 32, "is_causal": False}),
    "nomic-bert": Family("nomic_bert", MINILM, "mean", ENCODER),
    "modernbert": Family("modernbert", NANO, "cls", MODERN, as_modernbert),
    "roberta": Family("roberta", NANO, "mean", ROBERTA, as_roberta),
    "granite-97m": Family("modernbert", NANO, "cls", {**MODERN, "hidden_activation": "silu"}, as_granite_97m),
}


@dataclass(frozen=True)
class Made:
    """A family's checkpoint and its files."""

    facts: Facts
    paths: Mapping[str, Path]  # dtype -> file


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    made: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made:
            folder = tmp_path_factory.mktemp("families") / name.replace(" ", "-")
            write(FAMILIES[name], folder)
            facts = facts_of(folder)
            paths = {dtype: folder / f"{dtype}.gguf" for dtype in ("f32", "f16")}
            for dtype, path in paths.items():
                convert(facts, path, dtype=dtype)
            made[name] = Made(facts, paths)
        return made[name]

    return make


def write(family: Family, folder: Path) -> None:
    """Save a random model of the family, and what sentence-transformers needs beside it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = CONFIG_MAPPING[family.kind](**{"pad_token_id": 0, **family.config})
    model = AutoModel.from_config(config)
    generator, scale = torch.Generator().manual_seed(7), 1.2 / config.hidden_size**0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(torch.exp(noise / 2) if is_norm else noise * (0.4 if parameter.dim() == 1 else scale))
    model.save_pretrained(folder)
    unwanted = shutil.ignore_patterns("*.safetensors", "config.json", "README.md")
    shutil.copytree(family.tokenizer, folder, ignore=unwanted, dirs_exist_ok=True)
    family.edit(folder)
    mode = {"last": "lasttoken"}.get(family.pooling, family.pooling)
    pooling = {"embedding_dimension": config.hidden_size, "pooling_mode": mode}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    edit_json(folder / "sentence_bert_config.json", max_seq_length=2048)


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_transformers(name: str, make: Callable[[str], Made]) -> None:
    made, found = make(name), {}
    for dtype, path in made.paths.items():
        with Embedder(path) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = [model.tokenize(text) for text in [*TEXTS, LONG]]
            found[dtype] = model.embed([*TEXTS, LONG]).vectors
    wanted = transformers_vectors(made.facts.checkpoint.folder, ids, pooling=made.facts.pooling)
    assert drift(found["f32"], wanted).max() < 1e-5
    assert drift(found["f16"], wanted).max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_checkpoint(name: str, make: Callable[[str], Made]) -> None:
    """Of hostile strings and added tokens too, by transformers' AutoTokenizer as well."""
    read_back(make(name).paths["f16"], make(name).facts, load_texts()[::10])


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_llama_cpp_gives_the_same_vectors(name: str, make: Callable[[str], Made]) -> None:
    path = make(name).paths["f32"]
    texts = ["a lighthouse at dusk", "how do I keep bread fresh for a week?"]
    stock = llama_cpp.Llama(str(path), embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, verbose=False)
    theirs = np.array([stock.embed(text) for text in texts])
    stock.close()
    with Embedder(path) as model:
        assert drift(model.encode(texts, prompt=""), theirs).max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_arithmetic_gives_them_too_with_channels_scaled_or_not(name: str, make: Callable[[str], Made]) -> None:
    path = make(name).paths["f32"]
    with Embedder(path, max_tokens=400) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = [model.tokenize(text) for text in [*TEXTS[::3], LONG]]
        reference = model.embed([*TEXTS[::3], LONG]).vectors
    weights, texts = Weights(path), Texts.of(ids)
    assert places(weights.header), "every family has channels whose scale is free"
    for factors in ({}, any_scales(weights)):
        vectors = in_plain_arithmetic(weights, texts, factors)
        assert drift(vectors, reference[list(texts.order)]).max() < 2e-5


def any_scales(weights: Weights) -> dict[str, Scale]:
    """Every place scaled, as activations of widely different sizes would have it."""
    rng = np.random.default_rng(3)
    matrices = [info for info in weights.header.tensors if len(info.shape) == 2]
    imatrix = {info.name: rng.lognormal(0, 3, info.shape[1]).astype(np.float32) for info in matrices}
    return scales(weights, imatrix, {place.name: (0.5, 0.5) for place in places(weights.header)})


def in_plain_arithmetic(weights: Weights, texts: Texts, factors: Mapping[str, Scale]) -> Rows:
    shape = Shape(weights.header)

    def rows(name: str) -> Rows:
        return factors.get(name, Scale()).apply(weights.rows(name))

    def vectors(prefix: str) -> dict[str, Rows]:
        names = [n for n, info in weights.infos.items() if n.startswith(prefix) and len(info.shape) == 1]
        return {name.removeprefix(prefix): rows(name)[0] for name in names}

    states = first_states(weights, texts, {})
    for i in range(shape.n_layers):
        prefix, sent = f"blk.{i}.", None
        own = vectors(prefix)
        layer = run_layer(own, states, texts, shape.at(i))
        while True:
            names, states = layer.send(sent)
            if not names:
                break
            sent = [states @ rows(f"{prefix}{n}.weight").T + own.get(f"{n}.bias", 0) for n in names]
    norm = {f"output_norm.{name}": vector for name, vector in vectors("output_norm.").items()}
    return pooled(final_norm(norm, states, shape), texts, weights.header.require_pooling())


@pytest.mark.parametrize("kind", {family.kind: None for family in FAMILIES.values()})
def test_every_required_key_is_refused_by_name(kind: str, make: Callable[[str], Made]) -> None:
    checkpoint = make(next(name for name in FAMILIES if FAMILIES[name].kind == kind)).facts.checkpoint
    for key, values in ARCHITECTURES[kind].keys.required.items():
        other = not values[0] if isinstance(values[0], bool) else "another"
        with pytest.raises(CheckpointError, match=f"config.json: {key} is {other!r}"):
            architecture_of(replace(checkpoint, config={**checkpoint.config, key: other}))


@pytest.mark.parametrize("kind", {family.kind: None for family in FAMILIES.values()})
def test_every_size_must_be_that_of_the_tensors(kind: str, make: Callable[[str], Made]) -> None:
    checkpoint = make(next(name for name in FAMILIES if FAMILIES[name].kind == kind)).facts.checkpoint
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    for key in sizes:
        changed = replace(checkpoint, config={**checkpoint.config, key: checkpoint.config[key] + 1})
        with pytest.raises(
            CheckpointError, match=r"implies|no part of|missing|do not divide|head_dim is|layer_types has"
        ):
            ARCHITECTURES[kind].facts(changed)
            match_tensors(changed, ARCHITECTURES[kind])


@pytest.mark.parametrize("kind", {family.kind: None for family in FAMILIES.values()})
def test_every_tensor_is_missed_and_of_one_shape(kind: str, make: Callable[[str], Made]) -> None:
    checkpoint = make(next(name for name in FAMILIES if FAMILIES[name].kind == kind)).facts.checkpoint
    for name in {target.stored for target in ARCHITECTURES[kind].targets(checkpoint)}:
        tensor = checkpoint.tensors[name]
        others = {other: there for other, there in checkpoint.tensors.items() if other != name}
        with pytest.raises(CheckpointError, match="missing from the weights"):
            match_tensors(replace(checkpoint, tensors=others), ARCHITECTURES[kind])
        turned = replace(tensor, shape=tensor.shape[::-1] if len(set(tensor.shape)) > 1 else (*tensor.shape, 1))
        with pytest.raises(CheckpointError, match=f"{name} has the shape"):
            match_tensors(replace(checkpoint, tensors={**others, name: turned}), ARCHITECTURES[kind])


OLD_NOMIC = {
    "model_type": "nomic_bert",
    "architectures": ["NomicBertModel"],
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    **{"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 8192, "vocab_size": 30528},
    **{"type_vocab_size": 2, "layer_norm_epsilon": 1e-12, "rotary_emb_base": 1000, "rotary_scaling_factor": None},
    **{"activation_function": "swiglu", "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False},
    **{"qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False, "causal": False},
    **{"pad_vocab_size_multiple": 64, "use_rms_norm": False, "summary_type": "cls_index", "use_flash_attn": True},
}


def test_nomics_own_form_of_the_configuration_states_the_same(make: Callable[[str], Made]) -> None:
    facts = make("nomic-bert").facts
    old = replace(facts.checkpoint, config=OLD_NOMIC)
    architecture = architecture_of(old)
    assert architecture.facts(old) == facts.shape
    assert match_tensors(old, architecture) == facts.tensors


@pytest.mark.parametrize("key", ["n_inner", "rotary_emb_fraction", "mlp_fc1_bias", "rotary_emb_base"])
def test_nomics_own_form_lacks_no_key(key: str, make: Callable[[str], Made]) -> None:
    config = {name: value for name, value in OLD_NOMIC.items() if name != key}
    with pytest.raises(BrokenCheckpoint, match=f"has no {key!r}"):
        ARCHITECTURES["nomic_bert"].facts(replace(make("nomic-bert").facts.checkpoint, config=config))


@pytest.mark.parametrize("code", ["modeling_other.NomicBertModel", {"a": 1}, 3])
def test_other_code_of_the_repository_is_refused(code: Any, make: Callable[[str], Made]) -> None:
    config = {**OLD_NOMIC, "auto_map": {"AutoModel": code}}
    with pytest.raises(UnsupportedCheckpoint, match="does not know auto_map"):
        architecture_of(replace(make("nomic-bert").facts.checkpoint, config=config))


def test_qwen2s_code_of_its_own_must_say_whether_it_attends_both_ways(make: Callable[[str], Made]) -> None:
    checkpoint = make("qwen2").facts.checkpoint
    config = {**checkpoint.config, "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}
    with pytest.raises(UnsupportedCheckpoint, match="does not know auto_map"):
        architecture_of(replace(checkpoint, config=config))
    config["is_causal"] = False
    assert architecture_of(replace(checkpoint, config=config)).facts(checkpoint) == make("qwen2").facts.shape


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, tmp_path, {"model_type": kind}, {}, Modules(), Prompts(), None)
    with pytest.raises(UnsupportedCheckpoint, match=f"model_type '{kind}' cannot be converted: llama.cpp ha"):
        architecture_of(checkpoint)


@pytest.mark.parametrize(
    ("name", "key", "value", "cause"),
    [
        ("modernbert", "attention.sliding_window", 16, "the attention of layer 2 differs first"),
        ("modernbert", "rope.freq_base", 10.0, "the attention of layer 1 differs first"),
        ("nomic-bert", "rope.freq_base", 10.0, "the attention of layer 1 differs first"),
        ("nomic-bert", "attention.layer_norm_epsilon", 0.5, "the embedding layer differs first"),
        ("qwen2", "attention.layer_norm_rms_epsilon", 9.0, "the attention of layer 1 differs first"),
    ],
)
def test_gate_1_names_the_stage_that_differs(
    name: str, key: str, value: float, cause: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(name)
    shutil.copy(made.paths["f32"], tmp_path / "x.gguf")
    fill_in(tmp_path / "x.gguf", {f"{made.facts.architecture.name}.{key}": value})
    with Embedder(made.paths["f32"], max_tokens=100) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = model.tokenize(LONG)
    assert re.search(cause, likely_cause(tmp_path / "x.gguf", made.facts.checkpoint.folder, ids))


def test_qwen2_layer_by_layer_gives_the_whole_models_vectors(make: Callable[[str], Made]) -> None:
    folder, ids = make("qwen2").facts.checkpoint.folder, [np.arange(20, 60, dtype=np.int32)]
    whole, streamed = (run(folder, ids, pooling="last") for run in (transformers_vectors, streamed_vectors))
    assert drift(whole, streamed).max() < 1e-6
