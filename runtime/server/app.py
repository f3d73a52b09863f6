"""The server's app: dialects, health, metrics and the page. And the loop that runs it until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import signal
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import uvicorn
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.server import cohere, ollama, openai, tei
from f2gguf.runtime.server.answers import STATUSES, Refused, json_response
from f2gguf.runtime.server.connections import ServerConfig
from f2gguf.runtime.server.guard import Drain, Guard
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits, Models, ServedModel
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

DESCRIPTION = """Embeddings in the dialects of OpenAI, text-embeddings-inference, Ollama and Cohere.

A model's name may end in ':query' or ':document' (or another of its prompts' names), in every dialect: the prompt is
put before each text. Without a suffix, `input_type` (OpenAI, Cohere) or `prompt_name` (text-embeddings-inference),
texts are documents. OpenAI's paths are answered without /v1 too. X-Embedding-Fingerprint is 'SPACE.PROMPT': vectors
compare where SPACE is equal (file, pooling, width). With one model, every response states SPACE.
X-Embedding-Truncated holds the indices of texts that were cut."""
# Paths that clients of the dialects know and this server has not, and why
_ABSENT = {
    "/embed_all": "vectors of single tokens are not served",
    "/embed_sparse": "sparse vectors are not served",
    "/v1/embed": "of Cohere's paths only /v2/embed is served, which cohere.ClientV2 uses",
    **dict.fromkeys(("/rerank", "/predict", "/v1/rerank", "/v2/rerank"), "the models here embed texts and score none"),
    **dict.fromkeys(
        ("/api/generate", "/api/chat", "/v1/completions", "/v1/chat/completions", "/v1/responses"),
        "the models here embed texts and write none",
    ),
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"),
        "the models are those that `f2gguf serve -m MODEL` was started with",
    ),
}
_BRANCHES = ("str", "int", "float", "bool")  # pydantic's names for branches of a union that look like names of fields
# A policy for browsers: the page's own script and style run, nothing else does, and nothing is sent elsewhere.
_POLICY = (
    "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


class Dialect(NamedTuple):
    """An API that clients know: where it stands, what makes its routes, and the shape of its errors."""

    prefixes: tuple[str, ...]  # the schema describes the first
    paths: tuple[str, ...]  # how the paths begin at which its errors are sent
    router: Callable[[Models], APIRouter]
    error: type[BaseModel]
    error_body: Callable[[Refused], tuple[int, dict[str, Any]]]


DIALECTS = (
    # As in text-embeddings-inference, OpenAI's paths work without /v1 too
    Dialect(("/v1", ""), ("/v1/", "/embeddings", "/models"), openai.router, openai.OpenAIError, openai.error_body),
    Dialect(("/v2",), ("/v2/",), cohere.router, cohere.CohereError, cohere.error_body),
    Dialect(("/api",), ("/api/",), ollama.router, ollama.OllamaError, ollama.error_body),
    Dialect(("",), ("",), tei.router, tei.TEIError, tei.error_body),  # last: it speaks wherever no other does
)


class Health(BaseModel):
    status: str
    models: dict[str, str]


class DeviceFit(BaseModel):
    name: str
    memory_gb: float | None
    fits: bool | None
    tokens_per_s: float | None
    query_ms: float | None


class Fits(BaseModel):
    max_tokens: int
    memory: dict[str, int]
    devices: list[DeviceFit]


def create_app(served: Sequence[ServedModel], limits: Limits, metrics: Metrics) -> FastAPI:
    """The ASGI app over open models. `app.state` has its limits, and `drain`, which says that the server is to end."""
    version = metadata.version("f2gguf")
    app = FastAPI(title="f2gguf", version=version, description=DESCRIPTION, docs_url=None, redoc_url=None)
    for kind in (Refused, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.state.limits, app.state.drain = limits, (drain := Drain())
    models = {model.name: model for model in served}
    for dialect in DIALECTS:
        statuses = {*STATUSES.values(), 424}
        errors: dict[int | str, dict[str, Any]] = {status: {"model": dialect.error} for status in statuses}
        for prefix in dialect.prefixes:
            is_described = prefix == dialect.prefixes[0]
            app.include_router(dialect.router(models), prefix=prefix, responses=errors, include_in_schema=is_described)
    _add_operations(app, models, metrics, drain)
    described = app.openapi()["paths"]
    paths = frozenset({"/", "/openapi.json", "/embeddings", "/models", *described})
    headers = served[0].headers if len(served) == 1 else {}
    app.add_middleware(
        Guard, limits=limits, metrics=metrics, drain=drain, paths=paths, headers=headers, refuse=error_response
    )
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # openai's client for JavaScript sends a dozen of its own
            allow_private_network=True,  # a page that was let in may come from another network
            expose_headers=["X-Embedding-Fingerprint", "X-Embedding-Truncated", "X-Request-Id", "Retry-After"],
        )
    return app


def error_response(refused: Refused, path: str) -> Response:
    """A refusal in the dialect that speaks at `path`."""
    dialect = next(dialect for dialect in DIALECTS if path.startswith(dialect.paths))
    status, body = dialect.error_body(refused)
    return json_response(body, status=status, headers=refused.headers)


class Server(uvicorn.Server):
    """uvicorn, which closes its socket only after every accepted request was answered.

    After SIGTERM or Ctrl-C it answers new requests with a 503 until then, so that no connection breaks.
    """

    def __init__(self, config: ServerConfig, drain: Drain, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_timeout_s = drain_timeout_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain.has_begun = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.has_begun = True
        end = time.monotonic() + self._drain_timeout_s
        while self._drain.n_in_flight and time.monotonic() < end and not self.force_exit:  # by a second Ctrl-C
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on an address. It accepts nobody yet. Raises `WrongUsage` for an address that cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        words = f"--host {host} --port {port}: cannot listen there: {error.strerror}. Choose another."
        raise WrongUsage(words) from error
    with listener:
        yield listener


def serve(app: FastAPI, listener: socket.socket, *, drain_timeout_s: float = 60.0) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish the accepted ones, and return."""
    config = ServerConfig(app, app.state.limits, timeout_graceful_shutdown=5)
    server = Server(config, app.state.drain, drain_timeout_s)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: None)  # uvicorn sends the signal again after its own end
    server.run([listener])


