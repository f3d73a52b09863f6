"""OpenAI's dialect: /v1/embeddings and /v1/models."""

from __future__ import annotations

from typing import Any, Literal

from f2gguf.runtime.gguf.describe import StatedDrift, drift_of, is_reference
from f2gguf.runtime.server.answers import (
    INPUT_TYPE,
    INPUTS,
    MODEL,
    VECTOR_TYPES,
    Inputs,
    Job,
    ModelName,
    Refused,
    Truncate,
    VectorRequest,
    VectorType,
    Width,
    input_list,
    json_response,
    truncates,
)
from f2gguf.runtime.server.models import Models, find_model, stated_name
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictStr


class EmbeddingsRequest(VectorRequest):
    """OpenAI's request; and `input_type` and `truncate`, as NVIDIA and Cohere call them."""

    model: ModelName | None = Field(None, description=MODEL)
    input: Inputs = Field(description=INPUTS)
    dimensions: Width | None = Field(None, description="One of the model's trained widths.")
    encoding_format: VectorType | None = Field("float", description=VECTOR_TYPES)
    user: StrictStr | None = Field(None, description="Ignored.")
    input_type: StrictStr | None = Field(None, description=INPUT_TYPE)
    truncate: Truncate | None = Field(
        None,
        description="Whether texts that are too long are cut (true, or 'END') or refused (false, or 'NONE') "
        "[default: as the server was started; without --truncate they are refused]. 'START' is refused.",
    )


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model saw, prompts and special tokens included.")
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[int] = Field(description="Indices of the inputs that were cut.")


class Model(BaseModel):
    """OpenAI's four, and what ours add from `fingerprint` on."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprint: str = Field(description="What X-Embedding-Fingerprint begins with, at full width.")
    dimensions: list[int]
    prompts: list[str]
    prompt_texts: dict[str, str] = Field(description="What is put before texts, by the prompt's name.")
    name: str = Field(description="The model's own name, whatever it is called here.")
    variant: str = Field(description="The type of most weights, such as 'Q8_0'.")
    is_reference: bool = Field(description="Whether the drift of others is measured against such a file.")
    drift: StatedDrift | None = Field(description="Null where the file states none.")
    max_tokens: int = Field(description="Longest text, its prompt and special tokens included.")
    device: str
    selftest: str = Field(description="'passed', 'failed', how many texts passed so far, or why it was not run.")
    warnings: list[str] = Field(
        description="What may make the vectors of somebody else's file wrong, and what mends it."
    )


class ModelsResponse(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: Error


def error_body(refused: Refused) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refusal, as OpenAI's clients expect them."""
    kind = "rate_limit_error" if refused.status == 429 else "invalid_request_error"
    if refused.status >= 500:
        kind = "server_error"
    param = "input_type" if refused.param == "prompt_name" else refused.param
    error = {"message": refused.message, "type": kind, "param": param, "code": refused.code}
    return refused.status, {"error": error}


def router(models: Models) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/embeddings", response_model=EmbeddingsResponse)
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Vectors of texts. Headers: X-Embedding-Fingerprint, and X-Embedding-Truncated where texts were cut."""
        name = stated_name(models, body.model)
        model, prompt_name = find_model(models, name, body.input_type)
        kind, inputs, cut = body.encoding_format or "float", input_list(body.input), truncates(body.truncate)
        job = Job(inputs, prompt_name, body.dimensions, truncate=cut, types=[kind])
        answer = await model.embed(job, request.state.facts)
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(answer.rows_as(kind))]
        usage = {"prompt_tokens": answer.n_tokens, "total_tokens": answer.n_tokens}
        fields = {"object": "list", "data": data, "model": name, "usage": usage, "truncated": answer.truncated}
        return json_response(fields, headers=answer.headers)

    @routes.get("/models", response_model=ModelsResponse)
    async def list_models() -> Response:
        """The models of this server."""
        return json_response({"object": "list", "data": [_model(name, models) for name in models]})

    @routes.get("/models/{name:path}", response_model=Model)
    async def get_model(name: str) -> Response:
        """One model of this server."""
        return json_response(_model(name, models))

    return routes


def _model(name: str, models: Models) -> dict[str, Any]:
    model, _ = find_model(models, name)
    return {
        "id": name,
        "object": "model",
        "created": int(model.header.path.stat().st_mtime),
        "owned_by": "f2gguf",
        "fingerprint": model.fingerprint(),
        "dimensions": list(model.header.dims),
        "prompts": list(model.header.prompts),
        "prompt_texts": model.header.prompts,
        "name": model.header.name,
        "variant": model.header.variant,
        "is_reference": is_reference(model.header),
        "drift": drift_of(model.header),
        "max_tokens": model.embedder.max_seq_length,
        "device": model.embedder.description,
        "selftest": model.selftest,
        "warnings": model.warnings,
    }
