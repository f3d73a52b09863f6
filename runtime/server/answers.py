"""What all dialects share: fields of a request, the job that it becomes, and its answer or refusal."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import orjson
from f2gguf.runtime.llama.runner import Rows
from f2gguf.runtime.llama.tokenizer import Input
from f2gguf.runtime.precision import quantized
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, model_validator
from starlette.responses import Response

# fail_fast: a long list of wrong values gets one error, not one for each value
TokenIds = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
Text = Annotated[StrictStr, Field(min_length=1)]
ModelName = Annotated[
    StrictStr, Field(description="A model's name; it may end in ':query' or ':document' (or another prompt's name).")
]
Width = Annotated[StrictInt, Field(ge=1)]
# True and false; and NVIDIA's and Cohere's words: END cuts, NONE does not
Truncate = StrictBool | Annotated[StrictStr, Field(json_schema_extra={"enum": ["END", "NONE", "START"]})]
# A text, texts, the ids of one text, or of several
Inputs = (
    Text
    | Annotated[list[Text], Field(fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
)
MODEL = (
    "A model's name; it may end in ':query' or ':document' (or another prompt's name). It may be left out where the "
    "server has one model."
)
INPUTS = (
    "A text or texts. Where the server was started with --allow-token-ids, also the ids of one text or several by this "
    "model's own tokenizer; special tokens that they lack are added."
)

INPUT_TYPE = (
    "Which prompt is put before every text: 'query', 'document' (default) or another of the model's. 'passage', "
    "'search_query' and 'search_document' are understood. 'classification' and 'clustering' mean documents, unless the "
    "model has such a prompt."
)

VectorType = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
VECTOR_TYPES = (
    "float [default]: numbers; base64: their little-endian float32 bytes; int8 and uint8: whole numbers, of files that "
    "state ranges; binary and ubinary: a bit for each dimension, eight to a number."
)

# Fields by which clients of one API or another ask for other vectors, by what they ask for. Where a dialect has no such
# field, it is refused instead of ignored.
_ASKING = {
    "inputs": ("images", "messages"),
    "prompt": ("input_type", "prompt_name", "prompt", "task", "task_type", "instruction"),
    "width": ("dimensions", "output_dimension", "truncate_dim"),
    "cut": ("truncate", "truncation_direction", "truncate_prompt_tokens", "max_tokens", "max_length"),
    "length": ("normalize", "normalized", "normalize_embeddings"),
    "numbers": ("encoding_format", "embedding_types", "embedding_type", "output_dtype", "precision"),
    "tokens": ("add_special_tokens", "late_chunking", "pooling"),
    "all of these": ("parameters",),  # of the Hugging Face Hub's own servers
}
# Their values that ask for nothing else than what any dialect gives
_PLAIN = {
    "encoding_format": "float",
    "embedding_type": "float",
    "output_dtype": "float",
    "precision": "float32",
    "add_special_tokens": True,
    "late_chunking": False,
}
_SHOWN_INDICES = 256  # in a header; clients and proxies take a few kB

# Why a request gets no vectors, in OpenAI's codes, and the HTTP status of each.
STATUSES = {
    "invalid_value": 400,
    "empty_input": 400,
    "context_length_exceeded": 400,
    "too_many_inputs": 400,
    "request_too_large": 413,
    "request_timeout": 408,
    "unsupported_encoding": 415,
    "invalid_api_key": 401,
    "host_not_allowed": 403,
    "model_not_found": 404,
    "unknown_url": 404,
    "method_not_allowed": 405,
    "no_finite_vector": 422,
    "rate_limit_exceeded": 429,
    "shutting_down": 503,
    "selftest_failed": 503,
    "internal_error": 500,
}


class Refused(Exception):
    """A request that gets no vectors: a key of STATUSES, and a message for the client."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = STATUSES[code]
        self.message = message
        self.param = param
        self.headers = headers or {}


class VectorRequest(BaseModel):
    """A request for vectors. Raises `Refused` for a field of another dialect that asks for other vectors.

    Fields that nobody knows are ignored: clients send names of users, of keys, and what else a proxy may want.
    """

    @model_validator(mode="before")
    @classmethod
    def _ask_in_own_words(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for what, names in _ASKING.items():
            foreign = [name for name in names if name in body and name not in cls.model_fields]
            if asking := [name for name in foreign if body[name] not in (None, [], {}, _PLAIN.get(name))]:
                own = [f"Send {name} instead" for name in names if name in cls.model_fields]
                other = "End the model's name in ':query' or ':document'" if what == "prompt" else "Leave it out"
                words = f"{asking[0]}: this path does not follow it, and could give other vectors than it asks for"
                raise Refused("invalid_value", f"{words}. {[*own, other][0]}.", param=asking[0])
        return body


@dataclass(frozen=True)
class Job:
    """What a request of any dialect asks for.

    `prompt_name` None means documents, `truncate` None that the server's own setting counts.
    """

    inputs: Sequence[Input]
    prompt_name: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    truncate: bool | None = None
    types: Sequence[VectorType] = ()  # of the vectors, besides numbers in float32


@dataclass(frozen=True)
class Answer:
    """Vectors of a request, and what the response says about them."""

    rows: Rows  # (n_texts, n_dims)
    n_tokens: int
    truncated: list[int]
    fingerprint: str
    ranges: Rows | None = None  # where the job asks for int8 or uint8

    @property
    def headers(self) -> dict[str, str]:
        headers = {"X-Embedding-Fingerprint": self.fingerprint}
        if self.truncated:
            more = ",..." * (len(self.truncated) > _SHOWN_INDICES)
            headers["X-Embedding-Truncated"] = ",".join(map(str, self.truncated[:_SHOWN_INDICES])) + more
        return headers

    def rows_as(self, kind: VectorType) -> Any:
        """The vectors in one type: an array, or base64 of each."""
        if kind == "base64":
            return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in self.rows]
        return self.rows if kind == "float" else quantized(self.rows, kind, self.ranges)


def input_list(stated: Inputs) -> list[Input]:
    """The inputs that get a vector each."""
    if isinstance(stated, str):
        return [stated]
    first = stated[0] if stated else ""
    return [cast(TokenIds, stated)] if isinstance(first, int) else cast(list[Input], stated)


def truncates(stated: bool | str | None) -> bool | None:
    """What a field `truncate` says: whether to cut, or None. Raises `Refused` for START, which no dialect can have."""
    words = {"END": True, "NONE": False}
    if not isinstance(stated, str):
        return stated
    if stated.upper() in words:
        return words[stated.upper()]
    reason = "it is none of END, NONE, true and false"
    if stated.upper() == "START":
        reason = "START would cut the beginning of a text, and this server cuts only the end: send END, or NONE"
    raise Refused("invalid_value", f"truncate: {reason}.", param="truncate")


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON whose body may hold numpy arrays: float32 becomes its shortest decimals, in C."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status_code=status, headers=headers, media_type="application/json")
