"""Vectors from an OpenAI-compatible embeddings endpoint, asked for in batches by the official `openai` client."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from f2gguf.runtime.errors import EndpointFailed, ExtraMissing, WrongUsage, parsing
from numpy.typing import NDArray

if TYPE_CHECKING:
    import httpx2
    import openai

BATCH_TEXTS = 32  # the default limit of text-embeddings-inference
N_RETRIES = 3
KEY_ENV = "OPENAI_API_KEY"
OPENAI_URL = "https://api.openai.com/v1"
_HINTS = {401: "Check --api-key-env.", 403: "Check --api-key-env.", 404: "Check the URL and the model's name."}
_URL = re.compile(r"\s*\w+://|[\w.-]+:\d+(/|$)")  # a scheme, or a host and port without one

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Endpoint:
    """The base URL of an API, its query, the model to ask for, and the key.

    `is_openai` says whether OpenAI's client may send this host what it reads in the environment: organisation, headers.
    """

    url: str
    query: dict[str, object] = field(default_factory=dict, repr=False)
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    is_openai: bool = False

    @property
    def name(self) -> str:
        """Where texts are sent, without a password or query, which may be secret."""
        return f"{shown_url(self.url)}/embeddings"

    def failed(self, reason: str) -> EndpointFailed:
        """The error of this endpoint. The key is left out, for a server may quote it."""
        return EndpointFailed(f"{self.name}: {reason.replace(self.key, '***') if self.key else reason}")


def is_url(text: str) -> bool:
    """Whether `text` means an endpoint: http://host/v1 and localhost:8080/v1 do, org/name and a path do not."""
    return bool(_URL.match(text))


def shown_url(url: str) -> str:
    """A URL without a password or query, which may be secret."""
    return re.sub("//[^/]*@", "//", url).partition("?")[0]


def require_client(what: str) -> None:
    """Raise `ExtraMissing` unless openai is installed, which `what` needs."""
    if not find_spec("openai"):
        raise ExtraMissing(f"{what}: openai is not installed. Run: pip install 'f2gguf[endpoints]'")


def open_endpoint(url: str, *, model: str | None = None, key_env: str | None = None) -> Endpoint:
    """The endpoint at `url`, which may end in "/embeddings"; `key_env` names the environment variable with the key.

    Without `key_env`, OPENAI_API_KEY is sent to OpenAI alone: to api.openai.com, or to where OPENAI_BASE_URL points.
    Raises `WrongUsage` for what is no URL and for a variable without a usable key, `ExtraMissing` without `openai`.
    """
    parsed, own = _parsed(url), _parsed(os.environ.get("OPENAI_BASE_URL") or OPENAI_URL)
    require_client(shown_url(url))
    base = re.split("[?#]", url, maxsplit=1)[0].rstrip("/").removesuffix("/embeddings")
    is_openai = (parsed.scheme, parsed.host, parsed.port) == (own.scheme, own.host, own.port)
    if is_openai and not key_env and os.environ.get(KEY_ENV, "").strip():
        key_env = KEY_ENV
    key = os.environ.get(key_env, "").strip() if key_env else None
    if key_env and not (key and key.isascii() and key.isprintable()):
        raise WrongUsage(f"{key_env}: the environment variable holds no usable key (--api-key-env).")
    return Endpoint(base, dict(parsed.params), model, key, is_openai)


@contextlib.contextmanager
def connected(endpoint: Endpoint) -> Iterator[Callable[..., Vectors]]:
    """Open a client, and give the function `ask(texts, run=map, on_progress=None)` -> (n_texts, n_embd) float32.

    `run` asks for the batches: `map`, or the `map` of an executor, which asks for several at a time. The client waits
    and tries again where the endpoint is busy (429 and 5xx) or cannot be reached; then `ask` raises `EndpointFailed`.
    """
    import httpx2
    import openai

    try:
        http_client = openai.DefaultHttpxClient(follow_redirects=False)  # texts and key go to no other host
    except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
        raise endpoint.failed(f"{error}. Check the proxies and certificates that your environment names.") from error
    with openai.OpenAI(
        base_url=endpoint.url,
        api_key=endpoint.key or "none",  # without one, the client would take that of the environment
        default_query=endpoint.query,
        max_retries=N_RETRIES,
        http_client=http_client,
    ) as client:
        yield functools.partial(_ask, client, endpoint)


