"""Cohere's dialect: /v2/embed. Source: Cohere's API reference, and its client for Python, `cohere.ClientV2`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from f2gguf.runtime.server.answers import (
    INPUT_TYPE,
    MODEL,
    VECTOR_TYPES,
    Job,
    ModelName,
    Refused,
    Text,
    Truncate,
    VectorRequest,
    VectorType,
    Width,
    json_response,
    truncates,
)
from f2gguf.runtime.server.models import Models, find_model, stated_name
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictStr


class CohereEmbedRequest(VectorRequest):
    model: ModelName | None = Field(None, description=MODEL)
    texts: Annotated[list[Text], Field(fail_fast=True)]
    input_type: StrictStr | None = Field(None, description=INPUT_TYPE)
    embedding_types: list[VectorType] | None = Field(None, description=f"Any of them. {VECTOR_TYPES}")
    truncate: Truncate | None = Field(None, description="'END' (default) or 'NONE'. 'START' is refused.")
    output_dimension: Width | None = Field(None, description="One of the model's trained widths.")


class ByType(BaseModel):
    floats: list[list[float]] | None = Field(None, alias="float")
    base64: list[str] | None = None
    int8: list[list[int]] | None = None
    uint8: list[list[int]] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None


class CohereEmbedResponse(BaseModel):
    id: str = Field(description="That of the request, as X-Request-Id.")
    response_type: Literal["embeddings_by_type"]
    embeddings: ByType
    texts: list[str]
    meta: dict[str, Any]


class CohereError(BaseModel):
    message: str


def error_body(refused: Refused) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refusal, as Cohere's clients expect them."""
    return refused.status, {"message": refused.message}


def router(models: Models) -> APIRouter:
    routes = APIRouter(tags=["Cohere"])

    @routes.post("/embed", response_model=CohereEmbedResponse)
    async def embed(body: CohereEmbedRequest, request: Request) -> Response:
        """Vectors of texts. Headers: X-Embedding-Fingerprint, and X-Embedding-Truncated where texts were cut."""
        model, prompt_name = find_model(models, stated_name(models, body.model), body.input_type)
        types: list[VectorType] = body.embedding_types or ["float"]
        cut, facts = truncates(body.truncate) is not False, request.state.facts
        job = Job(body.texts, prompt_name, body.output_dimension, truncate=cut, types=types)
        answer = await model.embed(job, facts)
        fields = {
            "id": facts["request_id"],
            "response_type": "embeddings_by_type",
            "embeddings": {kind: answer.rows_as(kind) for kind in types},
            "texts": body.texts,
            "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": answer.n_tokens}},
        }
        return json_response(fields, headers=answer.headers)

    return routes
