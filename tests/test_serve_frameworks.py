"""Frameworks and clients that are slow to import or to install, as their users configure them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from f2gguf.runtime import Embedder
from serving import serving_thread

pytestmark = pytest.mark.slow
TEXTS = ["how do I compress a folder?", "tar is an archiving program"]
BUILD = Path(__file__).parents[1] / "build"


@pytest.fixture(scope="module")
def url(nano: Embedder) -> Iterator[str]:
    with serving_thread(nano) as url:
        yield url


@pytest.fixture(autouse=True)
def others_warnings_pass() -> Iterator[None]:
    """Frameworks warn of their own dependencies while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found, dtype=np.float32), wanted, atol=1e-6)


def byte_tokens(_name: str) -> Any:
    """Stands in for tiktoken's encodings, which it downloads: a token for each byte."""
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("bytes", pat_str=r".", mergeable_ranks=ranks, special_tokens={})


def test_langchain_as_it_comes_is_told_how_to_send_texts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai
    import tiktoken
    from langchain_openai import OpenAIEmbeddings

    monkeypatch.setattr(tiktoken, "get_encoding", byte_tokens)
    embeddings = OpenAIEmbeddings(model="nano", base_url=f"{url}/v1", api_key="none")
    for ask in (lambda: embeddings.embed_query(TEXTS[0]), lambda: embeddings.embed_documents(TEXTS)):
        with pytest.raises(openai.BadRequestError, match=r"check_embedding_ctx_length=False.*--allow-token-ids"):
            ask()


def test_llama_index_gets_the_embedders_vectors(url: str, nano: Embedder) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(model_name="nano", api_base=f"{url}/v1", api_key="none")
    same(model.get_text_embedding_batch(TEXTS), nano.encode_document(TEXTS))
    queries = OpenAILikeEmbedding(model_name="nano:query", api_base=f"{url}/v1", api_key="none", dimensions=64)
    same(queries.get_query_embedding(TEXTS[0]), nano.encode_query(TEXTS[0], truncate_dim=64))


def test_llama_index_speaks_tei(url: str, nano: Embedder) -> None:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    model = TextEmbeddingsInference(model_name="any", base_url=url)
    same(model.get_text_embedding_batch(TEXTS), nano.encode_document(TEXTS))


def test_haystack_gets_the_embedders_vectors(url: str, nano: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    options: dict[str, Any] = {"api_base_url": f"{url}/v1", "api_key": Secret.from_token("none")}
    found = OpenAITextEmbedder(model="nano:query", **options).run(TEXTS[0])
    same(found["embedding"], nano.encode_query(TEXTS[0]))
    embedder = OpenAIDocumentEmbedder(model="nano", dimensions=64, progress_bar=False, **options)
    documents = embedder.run([Document(content=text) for text in TEXTS])["documents"]
    same([document.embedding for document in documents], nano.encode_document(TEXTS, truncate_dim=64))


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """OpenAI's client for JavaScript, installed once in build/."""
    npm = shutil.which("npm")
    if not npm or not shutil.which("node"):
        pytest.skip("node and npm are not here")
    folder = BUILD / "node"
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "openai@6"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install openai: {done.stderr.strip().splitlines()[-1:]}")
    return folder


SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none", maxRetries: 0 });
const model = "nano:query", input = JSON.parse(process.env.TEXTS);
const rows = async options => (await client.embeddings.create({ model, input, ...options })).data.map(x => x.embedding);
const ids = client.embeddings.create({ model, input: [[1, 2]] });
const refused = await ids.catch(error => [error.status, error.message]);
const models = [];
for await (const { id } of client.models.list()) models.push(id);
const found = [await rows({}), await rows({ encoding_format: "float" }), await rows({ dimensions: 64 })];
console.log(JSON.stringify({ found, refused, models }));
"""


def test_openai_for_javascript_gets_the_embedders_vectors(url: str, nano: Embedder, node_modules: Path) -> None:
    (node_modules / "client.mjs").write_text(SCRIPT)
    environment = {**os.environ, "URL": f"{url}/v1", "TEXTS": json.dumps(TEXTS)}
    command = ["node", str(node_modules / "client.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert not done.returncode, done.stderr
    answer = json.loads(done.stdout)
    base64, numbers, narrow = answer["found"]
    same(base64, nano.encode_query(TEXTS))
    same(numbers, nano.encode_query(TEXTS))
    same(narrow, nano.encode_query(TEXTS, truncate_dim=64))
    assert answer["models"] == ["nano"]
    assert answer["refused"][0] == 400
    assert "token ids are refused" in answer["refused"][1]
