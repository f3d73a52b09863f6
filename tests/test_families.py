"""Every family that converts: random checkpoints of its shape, saved by transformers, give transformers' own vectors.

Weights, norms and biases are spread, so that one that is dropped, swapped or shifted shows.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from checkpoints import MINILM, NANO, edit_json
from conftest import NO_TRANSFORMERS, Run, facts_of
from dialects import as_gemma, as_granite_97m, as_llama, as_mistral, as_modernbert, as_roberta
from f2gguf.evals.diagnosis import likely_cause
from f2gguf.evals.drift import drift
from f2gguf.evals.full_precision import streamed_vectors, transformers_vectors
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES, REFUSED, architecture_of, match_tensors
from f2gguf.quantize.checkpoint.folder import Checkpoint
from f2gguf.quantize.checkpoint.modules import Modules, Prompts
from f2gguf.quantize.convert.readback import checkpoint_ids, read_back
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.release.check import read_release
from f2gguf.quantize.repair.assemble import Scale
from f2gguf.quantize.repair.codes.layers import Shape, Texts, final_norm, first_states, pooled, run_layer
from f2gguf.quantize.repair.rescale import places, scales
from f2gguf.quantize.repair.tensors import DENSE, Rows, Weights
from f2gguf.quantize.report.report import read_report
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BrokenCheckpoint, CheckpointError, UnsupportedCheckpoint
from safetensors.numpy import save_file
from unigram import as_xlm_roberta

pytestmark = pytest.mark.slow
TEXTS = [text.text for text in load_texts()[::80]]
LONG = " ".join(text.text for text in load_texts()[:60])[:2000]  # crosses every window


@dataclass(frozen=True)
class Family:
    """A model_type, the configuration of its tiny model, and where its tokenizer comes from."""

    kind: str
    tokenizer: Path
    pooling: str
    config: Mapping[str, Any]
    edit: Callable[[Path], None] = lambda _: None  # of the tokenizer's files
    eos_token: str | None = None  # that must be stated
    dense: tuple[tuple[int, int], ...] = ()  # widths of Dense modules, in and out


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_attention_heads": 4}
DECODER = {**SIZES, "num_key_value_heads": 2, "vocab_size": 16384, "max_position_embeddings": 4096}
ENCODER = {**SIZES, "vocab_size": 30528, "max_position_embeddings": 2048}  # some rows more than tokens
XLM = {**SIZES, "vocab_size": 2880, "max_position_embeddings": 2050, "pad_token_id": 1, "type_vocab_size": 1}
MODERN = {**ENCODER, "num_hidden_layers": 5, "vocab_size": 16448, "local_attention": 32, "norm_eps": 1e-4}
# transformers gives the padding token no position of its own; f2llm-nano's token 189 (byte 1) is in none of the texts
ROBERTA = {**ENCODER, "vocab_size": 16448, "pad_token_id": 189}
# One KV head, heads wider than width / heads, and a window that texts cross
GEMMA = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
GEMMA |= {"vocab_size": 2735, "sliding_window": 32, "max_position_embeddings": 4096, "pad_token_id": 3}
GEMMA["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
LLAMA = {**DECODER, "vocab_size": 2735, "head_dim": 32, "pad_token_id": 3}
FAMILIES = {
    "qwen2": Family("qwen2", NANO, "last", DECODER),
    "qwen2 both ways": Family("qwen2", NANO, "mean", {**DECODER, "is_causal": False}),
    "qwen3 both ways": Family("qwen3", NANO, "mean", {**DECODER, "head_dim": 32, "is_causal": False}),
    "bert with Unigram": Family("bert", MINILM, "mean", {**ENCODER, "vocab_size": 2880}, as_xlm_roberta),
    "xlm-roberta": Family("xlm-roberta", MINILM, "cls", XLM, as_xlm_roberta),
    "nomic-bert": Family("nomic_bert", MINILM, "mean", ENCODER),
    "modernbert": Family("modernbert", NANO, "cls", MODERN, as_modernbert),
    "roberta": Family("roberta", NANO, "mean", ROBERTA, as_roberta),
    "embeddinggemma": Family(
        *("gemma3_text", NANO, "mean", {**GEMMA, "use_bidirectional_attention": True}, as_gemma),
        dense=((64, 96), (96, 64)),
    ),
    "gemma3 causal": Family("gemma3_text", NANO, "last", GEMMA, as_gemma),
    "mistral": Family("mistral", NANO, "last", {**LLAMA, "sliding_window": 2048}, as_mistral, eos_token="</s>"),
    "llama": Family("llama", NANO, "last", LLAMA, as_llama),
    "llama both ways": Family("llama", NANO, "mean", {**LLAMA, "is_causal": False}, as_llama),
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
            facts = facts_of(folder, eos_token=FAMILIES[name].eos_token)
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
    stored_less = float(family.kind == "gemma3_text")  # norms are stored less 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("weight") and parameter.dim() == 1
            spread = torch.exp(noise / 2) - stored_less if is_norm else noise * (0.4 if parameter.dim() == 1 else scale)
            parameter.copy_(spread)
    model.save_pretrained(folder)
    unwanted = shutil.ignore_patterns("*.safetensors", "config.json", "README.md")
    shutil.copytree(family.tokenizer, folder, ignore=unwanted, dirs_exist_ok=True)
    family.edit(folder)
    write_dense(folder, family.dense)
    mode = {"last": "lasttoken"}.get(family.pooling, family.pooling)
    pooling = {"embedding_dimension": config.hidden_size, "pooling_mode": mode}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    edit_json(folder / "sentence_bert_config.json", max_seq_length=2048)


def write_dense(folder: Path, widths: Sequence[tuple[int, int]]) -> None:
    """Dense modules between Pooling and Normalize."""
    rows = json.loads((folder / "modules.json").read_text())
    rng = np.random.default_rng(5)
    for i, (n_in, n_out) in enumerate(widths, start=2):
        place = f"{i}_Dense"
        (folder / place).mkdir()
        stated = {"in_features": n_in, "out_features": n_out, "bias": False}
        stated["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / place / "config.json").write_text(json.dumps(stated))
        weight = rng.standard_normal((n_out, n_in), dtype=np.float32) * 0.2
        save_file({"linear.weight": weight}, folder / place / "model.safetensors", metadata={"format": "pt"})
        rows.insert(i, {"idx": i, "name": place, "path": place, "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(rows))


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_transformers(name: str, make: Callable[[str], Made]) -> None:
    made, found = make(name), {}
    for dtype, path in made.paths.items():
        with Embedder(path) as model, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = [model.tokenize(text) for text in [*TEXTS, LONG]]
            found[dtype] = model.embed([*TEXTS, LONG]).vectors
    checkpoint = made.facts.checkpoint
    wanted = transformers_vectors(checkpoint.folder, ids, pooling=made.facts.pooling, dense=checkpoint.dense_paths)
    assert drift(found["f32"], wanted).max() < 1e-5
    assert drift(found["f16"], wanted).max() < 1e-4


@pytest.mark.parametrize("name", ["qwen2", "mistral", "llama both ways"])
def test_layers_in_turn_give_them_too(name: str, make: Callable[[str], Made]) -> None:
    checkpoint, pooling = make(name).facts.checkpoint, make(name).facts.pooling
    ids = checkpoint_ids(make(name).facts, TEXTS[:4])
    whole, streamed = (run(checkpoint.folder, ids, pooling=pooling) for run in (transformers_vectors, streamed_vectors))
    np.testing.assert_allclose(streamed, whole, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_checkpoint(name: str, make: Callable[[str], Made]) -> None:
    """Of hostile strings and added tokens too, by transformers' AutoTokenizer as well."""
    read_back(make(name).paths["f16"], make(name).facts, load_texts()[::20])


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
    found = pooled(final_norm(norm, states, shape), texts, weights.header.require_pooling())
    for name in sorted(name for name in weights.infos if name.startswith(DENSE)):
        found = found @ weights.rows(name).T
    return found


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
            CheckpointError,
            match=r"implies|no part of|missing|do not divide|head_dim is|layer_types has|in_features is",
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


