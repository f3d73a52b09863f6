"""A file where other libraries take a model: their own packages, their own examples, and the Embedder's vectors."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from f2gguf.integrations.batches import EmbedBatch
from f2gguf.integrations.model import LazyModel
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import InputError, NotGGUF, TextError, UnknownDims, WrongUsage

DOCUMENTS = [
    "Baking bread takes flour, water, salt and yeast.",
    "A kernel schedules processes on the processor's cores.",
    "Die Katze schläft auf dem Sofa.",
]
QUERY = "how do operating systems share a cpu between programs?"
pytestmark = pytest.mark.filterwarnings("default")  # theirs


@pytest.fixture(scope="module")
def documents(nano: Embedder) -> np.ndarray:
    return nano.encode_document(DOCUMENTS)


@pytest.fixture(scope="module")
def query(nano: Embedder) -> np.ndarray:
    vector = nano.encode_query(QUERY)
    assert not np.allclose(vector, nano.encode_document(QUERY), atol=0.01)  # the prompts differ
    return vector


def equal(found: Any, wanted: np.ndarray, *, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), wanted, atol=atol)


# The name of a file


def test_a_file_is_opened_once_in_a_process_and_not_by_its_name(nano_f16: Path, query: np.ndarray) -> None:
    opened: list[Embedder] = []
    models = [LazyModel.of(nano_f16, n_threads=2) for _ in range(4)]
    threads = [threading.Thread(target=lambda model=model: opened.append(model.embedder)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in opened}) == 1
    arrived = pickle.loads(pickle.dumps(models[0]))
    assert arrived == models[0]
    assert len(pickle.dumps(models[0])) < 1000
    equal(arrived.embed([QUERY], query=True), query[None])
    with pytest.raises(TextError, match="texts are a list, and this is one: 'a'"):
        arrived.embed("a", query=True)


def test_a_relative_path_holds_in_another_folder(nano_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nano_f16.parent)
    assert LazyModel.of(nano_f16.name).path == str(nano_f16)
    assert LazyModel.of("org/name:Q8_0").path == "org/name:Q8_0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_opens_the_file_again(nano_f16: Path) -> None:
    code = f"""
