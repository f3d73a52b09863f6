"""uvicorn's connections, with limits: those whose headers or body come too slowly or never end are cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from f2gguf.runtime.server.models import Limits
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10  # of a request; browsers send a few kB
_GRACE_S = 5.0  # the app answers a slow body with a 408; what is still there after this time is cut off


class ServerConfig(uvicorn.Config):
    """uvicorn's settings for an app. Its connections keep the time limits of `limits`."""

    def __init__(self, app: Any, limits: Limits, **options: Any) -> None:
        super().__init__(app, http=LimitedConnection, log_config=None, access_log=False, ws="none", **options)
        self.limits = limits


class LimitedConnection(HttpToolsProtocol):
    """A connection that closes itself where a request's headers or body do not arrive in time.

    Between requests uvicorn's own keep-alive limit holds.
    """

    def __init__(self, config: ServerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._limits = config.limits
        self._timer: asyncio.TimerHandle | None = None  # runs while headers or a body are awaited
        self._n_header_bytes = 0
        self._in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._await(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is None:  # even empty lines before a request count
            self._await(self._limits.header_timeout_s)
        super().data_received(data)
        if self._timer is None or self._in_body:
            self._n_header_bytes = 0
            return
        self._n_header_bytes += len(data)
        if self._n_header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        if self._timer is None:  # a request behind another one in the same bytes
            self._await(self._limits.header_timeout_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._await(self._limits.body_timeout_s + _GRACE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._await(None)
        super().on_message_complete()

    def _await(self, seconds: float | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._cut_off, seconds)

    def _cut_off(self, seconds: float) -> None:
        """End the connection, unless it waits for the answer to an earlier request."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (is_answering and not self._in_body):
            self._await(seconds)
        else:
            self.transport.close()
