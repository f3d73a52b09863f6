"""What a request of any dialect asks for, and what it is told: vectors, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from f2gguf.runtime.llama.encoder import Input
from f2gguf.runtime.llama.engine import Rows
from starlette.responses import Response

_SHOWN_INDICES = 256  # in a header; clients and proxies take a few kB


@dataclass(frozen=True)
class Asked:
    """What a request of any dialect asks for; `prompt_name` None means documents."""

    inputs: Sequence[Input]
    prompt_name: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    truncate: bool = False


@dataclass(frozen=True)
class Answer:
    """Vectors of a request, and what the response tells about them."""

    rows: Rows  # (n_texts, n_dims)
    n_tokens: int
    truncated: list[int]
    fingerprint: str

    @property
    def headers(self) -> dict[str, str]:
        headers = {"X-Embedding-Fingerprint": self.fingerprint}
        if self.truncated:
            more = ",..." * (len(self.truncated) > _SHOWN_INDICES)
            headers["X-Embedding-Truncated"] = ",".join(map(str, self.truncated[:_SHOWN_INDICES])) + more
        return headers


@dataclass(frozen=True)
class Reason:
    """A status and the words that OpenAI's and TEI's clients know it by; TEI has other statuses for some."""

    status: int
    code: str  # OpenAI's error.code
    error_type: str  # TEI's
    tei_status: int | None = None
    type: str = "invalid_request_error"  # OpenAI's error.type


REASONS = {
    "invalid": Reason(400, "invalid_value", "Validation", 422),
    "empty": Reason(400, "empty_input", "Empty"),
    "too_long": Reason(400, "context_length_exceeded", "Validation", 413),
    "too_many_texts": Reason(400, "too_many_inputs", "Validation", 413),
    "body_too_large": Reason(413, "request_too_large", "Validation"),
    "body_too_slow": Reason(408, "request_timeout", "Validation"),
    "no_key": Reason(401, "invalid_api_key", "Unauthorized"),
    "unknown_model": Reason(404, "model_not_found", "Validation"),
    "unknown_path": Reason(404, "unknown_url", "Validation"),
    "wrong_method": Reason(405, "method_not_allowed", "Validation"),
    "no_vector": Reason(422, "no_finite_vector", "Backend", 424),
    "overloaded": Reason(429, "rate_limit_exceeded", "Overloaded", type="rate_limit_error"),
    "draining": Reason(503, "shutting_down", "Unhealthy", type="server_error"),
    "failed": Reason(500, "internal_error", "Backend", type="server_error"),
}


class Refused(Exception):
    """A request that gets no vectors: a key of REASONS, and the words for the client."""

    def __init__(
        self, reason: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = REASONS[reason]
        self.message = message
        self.param = param
        self.headers = headers or {}

    def response(self, path: str) -> Response:
        """The answer in the dialect that speaks at `path`."""
        reason = self.reason
        body: dict[str, Any]
        status = reason.status
        if path.startswith("/v1/"):
            error = {"message": self.message, "type": reason.type, "param": self.param, "code": reason.code}
            body = {"error": error}
        elif path.startswith("/api/"):
            body = {"error": self.message}
        else:
            body = {"error": self.message, "error_type": reason.error_type}
            status = reason.tei_status or status
        return json_response(body, status=status, headers=self.headers)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON of what may hold numpy arrays: float32 as its shortest decimals, in C."""
    content = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status_code=status, headers=headers, media_type="application/json")
