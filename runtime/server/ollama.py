"""Ollama's dialect: /api/embed, /api/embeddings, /api/tags, /api/show, /api/version. Source: Ollama's docs/api.md."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib import metadata
from typing import Annotated, Any

from f2gguf.runtime.gguf.describe import as_dict
from f2gguf.runtime.server.answers import Job, ModelName, Refused, Width, json_response
from f2gguf.runtime.server.models import Models, ServedModel, find_model
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr


class OllamaRequest(BaseModel):
    """What both requests for vectors have in common."""

    model: ModelName
    options: dict[str, Any] | None = Field(None, description="Accepted and ignored: a file says how it is to be used.")
    keep_alive: StrictFloat | StrictInt | StrictStr | None = Field(
        None, description="Accepted and ignored: models stay loaded."
    )


class OllamaEmbedRequest(OllamaRequest):
    input: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] = Field(
        description="A text or texts; '' gives none."
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
    prompt: StrictStr = ""


class OllamaEmbeddingsResponse(BaseModel):
    embedding: list[float]


class Details(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class TagsResponse(BaseModel):
    models: list[Tag]


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
        model, prompt_name = find_model(models, body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        fields = {"model": body.model, "embeddings": [], "load_duration": 0, "prompt_eval_count": 0, "truncated": []}
        headers = model.headers
        if any(texts):  # Ollama's clients send '' or nothing to have a model loaded
            job = Job(texts, prompt_name, body.dimensions, truncate=body.truncate is not False)
            answer = await model.embed(job, request.state.facts)
            headers = answer.headers
            fields |= {"embeddings": answer.rows, "prompt_eval_count": answer.n_tokens, "truncated": answer.truncated}
        return json_response(fields | {"total_duration": time.perf_counter_ns() - begin}, headers=headers)

    @routes.post("/embeddings", response_model=OllamaEmbeddingsResponse)
    async def embeddings(body: OllamaEmbeddingsRequest, request: Request) -> Response:
        """The vector of one text, as older clients ask for it; a text that is too long is cut."""
        model, prompt_name = find_model(models, body.model)
        if not body.prompt:
            return json_response({"embedding": []}, headers=model.headers)
        answer = await model.embed(Job([body.prompt], prompt_name, truncate=True), request.state.facts)
        return json_response({"embedding": answer.rows[0]}, headers=answer.headers)

    @routes.get("/tags", response_model=TagsResponse)
    async def tags() -> Response:
        """The models of this server."""
        return json_response({"models": [_tag(model) for model in models.values()]})

    @routes.post("/show", response_model=ShowResponse)
    async def show(body: ShowRequest) -> Response:
        """What one model is, with the values of its header."""
        model, _ = find_model(models, body.model or body.name or "")
        return json_response(_show(model), headers=model.headers)

    @routes.get("/version", response_model=VersionResponse)
    async def get_version() -> Response:
        """f2gguf's version."""
        return json_response({"version": metadata.version("f2gguf")})

    return routes


def _facts(model: ServedModel) -> dict[str, Any]:
    values, changed = model.header.values, model.header.path.stat().st_mtime
    details = {
        "parent_model": str(values.get("general.base_model.0.name", "")),
        "format": "gguf",
        "family": model.header.architecture,
        "families": [model.header.architecture],
        "parameter_size": str(values.get("general.size_label", "")),
        "quantization_level": model.header.file_type,
    }
    return {"details": details, "modified_at": datetime.fromtimestamp(changed, UTC).isoformat()}


def _tag(model: ServedModel) -> dict[str, Any]:
    size = model.header.path.stat().st_size
    return {"name": model.name, "model": model.name, "size": size, "digest": model.sha256, **_facts(model)}


def _show(model: ServedModel) -> dict[str, Any]:
    values = as_dict(model.header)["values"]
    return {
        "license": str(values.get("general.license", "")),
        "modelfile": f"FROM {model.header.path.name}\n",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "model_info": values,
        "capabilities": ["embedding"],
        **_facts(model),
    }