def _ask(
    client: openai.OpenAI,
    endpoint: Endpoint,
    texts: Sequence[str],
    *,
    run: Callable[..., Iterable[Vectors]] = map,
    on_progress: Callable[[int], None] | None = None,
) -> Vectors:
    parts: list[Vectors] = []
    batches = [texts[start : start + BATCH_TEXTS] for start in range(0, len(texts), BATCH_TEXTS)]
    for part in run(functools.partial(_ask_batch, client, endpoint), batches):
        parts.append(part)
        if on_progress:
            on_progress(len(part))
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise endpoint.failed(f"gives vectors of different widths: {', '.join(map(str, widths))}.")
    return np.concatenate(parts)


def _parsed(url: str) -> httpx2.URL:
    """A usable URL. Raises `WrongUsage`."""
    import httpx2

    try:
        if not url.isprintable() or " " in url:
            raise ValueError("it holds a space or a control character")
        parsed = httpx2.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
            raise ValueError("it needs http:// or https://, a host, and no port over 65535")
        parsed.host.encode("idna")
    except (ValueError, httpx2.InvalidURL) as error:
        shown = ascii(shown_url(url))[1:-1]
        raise WrongUsage(f"{shown}: is no URL of an API: {error}. Write it like http://localhost:8080/v1.") from error
    return parsed


def _ask_batch(client: openai.OpenAI, endpoint: Endpoint, texts: Sequence[str]) -> Vectors:
    """The vectors of one batch. The client asks for base64, which is exact and small."""
    import openai

    try:
        response = client.embeddings.with_raw_response.create(
            input=list(texts), model=endpoint.model or cast(str, openai.omit), extra_headers=_headers(endpoint)
        ).http_response
    except openai.APIStatusError as error:
        answer = error.response
        hint = f"It redirects to {shown_url(answer.headers['Location'])}." if "Location" in answer.headers else ""
        said = f"{' '.join(answer.text.split())[:200]} {hint or _HINTS.get(error.status_code, '')}".rstrip()
        raise endpoint.failed(f"status {error.status_code} {answer.reason_phrase}: {said}") from error
    except openai.OpenAIError as error:
        reason = str(error.__cause__ or error).rstrip(".") or type(error.__cause__).__name__
        raise endpoint.failed(f"cannot be asked: {reason}. Is the server up?") from error
    from pydantic import TypeAdapter

    kind = response.headers.get("Content-Type", "no content type")
    next_step = "Give the base URL of an API, such as http://host/v1."
    with parsing(f"{endpoint.name}: its answer ({kind})", EndpointFailed, next_step):
        return _in_order(TypeAdapter(_Answer).validate_json(response.content).data, len(texts))


def _headers(endpoint: Endpoint) -> dict[str, Any]:
    """The key. Hosts other than OpenAI's get none of the headers that its client takes from the environment."""
    import openai

    lines = ["OpenAI-Organization", "OpenAI-Project", *os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")]
    names = filter(None, (line.partition(":")[0].strip() for line in lines))
    ambient: dict[str, Any] = {} if endpoint.is_openai else dict.fromkeys(names, openai.omit)
    return ambient | {"Authorization": f"Bearer {endpoint.key}" if endpoint.key else openai.omit}


@dataclass(frozen=True)
class _Row:
    embedding: str | list[float | str | None]  # null becomes NaN, which the callers refuse
    index: int | None = None


@dataclass(frozen=True)
class _Answer:
    data: list[_Row]


def _in_order(rows: list[_Row], n_texts: int) -> Vectors:
    """Vectors of one answer in the order of its indices, (n_texts, n_embd) float32."""
    placed = {i if row.index is None else row.index: _vector(row.embedding) for i, row in enumerate(rows)}
    if len(rows) != n_texts or set(placed) != set(range(n_texts)):
        raise ValueError(f"{n_texts} texts were sent and {len(rows)} vectors came, with indices {sorted(placed)}")
    vectors = np.stack([placed[i] for i in range(n_texts)])
    if not vectors.size:
        raise ValueError("an embedding is empty")
    return vectors


def _vector(embedding: str | list[float | str | None]) -> Vectors:
    """One vector, from base64 of little-endian float32 or from numbers."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    with np.errstate(over="ignore"):
        return np.array(embedding, dtype=np.float32)
