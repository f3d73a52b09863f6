"""Ollama's dialect: /api/embed, /api/embeddings, /api/tags, /api/show, /api/version. Source: Ollama's docs/api.md."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from f2gguf.runtime.gguf.describe import as_dict
from f2gguf.runtime.server.answers import Asked, json_response
from f2gguf.runtime.server.models import Models, ServedModel
from f2gguf.runtime.server.openai import MODEL
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Options = Annotated[dict[str, Any] | None, Field(description="Accepted and ignored: a file says how it is to be used.")]
KeepAlive = Annotated[
    StrictFloat | StrictInt | StrictStr | None, Field(description="Accepted and ignored: models stay loaded.")
]


class OllamaEmbedRequest(BaseModel):
    model: Annotated[StrictStr, MODEL]
    input: StrictStr | Annotated[list[StrictStr], Field(fail_fast=True)] = Field(
        description="A text or texts; '' gives none."
    )
    truncate: StrictBool | None = Field(True, description="Cut texts that are too long. With false they get a 400.")
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="One of the trained widths.")
    options: Options = None
    keep_alive: KeepAlive = None


class OllamaEmbedResponse(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int = Field(description="Nanoseconds.")
    load_duration: int
    prompt_eval_count: int = Field(description="Tokens that the model saw.")
    truncated: list[int] = Field(description="Indices of the texts that were cut.")


class OllamaEmbeddingsRequest(BaseModel):
    model: Annotated[StrictStr, MODEL]
    prompt: StrictStr = ""
    options: Options = None
    keep_alive: KeepAlive = None


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
    model: Annotated[StrictStr | None, MODEL] = None
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


def router(models: Models, errors: dict[int | str, dict[str, Any]], version: str) -> APIRouter:
    routes = APIRouter(prefix="/api", tags=["Ollama"], responses=errors)

    @routes.post("/embed", response_model=OllamaEmbedResponse)
    async def embed(asked: OllamaEmbedRequest, request: Request) -> Response:
        """Vectors of texts. Headers: X-Embedding-Fingerprint, and X-Embedding-Truncated where texts were cut."""
        begin = time.perf_counter_ns()
        model, prompt_name = models.find(asked.model)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        body = {"model": asked.model, "embeddings": [], "load_duration": 0, "prompt_eval_count": 0, "truncated": []}
        headers = {"X-Embedding-Fingerprint": model.fingerprint()}
        if any(texts):  # Ollama's clients send '' or nothing to have a model loaded
            asked_for = Asked(texts, prompt_name, asked.dimensions, truncate=asked.truncate is not False)
            answer = await model.embed(asked_for, request.state.facts)
            headers = answer.headers
            body |= {"embeddings": answer.rows, "prompt_eval_count": answer.n_tokens, "truncated": answer.truncated}
        return json_response(body | {"total_duration": time.perf_counter_ns() - begin}, headers=headers)

    @routes.post("/embeddings", response_model=OllamaEmbeddingsResponse)
    async def embeddings(asked: OllamaEmbeddingsRequest, request: Request) -> Response:
        """The vector of one text, as older clients ask for it; long ones are cut."""
        model, prompt_name = models.find(asked.model)
        if not asked.prompt:
            return json_response({"embedding": []}, headers={"X-Embedding-Fingerprint": model.fingerprint()})
        answer = await model.embed(Asked([asked.prompt], prompt_name, truncate=True), request.state.facts)
        return json_response({"embedding": answer.rows[0]}, headers=answer.headers)

    @routes.get("/tags", response_model=TagsResponse)
    async def tags() -> Response:
        """The models of this server."""
        return json_response({"models": [_tag(model) for model in models.by_name.values()]})

    @routes.post("/show", response_model=ShowResponse)
    async def show(asked: ShowRequest) -> Response:
        """What one model is, its header's values included."""
        model, _ = models.find(asked.model or asked.name or "")
        return json_response(_show(model), headers={"X-Embedding-Fingerprint": model.fingerprint()})

    @routes.get("/version", response_model=VersionResponse)
    async def get_version() -> Response:
        """f2gguf's version."""
        return json_response({"version": version})

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
    }


def _modified_at(model: ServedModel) -> str:
    return datetime.fromtimestamp(model.header.path.stat().st_mtime, UTC).isoformat()


def _tag(model: ServedModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": _modified_at(model),
        "size": model.header.path.stat().st_size,
        "digest": model.sha256,
        "details": _details(model),
    }


def _show(model: ServedModel) -> dict[str, Any]:
    values = as_dict(model.header)["values"]
    return {
        "license": str(values.get("general.license", "")),
        "modelfile": f"FROM {model.header.path.name}\n",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": _details(model),
        "model_info": values,
        "capabilities": ["embedding"],
        "modified_at": _modified_at(model),
    }