import os
from f2gguf.integrations.model import LazyModel
model = LazyModel.of({str(nano_f16)!r}, n_threads=1)
before = model.embed(["a"], query=True)
child = os.fork()
if not child:
    os._exit(0 if abs(model.embed(["a"], query=True) - before).max() < 1e-6 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0\n"


# LangChain and LlamaIndex


def test_langchain(nano_f16: Path, documents: np.ndarray, query: np.ndarray) -> None:
    from f2gguf.integrations.langchain import F2ggufEmbeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    embeddings = F2ggufEmbeddings(nano_f16)
    equal(embeddings.embed_documents(DOCUMENTS), documents)
    equal(embeddings.embed_query(QUERY), query)
    equal(asyncio.run(embeddings.aembed_query(QUERY)), query)
    assert embeddings.embed_documents([]) == []
    for call, wrong in ((embeddings.embed_documents, "a"), (embeddings.embed_query, ["a"])):
        with pytest.raises(TextError):
            call(wrong)  # type: ignore[operator]
    retriever = InMemoryVectorStore.from_texts(DOCUMENTS, embeddings).as_retriever(search_kwargs={"k": 1})
    assert retriever.invoke(QUERY)[0].page_content == DOCUMENTS[1]


def test_llama_index(nano_f16: Path, documents: np.ndarray, query: np.ndarray) -> None:
    from f2gguf.integrations.llama_index import F2ggufEmbedding
    from llama_index.core import Document, VectorStoreIndex

    model = F2ggufEmbedding(model_name=str(nano_f16))
    equal(model.get_text_embedding_batch(DOCUMENTS), documents)
    for copy in (model, pickle.loads(pickle.dumps(model)), F2ggufEmbedding.from_dict(model.to_dict())):
        equal(copy.get_query_embedding(QUERY), query)
        equal(asyncio.run(copy.aget_query_embedding(QUERY)), query)
    index = VectorStoreIndex.from_documents([Document(text=text) for text in DOCUMENTS], embed_model=model)
    assert index.as_retriever(similarity_top_k=1).retrieve(QUERY)[0].text == DOCUMENTS[1]


def makers() -> Iterator[Callable[..., Any]]:
    from f2gguf.integrations.chroma import F2ggufEmbeddingFunction
    from f2gguf.integrations.langchain import F2ggufEmbeddings
    from f2gguf.integrations.llama_index import F2ggufEmbedding

    yield from (F2ggufEmbeddingFunction, F2ggufEmbeddings, F2ggufEmbedding)


@pytest.mark.parametrize("number", range(3))
def test_a_file_that_cannot_be_used_is_said_at_once(nano_f16: Path, tmp_path: Path, number: int) -> None:
    make = list(makers())[number]
    with pytest.raises(NotGGUF, match="no such file"):
        make(str(tmp_path / "none.gguf"))
    with pytest.raises(UnknownDims, match="65 dimensions: f2llm-nano was trained for"):
        make(str(nano_f16), truncate_dim=65)


# Indexes that hold the file's fingerprint


def test_chroma(nano_f16: Path, minilm_f16: Path, tmp_path: Path, documents: np.ndarray, query: np.ndarray) -> None:
    import chromadb
    from f2gguf.integrations.chroma import F2ggufEmbeddingFunction

    client = chromadb.PersistentClient(tmp_path / "chroma")
    function = F2ggufEmbeddingFunction(nano_f16)
    collection = client.create_collection("texts", embedding_function=function)
    collection.add(ids=["a", "b", "c"], documents=DOCUMENTS)
    equal(collection.get(include=["embeddings"])["embeddings"], documents)
    equal(function.embed_query([QUERY]), query[None])
    found = client.get_collection("texts").query(query_texts=[QUERY], n_results=1)  # the function comes from the config
    assert found["ids"] == [["b"]]
    equal(found["distances"], 1 - documents[1:2] @ query[:, None])
    for other in (F2ggufEmbeddingFunction(minilm_f16), F2ggufEmbeddingFunction(nano_f16, truncate_dim=64)):
        for get in (client.get_collection, client.get_or_create_collection):
            with pytest.raises(ValueError, match=f"conflict: new: {other.name()} vs persisted: {function.name()}"):
                get("texts", embedding_function=other)


def test_chroma_refuses_a_file_that_was_replaced(nano_f16: Path, minilm_f16: Path, tmp_path: Path) -> None:
    import chromadb
    from f2gguf.integrations.chroma import F2ggufEmbeddingFunction

    path = shutil.copy(nano_f16, tmp_path / "model.gguf")
    client = chromadb.PersistentClient(tmp_path / "chroma")
    client.create_collection("texts", embedding_function=F2ggufEmbeddingFunction(path)).add(ids=["a"], documents=["a"])
    replace(path, minilm_f16)
    with pytest.raises(ValueError, match="the collection holds vectors of another file or width"):
        client.get_collection("texts").query(query_texts=[QUERY])


def replace(path: Path, other: Path) -> None:
    """As a download does it. (To write into a file that is open ends in nonsense, whoever reads it.)"""
    shutil.copy(other, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def test_lancedb(nano_f16: Path, minilm_f16: Path, tmp_path: Path, documents: np.ndarray, query: np.ndarray) -> None:
    import lancedb
    from f2gguf.integrations.lancedb import F2ggufEmbeddings
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    path = shutil.copy(nano_f16, tmp_path / "model.gguf")
    model = get_registry().get("f2gguf").create(model=str(path))
    assert isinstance(model, F2ggufEmbeddings)

    class Words(LanceModel):  # type: ignore[misc]
        text: str = model.SourceField()
        vector: Vector(model.ndims()) = model.VectorField()  # type: ignore[valid-type]

    table = lancedb.connect(tmp_path / "lance").create_table("words", schema=Words)
    table.add([{"text": text} for text in DOCUMENTS])
    equal(table.to_arrow()["vector"].to_pylist(), documents)
    equal(model.compute_query_embeddings(QUERY), query[None])
    found = lancedb.connect(tmp_path / "lance").open_table("words").search(QUERY).limit(1).to_pydantic(Words)
    assert found[0].text == DOCUMENTS[1]
    replace(path, minilm_f16)
    with pytest.raises(WrongUsage, match="the table holds vectors of another file or width"):
        lancedb.connect(tmp_path / "lance").open_table("words").search(QUERY).to_list()


def test_haystack(nano_f16: Path, documents: np.ndarray, query: np.ndarray) -> None:
    from f2gguf.integrations.haystack import F2ggufDocumentEmbedder, F2ggufTextEmbedder
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    texts = [Document(content=text, meta={"title": "A title", "none": None}) for text in DOCUMENTS]
    made = F2ggufDocumentEmbedder(str(nano_f16)).run(documents=texts)["documents"]
    equal([document.embedding for document in made], documents)
    assert texts[0].embedding is None
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents(made)
    pipeline = Pipeline()
    pipeline.add_component("text_embedder", F2ggufTextEmbedder(str(nano_f16)))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("text_embedder.embedding", "retriever.query_embedding")
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["f2gguf.integrations.haystack"])
    for each in (pipeline, again):
        equal(each.get_component("text_embedder").run(text=QUERY)["embedding"], query)
    found = pipeline.run({"text_embedder": {"text": QUERY}})
    assert found["retriever"]["documents"][0].content == DOCUMENTS[1]

    titled = F2ggufDocumentEmbedder(
        str(nano_f16), meta_fields_to_embed=["title", "none", "x"], embedding_separator=": "
    )
    (one,) = F2ggufDocumentEmbedder.from_dict(titled.to_dict()).run(documents=texts[:1])["documents"]
    equal(one.embedding, LazyModel.of(nano_f16).embed([f"A title: {DOCUMENTS[0]}"], query=False)[0])
    assert titled.run(documents=[]) == {"documents": []}
    for component, wrong in ((titled, "a"), (titled, ["a"]), (again.get_component("text_embedder"), texts)):
        with pytest.raises(TextError, match="F2ggufDocumentEmbedder"):
            component.run(wrong)


def test_llm(
    nano_f16: Path, documents: np.ndarray, query: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import llm
    import sqlite_utils
    from f2gguf.integrations.llm import F2ggufEmbeddingModel, register_embedding_models

    monkeypatch.setenv("F2GGUF_MODEL", str(nano_f16))
    found: list[F2ggufEmbeddingModel] = []
    register_embedding_models(found.append)
    (model,) = (each for each in found if each.model_id == "f2gguf")
    equal(list(model.embed_multi(DOCUMENTS)), documents)
    equal(model.embed(DOCUMENTS[0]), documents[0])
    collection = llm.Collection("texts", sqlite_utils.Database(memory=True), model=model)
    collection.embed_multi(zip("abc", DOCUMENTS, strict=True))
    (nearest,) = collection.similar(QUERY, number=1)  # with the query's prompt
    assert nearest.id == "b"
    assert nearest.score == pytest.approx(float(documents[1] @ query), abs=1e-6)
    with pytest.raises(ValueError, match="does not support binary data"):
        model.embed(b"a")


def test_llms_command_finds_the_plugin() -> None:
    assert [plugin.value for plugin in entry_points(group="llm") if plugin.name == "f2gguf"] == [
        "f2gguf.integrations.llm"
    ]


# Ray, datasets and Spark


def test_a_batch_of_rows_gets_a_column(nano_f16: Path, documents: np.ndarray, query: np.ndarray) -> None:
    texts = np.array(DOCUMENTS, dtype=object)
    texts.flags.writeable = False  # as Ray's are
    batch = {"id": np.arange(3), "text": texts}
    made = pickle.loads(pickle.dumps(EmbedBatch(nano_f16)))(batch)
    assert list(made) == ["id", "text", "embedding"]
    assert list(batch) == ["id", "text"]
    equal(made["embedding"], documents)
    asked = EmbedBatch(str(nano_f16), column="q", output="v", query=True, truncate_dim=64)({"q": [QUERY]})
    equal(asked["v"], query[None, :64] / np.linalg.norm(query[:64]))
    with pytest.raises(InputError, match=r"the batch has no column 'text'\. It has: id"):
        EmbedBatch(nano_f16)({"id": [1]})
    with pytest.raises(InputError, match="a batch is a dict of columns"):
        EmbedBatch(nano_f16)(["a"])  # type: ignore[arg-type]


def test_a_path_that_is_not_here_may_be_there() -> None:
    """The driver of a cluster need not have the file."""
    embed = EmbedBatch("/models/none.gguf")
    with pytest.raises(NotGGUF, match=r"/models/none\.gguf: no such file"):
        embed({"text": ["a"]})


def test_datasets(nano_f16: Path, documents: np.ndarray) -> None:
    from datasets import Dataset

    made = Dataset.from_dict({"text": DOCUMENTS}).map(EmbedBatch(nano_f16), batched=True, batch_size=2)
    equal(made["embedding"][:], documents)


def test_spark_gets_a_vector_for_each_text_and_null_for_null(nano_f16: Path, documents: np.ndarray) -> None:
    """The inside of the UDF: pyspark brings 480 MB and takes Java."""
    import pandas as pd
    from f2gguf.integrations.spark import EmbedSeries

    embed = pickle.loads(pickle.dumps(EmbedSeries(LazyModel.of(nano_f16), query=False)))
    batches = [pd.Series(DOCUMENTS), pd.Series([None, DOCUMENTS[2]]), pd.Series([], dtype=object), pd.Series([None])]
    whole, holed, empty, none = embed(iter(batches))
    equal(np.stack(whole), documents)
    equal(holed[1], documents[2])
    assert [holed[0] is None, len(empty), none.tolist()] == [True, 0, [None]]


@pytest.mark.skipif("F2GGUF_TEST_RAY" not in os.environ, reason="starts a Ray cluster: set F2GGUF_TEST_RAY=1")
def test_ray_data(nano_f16: Path, documents: np.ndarray) -> None:
    code = f"""
import ray
from f2gguf.integrations.batches import EmbedBatch
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
dataset = ray.data.from_items([{{"text": text}} for text in {DOCUMENTS!r}])
embedded = dataset.map_batches(
    EmbedBatch, fn_constructor_args=[{str(nano_f16)!r}], batch_size=2, num_cpus=1,
    compute=ray.data.ActorPoolStrategy(size=1),
)
rows = {{row["text"]: row["embedding"].tolist() for row in embedded.take_all()}}
print([rows[text] for text in {DOCUMENTS!r}])
"""
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    equal(__import__("ast").literal_eval(process.stdout.splitlines()[-1]), documents)


# sentence-transformers, and what asks for its type


@pytest.fixture(scope="module")
def theirs(nano_f16: Path) -> Any:
    from f2gguf import sentence_transformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sentence_transformer(nano_f16)


@pytest.mark.slow
def test_a_sentence_transformer_gives_the_vectors_of_the_embedder(nano: Embedder, theirs: Any) -> None:
    from sentence_transformers import SentenceTransformer

    assert type(theirs) is SentenceTransformer
    texts = [*DOCUMENTS, "", "a"]
    for method in ("encode", "encode_query", "encode_document"):
        for options in ({}, {"normalize_embeddings": True}, {"prompt": "x: "}):
            found, wanted = (getattr(model, method)(texts, **options) for model in (theirs, nano))
            # Its batches are others, and so may be what they begin with: see "What a vector depends on"
            equal(found, wanted, atol=2e-4)
    assert theirs.encode("a", convert_to_tensor=True).shape == (theirs.get_embedding_dimension(),) == (256,)
    assert (theirs.prompts["query"], theirs.max_seq_length) == (nano.prompts["query"], nano.max_seq_length)
    assert theirs.tokenizer("a cat")["input_ids"] == nano.tokenize("a cat").tolist()
    assert (
        theirs.tokenizer.decode(theirs.tokenizer("a cat, über")["input_ids"], skip_special_tokens=True) == "a cat, über"
    )
    with pytest.raises(TextError, match="no text"):
        theirs.encode([5])


@pytest.mark.slow
def test_a_sentence_transformer_is_saved_opened_copied_and_sent(
    nano_f16: Path, theirs: Any, tmp_path: Path, documents: np.ndarray
) -> None:
    from f2gguf import sentence_transformer
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "saved"
    theirs.save(str(folder))
    shutil.move(folder, tmp_path / "moved")
    opened = SentenceTransformer(str(tmp_path / "moved"), trust_remote_code=True)
    opened.save(str(tmp_path / "moved"))  # over itself
    for model in (opened, pickle.loads(pickle.dumps(theirs))):
        equal(model.encode_document(DOCUMENTS), documents, atol=2e-5)
    sentence_transformer(nano_f16, truncate_dim=64, max_tokens=16).save(str(folder))
    short = SentenceTransformer(str(folder), trust_remote_code=True)
    assert (short.get_embedding_dimension(), short.max_seq_length, short.encode("a").shape) == (64, 16, (64,))
    with pytest.warns(UserWarning, match="longer than 16 tokens"):
        short.encode("word " * 30)


@pytest.mark.slow
def test_keybert(theirs: Any) -> None:
    from keybert import KeyBERT

    text = "Supervised learning is the machine learning task of learning a function that maps an input to an output."
    assert {"learning", "supervised"} & {word for word, _ in KeyBERT(model=theirs).extract_keywords(text)}


@pytest.mark.slow
def test_setfit_fits_its_head_and_is_told_that_the_body_cannot_be_trained(theirs: Any) -> None:
    from setfit import SetFitModel
    from sklearn.linear_model import LogisticRegression

    model = SetFitModel(model_body=theirs, model_head=LogisticRegression())
    texts = ["bake the bread", "knead the dough", "the process sleeps", "the kernel waits"]
    model.fit(texts, [0, 0, 1, 1], num_epochs=1)
    assert model.predict(texts).tolist() == [0, 0, 1, 1]
    theirs.train()
    with pytest.raises(WrongUsage, match=r"a .gguf file cannot be trained"):
        theirs(theirs.preprocess(["a"]))
