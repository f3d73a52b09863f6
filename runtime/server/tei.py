"""text-embeddings-inference's dialect: /embed, /similarity, /tokenize, /info. Source: TEI's docs/openapi.json."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.gguf.header import KEY_VERSION
from f2gguf.runtime.server.answers import (
    INPUTS,
    Inputs,
    Job,
    ModelName,
    Refused,
    Text,
    VectorRequest,
    Width,
    input_list,
    json_response,
)
from f2gguf.runtime.server.models import Models, ServedModel, find_model
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictBool, StrictStr

Texts = Annotated[list[Text], Field(fail_fast=True)]
# TEI's own statuses and error types, where they differ from ours and from "Validation"
_STATUSES = {"invalid_value": 422, "context_length_exceeded": 413, "too_many_inputs": 413, "no_finite_vector": 424}
_ERROR_TYPES = {
    "empty_input": "Empty",
    "invalid_api_key": "Unauthorized",
    "no_finite_vector": "Backend",
    "internal_error": "Backend",
    "rate_limit_exceeded": "Overloaded",
    "shutting_down": "Unhealthy",
}
PROMPT_NAME = Field(None, description="'query', 'document' (default) or another of the model's prompts.")
TRUNCATE = Field(
    None,
    description="Cut texts that are too long; X-Embedding-Truncated says which. Where false, they get a 413 [default: "
    "as `auto_truncate` of /info says].",
)


class Options(VectorRequest):
    """What the requests have in common. `model` is ours: TEI serves one."""

    model: ModelName | None = None
    prompt_name: StrictStr | None = PROMPT_NAME
    truncate: StrictBool | None = TRUNCATE
    truncation_direction: Literal["Left", "left", "Right", "right"] | None = Field(
        default="Right", description="Which end is cut. 'Left' is refused where texts may be cut."
    )

    def truncates(self, default: bool) -> bool:
        """Whether to cut texts. Raises `Refused` for cutting their beginning."""
        truncate = default if self.truncate is None else self.truncate
        if truncate and self.truncation_direction in ("Left", "left"):
            words = "truncation_direction: this server cuts only the end of texts: send Right."
            raise Refused("invalid_value", words, param="truncation_direction")
        return truncate


class TEIEmbedRequest(Options):
    inputs: Inputs = Field(description=INPUTS)
    normalize: StrictBool | None = Field(None, description="Vectors of length 1 [default: as the model's file says].")
    dimensions: Width | None = Field(None, description="One of the trained widths.")


class Sentences(BaseModel):
    source_sentence: Text
    sentences: Annotated[Texts, Field(min_length=1)]


class SimilarityRequest(BaseModel):
    inputs: Sentences
    parameters: Options | None = None


class TokenizeRequest(BaseModel):
    inputs: Text | Texts
    add_special_tokens: StrictBool = True
    prompt_name: StrictStr | None = PROMPT_NAME
    model: ModelName | None = None


class Token(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None = Field(description="Always null: tokens are of the normalised text.")
    stop: int | None


class TEIError(BaseModel):
    error: str
    error_type: str


class Info(BaseModel):
    """Of one model, by TEI's names, and what ours add: `dimensions`, `prompts`, `fingerprint`."""

    model_id: str
    served_model_name: str
    model_sha: str = Field(description="SHA-256 of the file.")
    model_dtype: str
    model_type: dict[str, dict[str, str]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    dimensions: list[int]
    prompts: list[str]
    fingerprint: str
    device: str


def error_body(refused: Refused) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of a refusal, as text-embeddings-inference's clients expect them."""
    error_type = _ERROR_TYPES.get(refused.code, "Validation")
    return _STATUSES.get(refused.code, refused.status), {"error": refused.message, "error_type": error_type}


def router(models: Models) -> APIRouter:
    routes = APIRouter(tags=["text-embeddings-inference"])

    @routes.post("/", response_model=list[list[float]], include_in_schema=False)  # huggingface_hub posts there
    @routes.post("/embed", response_model=list[list[float]])
    async def embed(body: TEIEmbedRequest, request: Request) -> Response:
        """Vectors of texts, (n_texts, n_dims). Headers: X-Embedding-Fingerprint, X-Embedding-Truncated."""
        model, prompt_name = find_model(models, body.model, body.prompt_name)
        truncate = body.truncates(model.limits.truncate)
        job = Job(input_list(body.inputs), prompt_name, body.dimensions, body.normalize, truncate)
        answer = await model.embed(job, request.state.facts)
        return json_response(answer.rows, headers=answer.headers)

    @routes.post("/similarity", response_model=list[float])
    async def similarity(body: SimilarityRequest, request: Request) -> Response:
        """Cosines of one sentence with others, (n_sentences,)."""
        options = body.parameters or Options()
        model, prompt_name = find_model(models, options.model, options.prompt_name)
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        job = Job(texts, prompt_name, truncate=options.truncates(model.limits.truncate))
        answer = await model.embed(job, request.state.facts)
        cosines = Embedder.similarity(answer.rows[0], answer.rows[1:])[0]
        return json_response(cosines, headers=answer.headers)

    @routes.post("/tokenize", response_model=list[list[Token]])
    async def tokenize(body: TokenizeRequest) -> Response:
        """The tokens that the model would see of each text."""
        model, prompt_name = find_model(models, body.model, body.prompt_name)
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        tokens = await model.tokenize(texts, model.prompt(prompt_name), truncate=True)
        pieces = await asyncio.to_thread(lambda: list(map(model.encoder.pieces, tokens.ids)))
        return json_response(
            [
                [
                    {"id": token, "text": text, "special": is_special, "start": None, "stop": None}
                    for token, text, is_special in row
                    if body.add_special_tokens or not is_special
                ]
                for row in pieces
            ]
        )

    @routes.get("/info", response_model=Info)
    async def info(model: str | None = None) -> Response:
        """What the model is. `model` chooses one of several [default: the first]."""
        chosen, _ = find_model(models, model)
        return json_response(_info(chosen), headers=chosen.headers)

    return routes


def _info(model: ServedModel) -> dict[str, Any]:
    header, limits = model.header, model.limits
    return {
        "model_id": model.name,
        "served_model_name": model.name,
        "model_sha": model.sha256,
        "model_dtype": header.file_type,
        "model_type": {"embedding": {"pooling": model.embedder.pooling}},
        "max_concurrent_requests": limits.max_requests,
        "max_input_length": model.embedder.max_seq_length,
        "max_batch_tokens": model.batcher.batch_tokens,
        "max_client_batch_size": limits.max_texts,
        "auto_truncate": limits.truncate,
        "tokenization_workers": 1,
        "version": str(header.values.get(KEY_VERSION, "")),
        "dimensions": list(header.dims),
        "prompts": list(header.prompts),
        "fingerprint": model.fingerprint(),
        "device": model.embedder.description,
    }
