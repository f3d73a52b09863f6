"""Vectors from an OpenAI-compatible embeddings endpoint, asked for in batches."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from f2gguf.runtime.errors import EndpointFailed, WrongUsage, parsing
from numpy.typing import NDArray

if TYPE_CHECKING:
    import httpx2

BATCH_TEXTS = 32  # what text-embeddings-inference takes at most, unless told otherwise
N_TRIES = 4
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 10.0, 600.0
MAX_WAIT_S = 60.0
DEFAULT_KEY_ENV = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, which model for, and with which key."""

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The URL without a password or query, which may be secret."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def failed(self, reason: str) -> EndpointFailed:
        """The error of this endpoint; a server that quotes the key does not get it printed."""
        return EndpointFailed(f"{self.name}: {reason.replace(self.key, '***') if self.key else reason}")


def open_endpoint(url: str, *, model: str | None = None, key_env: str | None = None) -> Endpoint:
    """The endpoint at `url`, with or without its last "/embeddings"; the key is the environment variable's `key_env`.

    Without `key_env` it is OPENAI_API_KEY's where that is set. Raises `WrongUsage` for a variable without a usable key.
    """
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    key = os.environ.get(key_env or DEFAULT_KEY_ENV, "").strip()
    if (key_env and not key) or not (key.isascii() and key.isprintable()):
        raise WrongUsage(f"{key_env or DEFAULT_KEY_ENV}: the environment variable holds no key (--api-key-env).")
    if not path.endswith("/embeddings"):
        path += "/embeddings"
    return Endpoint(parts._replace(path=path, fragment="").geturl(), model, key or None)


def endpoint_vectors(
    endpoint: Endpoint, texts: Sequence[str], *, on_progress: Callable[[int], None] | None = None
) -> NDArray[np.float32]:
    """Vectors of texts as they are, (n_texts, n_embd) float32, values as the endpoint gives them.

    Waits and tries again where it is busy (429 and 5xx) or breaks off. Raises `EndpointFailed`.
    """
    import httpx2

    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    rows: list[NDArray[np.float32]] = []
    try:
        with httpx2.Client(headers=headers, timeout=timeout) as client:
            for start in range(0, len(texts), BATCH_TEXTS):
                batch = list(texts[start : start + BATCH_TEXTS])
                rows.append(_batch_vectors(endpoint, _ask(client, endpoint, batch), len(batch)))
                if on_progress:
                    on_progress(len(batch))
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise endpoint.failed(f"cannot be asked: {reason}. Is the server up?") from error
    widths = sorted({batch.shape[1] for batch in rows})
    if len(widths) > 1:
        raise endpoint.failed(f"gives vectors of different widths: {', '.join(map(str, widths))}.")
    return np.concatenate(rows)


def _ask(client: httpx2.Client, endpoint: Endpoint, texts: list[str]) -> httpx2.Response:
    """The answer of status 200 to one batch."""
    import httpx2

    body: dict[str, Any] = {"input": texts, "encoding_format": "float"}
    if endpoint.model:
        body["model"] = endpoint.model
    for n_tries in range(1, N_TRIES + 1):
        try:
            response = client.post(endpoint.url, json=body)
        except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
            if n_tries == N_TRIES:
                raise
            time.sleep(2.0 ** (n_tries - 2))
            continue
        if response.status_code == httpx2.codes.OK:
            return response
        if n_tries == N_TRIES or not (response.status_code == 429 or response.status_code >= 500):
            break
        time.sleep(_wait_s(response, 2.0 ** (n_tries - 2)))
    said = " ".join(response.text.split())[:200]
    hint = {401: "Check --api-key-env.", 403: "Check --api-key-env.", 404: "Check the URL and --endpoint-model."}
    raise endpoint.failed(
        f"status {response.status_code} {response.reason_phrase}: {said} {hint.get(response.status_code, '')}".rstrip()
    )


def _wait_s(response: httpx2.Response, default: float) -> float:
    """Seconds that Retry-After asks for, where it is a number; at most a minute."""
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), MAX_WAIT_S) if asked.isdecimal() else default


def _batch_vectors(endpoint: Endpoint, response: httpx2.Response, n_texts: int) -> NDArray[np.float32]:
    """Vectors of one answer in the order of its indices, (n_texts, n_embd) float32."""
    kind = response.headers.get("Content-Type", "no content type")
    with parsing(
        f"{endpoint.name}: its answer ({kind})", EndpointFailed, "Give the base URL of an API, such as http://host/v1."
    ):
        rows = response.json()["data"]
        placed = {row.get("index", i): _vector(row["embedding"]) for i, row in enumerate(rows)}
        if len(rows) != n_texts or set(placed) != set(range(n_texts)):
            raise ValueError(f"{n_texts} texts were sent and {len(rows)} vectors came, with indices {sorted(placed)}")
        vectors = np.stack([placed[i] for i in range(n_texts)])
        if vectors.ndim != 2 or not vectors.shape[1]:
            raise ValueError(f"an embedding has the shape {vectors.shape[1:]}, which is no vector")
        return vectors


def _vector(embedding: Any) -> NDArray[np.float32]:
    """One vector, from base64 of little-endian float32 or from numbers."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")
    with np.errstate(over="ignore"):
        return np.array(embedding, dtype=np.float32)  # null becomes NaN, which the caller refuses
