"""text-embeddings-inference's dialect: /embed, /similarity, /tokenize, /info. Source: TEI's docs/openapi.json."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.gguf.header import KEY_VERSION
from f2gguf.runtime.llama.packing import Ids
from f2gguf.runtime.server.answers import Asked, json_response
from f2gguf.runtime.server.models import Models, ServedModel
from f2gguf.runtime.server.openai import MODEL, Text, TokenIds
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

Texts = Annotated[list[Text], Field(fail_fast=True)]
PROMPT_NAME = Field(None, description="'query', 'document' (default) or another of the model's prompts.")
TRUNCATE = Field(False, description="Cut texts that are too long; X-Embedding-Truncated says which. Else 413.")


class Options(BaseModel):
    """What the requests have in common. `model` is ours: TEI serves one."""

    model: Annotated[StrictStr | None, MODEL] = None
    prompt_name: StrictStr | None = PROMPT_NAME
    truncate: StrictBool | None = TRUNCATE
    truncation_direction: Literal["Right", "right"] | None = "Right"


class TEIEmbedRequest(Options):
    inputs: Text | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    normalize: StrictBool | None = Field(None, description="Vectors of length 1 [default: as the model's file says].")
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="One of the trained widths.")


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
    model: Annotated[StrictStr | None, MODEL] = None


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


def router(models: Models, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    routes = APIRouter(tags=["text-embeddings-inference"], responses=errors)

    async def embed(asked: TEIEmbedRequest, request: Request) -> Response:
        """Vectors of texts, (n_texts, n_dims). Headers: X-Embedding-Fingerprint, X-Embedding-Truncated."""
        model, prompt_name = models.find(asked.model, asked.prompt_name)
        inputs = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        asked_for = Asked(inputs, prompt_name, asked.dimensions, asked.normalize, bool(asked.truncate))
        answer = await model.embed(asked_for, request.state.facts)
        return json_response(answer.rows, headers=answer.headers)

    routes.post("/embed", response_model=list[list[float]])(embed)
    routes.post("/", response_model=list[list[float]], include_in_schema=False)(embed)  # huggingface_hub posts there

    @routes.post("/similarity", response_model=list[float])
    async def similarity(asked: SimilarityRequest, request: Request) -> Response:
        """Cosines of one sentence with others, (n_sentences,)."""
        options = asked.parameters or Options()
        model, prompt_name = models.find(options.model, options.prompt_name)
        texts = [asked.inputs.source_sentence, *asked.inputs.sentences]
        answer = await model.embed(Asked(texts, prompt_name, truncate=bool(options.truncate)), request.state.facts)
        cosines = Embedder.similarity(answer.rows[0], answer.rows[1:])[0]
        return json_response(cosines, headers=answer.headers)

    @routes.post("/tokenize", response_model=list[list[Token]])
    async def tokenize(asked: TokenizeRequest) -> Response:
        """The tokens that the model would see of each text."""
        model, prompt_name = models.find(asked.model, asked.prompt_name)
        texts = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        prompt = model.prompt(prompt_name)
        tokens = await model.tokenize(texts, prompt, truncate=True)
        return json_response(await asyncio.to_thread(_tokens, model, tokens.ids, asked.add_special_tokens))

    @routes.get("/info", response_model=Info)
    async def info(model: str | None = None) -> Response:
        """What the model is. `model` chooses one of several [default: the first]."""
        chosen, _ = models.find(model)
        return json_response(_info(chosen), headers={"X-Embedding-Fingerprint": chosen.fingerprint()})

    return routes


def _tokens(model: ServedModel, texts: list[Ids], with_special: bool) -> list[list[dict[str, Any]]]:
    return [
        [
            {"id": token, "text": text, "special": special, "start": None, "stop": None}
            for token, text, special in model.encoder.pieces(ids)
            if with_special or not special
        ]
        for ids in texts
    ]


def _info(model: ServedModel) -> dict[str, Any]:
    header, limits = model.header, model.limits
    return {
        "model_id": model.name,
        "model_sha": model.sha256,
        "model_dtype": header.file_type,
        "model_type": {"embedding": {"pooling": model.embedder.pooling}},
        "max_concurrent_requests": limits.max_requests,
        "max_input_length": model.embedder.max_seq_length,
        "max_batch_tokens": limits.step_tokens,
        "max_client_batch_size": limits.max_texts,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": str(header.values.get(KEY_VERSION, "")),
        "dimensions": list(header.dims),
        "prompts": list(header.prompts),
        "fingerprint": model.fingerprint(),
        "device": model.embedder.description,
    }