def with_config(make: Callable[[str], Made], name: str, **changes: Any) -> Checkpoint:
    checkpoint = make(name).facts.checkpoint
    config = {key: value for key, value in {**checkpoint.config, **changes}.items() if value is not ...}
    return replace(checkpoint, config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 257}, "sliding_window is 257, which transformers saved after halving it: 512 was meant"),
        ({"query_pre_attn_scalar": 168}, "query_pre_attn_scalar is 168; llama.cpp computes such a model with 32"),
        ({"layer_types": ["full_attention", *GEMMA["layer_types"][1:]]}, "llama.cpp has every Nth layer of 4 see the"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "RoPE scaling is not supported: {'rope_type': 'lin"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters is {'rope_theta': 1000000.0}; full_attention and"),
        ({"use_bidirectional_attention": "yes"}, "use_bidirectional_attention is 'yes', which is not true or false"),
    ],
)
def test_what_llama_cpp_computes_otherwise_in_gemma_is_refused(
    changes: dict[str, Any], message: str, make: Callable[[str], Made]
) -> None:
    checkpoint = with_config(make, "embeddinggemma", **changes)
    with pytest.raises(CheckpointError, match=f"config.json: {message}|{message}"):
        architecture_of(checkpoint).facts(checkpoint)


def test_gemma_of_earlier_configurations_states_the_same(make: Callable[[str], Made]) -> None:
    """As google/embeddinggemma-300m has it: bases of RoPE by keys of their own."""
    facts = make("embeddinggemma").facts
    changes = {"rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
    checkpoint = with_config(make, "embeddinggemma", **changes, _sliding_window_pattern=6)
    assert architecture_of(checkpoint).facts(checkpoint) == facts.shape
    assert facts.shape["attention.sliding_window_pattern"] == 3
    usual = with_config(make, "embeddinggemma", layer_types=..., num_hidden_layers=24)
    assert architecture_of(usual).facts(usual)["attention.sliding_window_pattern"] == 6


def test_gemma_stays_causal_unless_it_says_that_it_is_not(make: Callable[[str], Made]) -> None:
    names = {name: make(name).facts.architecture.name for name in ("embeddinggemma", "gemma3 causal")}
    assert names == {"embeddinggemma": "gemma-embedding", "gemma3 causal": "gemma3"}


FEW = f"""{NO_TRANSFORMERS}
import f2gguf.evals.texts as texts
def load_texts(*path, load=texts.load_texts):
    return load(*path) if path else tuple(text for text in load() if text.id[:2] == "py")
texts.load_texts = load_texts
"""


def test_release_of_what_does_not_fit_f16_is_made_from_f32(
    make: Callable[[str], Made], run: Run, tmp_path: Path
) -> None:
    folder, out = tmp_path / "gemma", tmp_path / "dist" / "gemma"
    shutil.copytree(make("embeddinggemma").facts.checkpoint.root, folder, ignore=shutil.ignore_patterns("*.gguf"))
    options = ("--stock", "--variants", "Q8_0", "--max-drift", "0.5")
    process = run("quantize", "all", folder, *options, "--out", out.parent, prelude=FEW)
    assert process.returncode == 0, process.stderr
    report = read_report(out)
    assert (report.base, list(report.files)) == ("F32", ["F32", "Q8_0"])
    assert read_release(out).folder == out
    assert "Drift is 1 - cosine to the F32 file's vector" in (out / "README.md").read_text()


def test_mistral_serves_what_its_window_shows(make: Callable[[str], Made]) -> None:
    checkpoint = with_config(make, "mistral", sliding_window=100)
    assert architecture_of(checkpoint).facts(checkpoint)["context_length"] == 100
    assert make("mistral").facts.shape["context_length"] == 2048
    assert make("mistral").facts.vocabulary.is_eos_forced


FIRST = "2_Dense/config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_json(f / FIRST, bias=True),
            "2_Dense/config.json: bias is True; llama.cpp computes",
        ),
        (
            lambda f: edit_json(f / FIRST, activation_function=...),
            "activation_function is 'torch.nn.modules",
        ),
        (lambda f: edit_json(f / FIRST, use_residual=True), "use_residual is True; llama.cpp computes"),
        (
            lambda f: edit_json(f / FIRST, module_input_name="token_embeddings"),
            "module_input_name is 'token",
        ),
        (lambda f: edit_json(f / FIRST, scale=2), "f2gguf does not know its key 'scale'"),
        (lambda f: edit_json(f / FIRST, in_features=48), "in_features is 48, and what comes before gives 64"),
        (lambda f: edit_json(f / FIRST, out_features="96"), "out_features is '96', which is no width"),
        (
            lambda f: edit_json(f / "3_Dense/config.json", out_features=32),
            "vectors of width 32; llama.cpp gives",
        ),
        (lambda f: (f / FIRST).unlink(), "2_Dense/config.json: no such file"),
        (lambda f: (f / "3_Dense/model.safetensors").unlink(), "3_Dense/model.safetensors: no such file, but modules"),
        (
            lambda f: (f / "3_Dense/model.safetensors").rename(f / "3_Dense/pytorch_model.bin"),
            "3_Dense/pytorch_model.bin: is pickle",
        ),
        (
            lambda f: save_file({"linear.weight": np.ones((64, 96), np.float32)}, f / "2_Dense/model.safetensors"),
            r"2_Dense.linear.weight has the shape \(64, 96\), but config.json implies \(96, 64\)",
        ),
        (
            lambda f: save_file({"weight": np.ones((96, 64), np.float32)}, f / "2_Dense/model.safetensors"),
            "2_Dense.linear.weight is missing from the weights",
        ),
    ],
)
def test_dense_module_that_is_no_plain_product_is_refused(
    damage: Callable[[Path], object], message: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(make("embeddinggemma").facts.checkpoint.root, folder, ignore=shutil.ignore_patterns("*.gguf"))
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        facts_of(folder)


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


def test_nomics_own_form_of_the_configuration_states_the_same(make: Callable[[str], Made], tmp_path: Path) -> None:
    facts = make("nomic-bert").facts
    folder = tmp_path / "old"
    shutil.copytree(facts.checkpoint.root, folder, ignore=shutil.ignore_patterns("*.gguf"))
    (folder / "config.json").write_text(json.dumps(OLD_NOMIC))
    ids = [np.arange(n, dtype=np.int32) for n in (3, 90)]
    vectors = [transformers_vectors(it, ids, pooling="mean") for it in (folder, facts.checkpoint.root)]
    assert np.array_equal(*vectors), "gate 1 runs it as well"
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
        ("embeddinggemma", "rope.freq_base", 10.0, "the attention of layer 3 differs first"),  # which sees all
        ("gemma3 causal", "attention.sliding_window", 9, "the attention of layer 1 differs first"),
        ("mistral", "rope.freq_base", 10.0, "the attention of layer 1 differs first"),
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
