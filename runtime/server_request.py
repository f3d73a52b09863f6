"""What a request of any dialect asks for, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from f2gguf.runtime.engine import Rows

Input = str | Sequence[int]  # a text, or the ids of its tokens

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