def _add_operations(app: FastAPI, models: Models, metrics: Metrics, drain: Drain) -> None:
    @app.get("/health", tags=["operations"], response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 once models are loaded; 503 if the selftest of one failed, or while the server is shutting down."""
        tested = {name: model.selftest for name, model in models.items()}
        status, code = ("failed", 503) if "failed" in tested.values() else ("ok", 200)
        if drain.has_begun:
            status, code = "draining", 503
        return json_response({"status": status, "models": tested}, status=code)

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def get_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    fitting = asyncio.Lock()

    @app.get("/fit", tags=["operations"], response_model=dict[str, Fits])
    async def get_fit() -> Response:
        """What each model takes in memory, and what it would do on other devices, by estimate: `f2gguf fit`."""
        async with fitting:  # each model is asked for once
            found = {name: await asyncio.to_thread(getattr, model, "fits") for name, model in models.items()}
        return json_response(found)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        parts = re.findall(r"<(script|style)>(.*?)</\1>", html, re.DOTALL)
        hashes = {tag: hashlib.sha256(content.encode()).digest() for tag, content in parts}
        headers = {
            "Content-Security-Policy": _POLICY.format(**{tag: b64encode(h).decode() for tag, h in hashes.items()}),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(html, headers=headers)


async def _on_error(request: Request, error: Exception) -> Response:
    path = request.scope["path"]
    return error_response(_refusal(error, path), path)


def _refusal(error: Exception, path: str) -> Refused:
    """What is wrong and where, without the value itself. Of a union's branches, the one that went furthest counts."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return _http_refusal(error, path)
    assert isinstance(error, RequestValidationError)
    worst = max(error.errors(), key=lambda one: len(one["loc"]))
    if worst["type"] == "json_invalid":
        words = f"the body is no JSON: {worst['ctx']['error']} at character {worst['loc'][-1]}."
        return Refused("invalid_value", words)
    places = [str(part) for part in worst["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    where = ".".join(place for place in places if place not in _BRANCHES) or "body"
    return Refused("invalid_value", f"{where}: {worst['msg']}", param=where)


def _http_refusal(error: HTTPException, path: str) -> Refused:
    code, words = "invalid_value", "the body is no JSON in UTF-8, is nested too deep, or has too long a number."
    if error.status_code == 404:
        reason = f" ({_ABSENT[path]})" if path in _ABSENT else ""
        code, words = "unknown_url", f"there is nothing at this path{reason}; /openapi.json lists what there is."
    if error.status_code == 405:
        code, words = "method_not_allowed", "this path takes another method; see /openapi.json."
    return Refused(code, words, headers=error.headers)
