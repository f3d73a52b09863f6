"""Ollama's dialect: /api/embed, /api/embeddings, /api/tags, /api/ps, /api/show and /api/version.

Source: Ollama's docs/api.md and api/types.go.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from typing import Annotated, Any

from f2gguf.runtime.gguf.describe import as_dict
from f2gguf.runtime.server.answers import MODEL, Job, ModelName, Refused, VectorRequest, Width, json_response
from f2gguf.runtime.server.models import Models, ServedModel, find_model, stated_name
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr


class OllamaRequest(VectorRequest):
    """What both requests for vectors have in common."""

    model: ModelName | None = Field(None, description=MODEL)
    options: dict[str, Any] | None = Field(None, description="Accepted and ignored: a file says how it is to be used.")
    keep_alive: StrictFloat | StrictInt | StrictStr | None = Field(
        None, description="Accepted and ignored: models stay loaded."
    )


class OllamaEmbedRequest(OllamaRequest):
    input: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] = Field(
        description="A text or texts. '' and [] give no vector; a list gives one for each of its texts, '' included."
    )
    truncate: StrictBool | None = Field(True, description="Cut texts that are too long. With false they get a 400.")
    dimensions: Width | None = Field(None, description="One of the trained widths.")


class OllamaEmbedResponse(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int = Field(description="Nanoseconds.")
    load_duration: int
    prompt_eval_count: int = Field(description="Tokens that the model saw.")
    truncated: list[int] = Field(description="Indices of the texts that were cut.")


class OllamaEmbeddingsRequest(OllamaRequest):
    prompt: StrictStr | None = Field("", description="A text; '' and null give no vector.")


class OllamaEmbeddingsResponse(BaseModel):
    embedding: list[float]


class Details(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str
    context_length: int = Field(description="Longest text in tokens, as it is served.")
    embedding_length: int = Field(description="Width of the vectors.")


class Tag(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details
    capabilities: list[str]


class TagsResponse(BaseModel):
    models: list[Tag]


class Loaded(BaseModel):
    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str = Field(description="In a hundred years: models stay loaded.")
    size_vram: int
    context_length: int


class LoadedResponse(BaseModel):
    models: list[Loaded]


class ShowRequest(BaseModel):
    model: ModelName | None = None
    name: StrictStr | None = Field(None, description="What older clients send instead of `model`.")


class ShowResponse(BaseModel):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class VersionResponse(BaseModel):
    version: str


class OllamaError(BaseModel):
    error: str


def error_body(refused: Refused) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refusal, as Ollama's clients expect them."""
    return refused.status, {"error": refused.message}


def router(models: Models) -> APIRouter:
    routes = APIRouter(tags=["Ollama"])

    @routes.post("/embed", response_model=OllamaEmbedResponse)
    async def embed(body: OllamaEmbedRequest, request: Request) -> Response:
        """Vectors of texts. Headers: X-Embedding-Fingerprint, and X-Embedding-Truncated where texts were cut."""
        begin = time.perf_counter_ns()
        name = stated_name(models, body.model)
        model, prompt_name = find_model(models, name)
        fields = {"model": name, "embeddings": [], "load_duration": 0, "prompt_eval_count": 0, "truncated": []}
        headers = model.headers
        if body.input:  # Ollama's clients send '' or nothing to have a model loaded
            texts = [body.input] if isinstance(body.input, str) else body.input
            job = Job(texts, prompt_name, body.dimensions, truncate=body.truncate is not False)
            answer = await model.embed(job, request.state.facts)
            headers = answer.headers
            fields |= {"embeddings": answer.rows, "prompt_eval_count": answer.n_tokens, "truncated": answer.truncated}
        return json_response(fields | {"total_duration": time.perf_counter_ns() - begin}, headers=headers)

    @routes.post("/embeddings", response_model=OllamaEmbeddingsResponse)
    async def embeddings(body: OllamaEmbeddingsRequest, request: Request) -> Response:
        """The vector of one text, as older clients ask for it; a text that is too long is cut."""
        model, prompt_name = find_model(models, stated_name(models, body.model))
        if not body.prompt:
            return json_response({"embedding": []}, headers=model.headers)
        answer = await model.embed(Job([body.prompt], prompt_name, truncate=True), request.state.facts)
        return json_response({"embedding": answer.rows[0]}, headers=answer.headers)

    @routes.get("/tags", response_model=TagsResponse)
    async def tags() -> Response:
        """The models of this server."""
        return json_response({"models": [_tag(model) for model in models.values()]})

    @routes.get("/ps", response_model=LoadedResponse)
    async def loaded() -> Response:
        """The models in memory, which are all models of this server."""
        return json_response({"models": [_loaded(model) for model in models.values()]})

    @routes.post("/show", response_model=ShowResponse)
    async def show(body: ShowRequest) -> Response:
        """What one model is, with the values of its header."""
        model, _ = find_model(models, stated_name(models, body.name if body.model is None else body.model))
        return json_response(_show(model), headers=model.headers)

    @routes.get("/version", response_model=VersionResponse)
    async def get_version() -> Response:
        """f2gguf's version."""
        return json_response({"version": metadata.version("f2gguf")})

    return routes


def _details(model: ServedModel) -> dict[str, Any]:
    values = model.header.values
    return {
        "parent_model": str(values.get("general.base_model.0.name", "")),
        "format": "gguf",
        "family": model.header.architecture,
        "families": [model.header.architecture],
        "parameter_size": str(values.get("general.size_label", "")),
        "quantization_level": model.header.file_type,
        "context_length": model.embedder.max_seq_length,
        "embedding_length": model.header.n_embd,
    }


def _facts(model: ServedModel) -> dict[str, Any]:
    """What a list and a single answer have in common."""
    changed = datetime.fromtimestamp(model.header.path.stat().st_mtime, UTC)
    return {"details": _details(model), "modified_at": changed.isoformat(), "capabilities": ["embedding"]}


def _names(model: ServedModel) -> dict[str, Any]:
    size = model.header.path.stat().st_size
    return {"name": model.name, "model": model.name, "size": size, "digest": model.sha256}


def _tag(model: ServedModel) -> dict[str, Any]:
    return {**_names(model), **_facts(model)}


def _loaded(model: ServedModel) -> dict[str, Any]:
    names = _names(model)
    return {
        **names,
        "details": _details(model),
        "expires_at": (datetime.now(UTC) + timedelta(days=36_500)).isoformat(),
        "size_vram": names["size"] if model.embedder.encoder.engine.model.offloaded else 0,
        "context_length": model.embedder.max_seq_length,
    }


def _show(model: ServedModel) -> dict[str, Any]:
    values = as_dict(model.header)["values"]
    return {
        "license": str(values.get("general.license", "")),
        "modelfile": f"FROM {model.header.path.name}\n",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "model_info": values,
        **_facts(model),
    }
