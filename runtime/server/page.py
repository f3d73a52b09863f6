"""The page at /, and a policy for browsers: its own script and style run, nothing else does, nothing goes elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import HTMLResponse

PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


def page_response() -> HTMLResponse:
    """The page and its headers, the same for everybody: what it shows, it asks the server for."""
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _POLICY.format(script=_source(html, "script"), style=_source(html, "style")),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


def _source(html: str, tag: str) -> str:
    """The hash by which the policy knows the page's one <script> or <style>."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
