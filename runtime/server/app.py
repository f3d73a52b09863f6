"""The server's app: dialects, health, figures, and the page; and what runs it until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import FrameType
from typing import Any

import uvicorn
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.server import ollama as server_ollama
from f2gguf.runtime.server import openai as server_openai
from f2gguf.runtime.server import tei as server_tei
from f2gguf.runtime.server.answers import Refused, json_response
from f2gguf.runtime.server.guard import Drain, Guard
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits, Models, ServedModel
from f2gguf.runtime.server.page import page_response
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

EXPOSED = ["X-Embedding-Fingerprint", "X-Embedding-Truncated", "X-Request-Id", "Retry-After"]
DESCRIPTION = """Embeddings in the dialects of OpenAI, text-embeddings-inference and Ollama.

A model's name may end in ':query' or ':document' (or another of its prompts' names), in every dialect: the prompt is
put before each text. Without a suffix, `input_type` (OpenAI) or `prompt_name` (text-embeddings-inference), texts are
documents. X-Embedding-Fingerprint is 'SPACE.PROMPT': vectors compare where SPACE is equal (file, pooling, width). With
one model, every response states SPACE.
X-Embedding-Truncated holds the indices of texts that were cut."""
DIALECTS = {
    "/v1/": server_openai.OpenAIError,
    "/api/": server_ollama.OllamaError,
    "/": server_tei.TEIError,
}
_HTTP_ERRORS = {
    404: ("unknown_path", "there is nothing at this path; /openapi.json lists what there is."),
    405: ("wrong_method", "this path takes another method; see /openapi.json."),
}
_BRANCHES = ("str", "int", "float")  # what pydantic calls the branches of a union, beside what is no identifier


class Health(BaseModel):
    status: str
    models: dict[str, str]


def create_app(served: Sequence[ServedModel], limits: Limits, metrics: Metrics) -> FastAPI:
    """The ASGI app over open models; `app.state.drain` tells it that the server is about to end."""
    version = metadata.version("f2gguf")
    app = FastAPI(title="f2gguf", version=version, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.drain = drain = Drain()
    models = Models(served)
    app.include_router(server_openai.router(models, _errors("/v1/")))
    app.include_router(server_ollama.router(models, _errors("/api/"), version))
    app.include_router(server_tei.router(models, _errors("/")))
    _add_operations(app, models, metrics, drain)
    _add_error_handlers(app)
    paths = frozenset({"/", "/openapi.json", *app.openapi()["paths"]})
    headers = {"X-Embedding-Fingerprint": served[0].fingerprint()} if len(served) == 1 else {}
    app.add_middleware(Guard, limits=limits, metrics=metrics, drain=drain, paths=paths, headers=headers)
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key"],
            expose_headers=EXPOSED,
        )
    return app


class Server(uvicorn.Server):
    """uvicorn, which closes its socket only after every accepted request was answered.

    Told to end (SIGTERM, Ctrl-C), it refuses new requests with a 503 meanwhile, in place of a broken connection.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_timeout_s = drain_timeout_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain.has_begun = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.has_begun = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout_s):
                await self._drain.finished()
        await super().shutdown(sockets)


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on an address, on which nobody is let in yet. Raises `WrongUsage` for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise WrongUsage(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}. Choose another."
        ) from error
    with listener:
        yield listener


def serve(app: FastAPI, listener: socket.socket, *, drain_timeout_s: float = 60.0) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish what was accepted, and return."""
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5)
    server = Server(config, app.state.drain, drain_timeout_s)
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, lambda *_: None)  # uvicorn raises it again once it has ended: there is nothing left to end
    server.run([listener])


def _errors(prefix: str) -> dict[int | str, dict[str, Any]]:
    """The refusals of a dialect, for its schema."""
    statuses = (400, 401, 404, 405, 408, 413, 422, 424, 429, 500, 503)
    return {status: {"model": DIALECTS[prefix]} for status in statuses}


def _add_operations(app: FastAPI, models: Models, metrics: Metrics, drain: Drain) -> None:
    @app.get("/health", tags=["operations"], response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 once the models are loaded and tested; 503 while the server is shutting down."""
        status = "draining" if drain.has_begun else "ok"
        tested = {name: model.selftest for name, model in models.by_name.items()}
        return json_response({"status": status, "models": tested}, status=503 if drain.has_begun else 200)

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def get_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return page_response()


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in the words of the dialect that speaks at its path."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        reason, words = _HTTP_ERRORS.get(error.status_code, ("invalid", "the body is no JSON in UTF-8."))
        return Refused(reason, words, headers=error.headers).response(request.url.path)


def _invalid(error: RequestValidationError) -> Refused:
    """What is wrong and where, without the value itself; of the branches of a union, the one that went furthest."""
    worst = max(error.errors(), key=lambda one: len(one["loc"]))
    if worst["type"] == "json_invalid":
        return Refused("invalid", f"the body is no JSON: {worst['ctx']['error']} at character {worst['loc'][-1]}.")
    places = [str(part) for part in worst["loc"][1:] if str(part).isidentifier() or isinstance(part, int)]
    where = ".".join(place for place in places if place not in _BRANCHES) or "body"
    return Refused("invalid", f"{where}: {worst['msg']}", param=where)
