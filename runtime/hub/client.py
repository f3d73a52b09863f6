"""Downloads that go on where an earlier run or a broken connection stopped, which the Hub's own client cannot do.

The names from `huggingface_hub.utils` are public, but on none of the client's documented pages: they are imported here
only, and pyproject.toml bounds the client's version for them.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

_N_RETRIES = 5  # of a connection that brings nothing
_CHUNK_BYTES = 1 << 20


def receive(repo: str, commit: str, name: str, size_bytes: int, *, start: int = 0) -> Generator[bytes, None, None]:
    """The bytes of a file from `start` on, as the Hub sends them. The caller checks them."""
    import httpx2
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, name, revision=commit)
    n_read, n_failed = start, 0
    while n_read < size_bytes:
        try:
            for chunk in _chunks(url, n_read):
                n_read, n_failed = n_read + len(chunk), 0
                yield chunk
            return
        except httpx2.TransportError:
            n_failed += 1
            if n_failed > _N_RETRIES:
                raise
            time.sleep(n_failed)


def _chunks(url: str, start: int) -> Iterator[bytes]:
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a range of compressed bytes is useless
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # `receive` tries again, also in the middle of a file
    ) as response:
        hf_raise_for_status(response)
        n_known = start if response.status_code == 200 else 0  # the Hub may ignore the range
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            if new := chunk[n_known:]:
                yield new
            n_known = max(0, n_known - len(chunk))


def hide_progress() -> None:
    """Keep the client's own progress bars from stderr."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
