"""Files in mteb: its scores are ours, and its prompts reach the tokens."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from checkpoints import edit_json, write_tiny
from conftest import Release, facts_of
from f2gguf.evals.mteb import encoder as mteb_encoder
from f2gguf.evals.mteb.encoder import F2ggufEncoder
from f2gguf.evals.mteb.tasks import local_tasks
from f2gguf.evals.neighbours import ndcg10
from f2gguf.evals.texts import EvalText, load_texts
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.source.lock import read_lock
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import ExtraMissing
from f2gguf.runtime.files import sha256_file
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.types import PromptType

LANGUAGES = {"en", "de", "hi", "ru"}
INSTRUCTION = "Given a riddle, retrieve its solution."
KINDS = (None, PromptType.query, PromptType.document)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: socket.socket, address: object) -> None:
        raise AssertionError(f"a test of mteb connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def texts() -> list[EvalText]:
    """Code and texts of a few languages, without the long ones and the queries that ask for those."""
    claimed = [text for text in load_texts() if text.kind == "code" or text.language in LANGUAGES]
    long = {text.id for text in claimed if text.kind == "long"}
    return [text for text in claimed if text.id not in long and not long.intersection(text.relevant)]


def scores(model: Embedder, tasks: list[mteb.AbsTask], **options: Any) -> list[float]:
    results = mteb.evaluate(F2ggufEncoder(model), tasks, show_progress_bar=False, **{"cache": None, **options})
    return [result.get_score() for result in results.task_results]


def converted(folder: Path, prompts: dict[str, str], **stated: Any) -> Path:
    """A tiny file whose header states `prompts`."""
    edit_json(write_tiny(folder) / "config_sentence_transformers.json", prompts=prompts)
    convert(facts_of(folder, **stated), path := folder.with_suffix(".gguf"))
    return path


@pytest.mark.parametrize("variant", ["F16", "Q4_0"])
def test_ndcg_is_that_of_the_drift_report(variant: str, nano_release: Release, texts: list[EvalText]) -> None:
    queries = [text for text in texts if text.relevant]
    documents = [text for text in texts if text.kind in ("document", "code")]
    row = {text.id: i for i, text in enumerate(documents)}
    with Embedder(nano_release.file(variant), deterministic=True) as model:  # mteb's batches are others
        vectors = (model.encode_query([t.text for t in queries]), model.encode_document([t.text for t in documents]))
        ours = ndcg10(model.similarity(*vectors), [[row[name] for name in text.relevant] for text in queries])
        assert ours > 0.2
        assert scores(model, local_tasks(texts)[:1]) == pytest.approx([ours], abs=5e-6)  # mteb rounds to 5 digits


def test_results_are_kept_under_the_name_and_hash_of_the_file(
    nano: Embedder, texts: list[EvalText], tmp_path: Path
) -> None:
    few = [text for text in texts if text.language == "de" and text.kind != "code"]
    [score] = scores(nano, local_tasks(few)[1:], cache=mteb.ResultCache(tmp_path))
    assert score > 0.5
    [kept] = tmp_path.glob("results/*/*/F2ggufPairs.json")
    assert kept.parts[-3:-1] == ("local__nano-F16", sha256_file(nano.header.path)[:12])


def test_instruction_of_a_task_reaches_the_tokens(nano: Embedder, texts: list[EvalText]) -> None:
    task = local_tasks(texts)[0].metadata.model_copy(update={"prompt": {"query": INSTRUCTION}})
    riddles = ["What has keys and opens no door?", "What gets wetter as it dries?"]
    encoder = F2ggufEncoder(nano)

    def encoded(prompt_type: PromptType | None) -> np.ndarray:
        return encoder.encode(
            [{"text": riddles[:1]}, {"text": riddles[1:]}], task_metadata=task, prompt_type=prompt_type
        )

    wanted = nano.encode(riddles, prompt=f"Instruct: {INSTRUCTION}\nQuery: ")
    np.testing.assert_array_equal(encoded(PromptType.query), wanted)
    np.testing.assert_array_equal(encoded(PromptType.document), nano.encode(riddles))
    assert np.abs(wanted - nano.encode_query(riddles)).max() > 0.01


@pytest.mark.parametrize("name", ["F2LLM-v2-80M", "Qwen3-Embedding-0.6B"])
def test_prompts_of_every_task_are_those_of_mteb_for_the_checkpoint(name: str, tmp_path: Path) -> None:
    entry = read_lock().entry(name)
    path = converted(tmp_path / name, dict(entry.prompts), repo=entry.repo, revision=entry.revision)
    registered = mteb.get_model_meta(str(entry.repo))
    theirs = object.__new__(InstructSentenceTransformerModel)  # without weights
    theirs.prompts_dict = registered.loader_kwargs.get("prompts_dict")
    theirs.instruction_template = registered.loader_kwargs.get("instruction_template") or _qwen3_template()
    with Embedder(path) as model:
        encoder = F2ggufEncoder(model)
        tasks = mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True, exclude_aggregate=True)
        assert len(tasks) > 1000
        for task in (task.metadata for task in tasks):
            for kind in KINDS[task.simplified_task_type == "retrieval" : 2]:
                assert encoder.prompt_for(task, kind) == theirs.get_task_instruction(task, kind), task.name
            assert encoder.prompt_for(task, PromptType.document) == ""


def _qwen3_template() -> Any:
    from mteb.models.model_implementations.qwen3_models import instruction_template

    return instruction_template


def test_prompts_of_the_caller_come_first(nano: Embedder, texts: list[EvalText]) -> None:
    retrieval, pairs = (task.metadata for task in local_tasks(texts))
    encoder = F2ggufEncoder(nano, prompts={"F2ggufRetrieval": INSTRUCTION, "PairClassification": ""})
    assert encoder.prompt_for(retrieval, PromptType.query) == f"Instruct: {INSTRUCTION}\nQuery: "
    assert encoder.prompt_for(retrieval, PromptType.document) == ""
    assert encoder.prompt_for(pairs, None) == ""
    default = F2ggufEncoder(nano)
    assert default.prompt_for(retrieval, PromptType.query) == nano.prompts["query"]
    assert default.prompt_for(pairs, None).startswith("Instruct: Retrieve text that are semantically similar")
    assert encoder.mteb_model_meta.experiment_name != default.mteb_model_meta.experiment_name


def test_plain_prompts_go_to_queries_and_documents_alone(texts: list[EvalText], tmp_path: Path) -> None:
    task = local_tasks(texts)[0].metadata.model_copy(update={"prompt": INSTRUCTION})
    with Embedder(converted(tmp_path / "e5", {"query": "query: ", "document": "passage: "})) as model:
        assert [F2ggufEncoder(model).prompt_for(task, kind) for kind in KINDS] == ["", "query: ", "passage: "]
        given = F2ggufEncoder(model, prompts={"Retrieval": "query: "})
        assert given.prompt_for(task, None) == "query: "


def test_meta_states_the_file_over_its_checkpoint(tmp_path: Path) -> None:
    entry = read_lock().entry("F2LLM-v2-80M")
    path = converted(tmp_path / "x-F16", dict(entry.prompts), repo=entry.repo, revision=entry.revision, license="mit")
    with Embedder(path, max_tokens=512) as model:
        meta = F2ggufEncoder(model).mteb_model_meta
    assert (meta.name, meta.adapted_from) == ("codefuse-ai/x-F16", entry.repo)
    assert meta.revision is not None
    assert meta.revision.startswith(f"{entry.revision}-")
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.framework) == (32, 512, "mit", ["GGUF"])
    assert meta.n_parameters == 2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 + 2 * 8) + 32 + 16384 * 32
    assert meta.n_embedding_parameters == 16384 * 32
    assert "MSMARCO" in (meta.training_datasets or ())  # of the registry


def test_width_is_an_experiment_of_its_own(nano: Embedder) -> None:
    full = F2ggufEncoder(nano).mteb_model_meta
    with Embedder(nano.header.path, truncate_dim=64) as model:
        narrow = F2ggufEncoder(model).mteb_model_meta
    assert (full.embed_dim, full.experiment_name, narrow.embed_dim) == (256, None, 64)
    assert narrow.experiment_name == "truncate_dim_64"
    assert narrow.revision == full.revision


def test_missing_mteb_names_the_extra(nano: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_encoder, "find_spec", lambda _name: None)
    for needs_mteb in (lambda: F2ggufEncoder(nano), lambda: local_tasks([])):
        with pytest.raises(ExtraMissing, match="pip install 'f2gguf\\[mteb\\]'"):
            needs_mteb()
