"""The stand-in for the Hub is strict: it refuses what the tests that use it would not notice."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from hub import WRITER, Hub, serving
from hub.card import check_card

REPO = "org/new"
WEIGHTS = bytes(range(256)) * 100


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.add(REPO)
        yield hub


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and error message of a request by hand, for what the client would never send."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["X-Error-Message"]


def test_storage_takes_signed_urls_only_and_no_tokens(hub: Hub) -> None:
    hub.repos[REPO].commit({"new-Q8_0.gguf": WEIGHTS})
    path = f"/{REPO}/stored/{hashlib.sha256(WEIGHTS).hexdigest()}/new-Q8_0.gguf"
    signed = hub.storage_url + hub.sign(path)
    assert ask(signed)[0] == 200
    assert ask(hub.storage_url + path) == (403, "AccessDenied")
    assert ask(signed, Authorization=f"Bearer {WRITER}") == (400, "Only one auth mechanism allowed")


@pytest.mark.parametrize(
    ("operation", "status", "reason"),
    [
        ({"key": "lfsFile", "value": {"path": "x", "algo": "sha256", "oid": "0" * 64, "size": 1}}, 400, "LFS pointer"),
        ({"key": "file", "value": {"path": "x", "encoding": "base64", "content": "AAAA"}}, 400, "binary files"),
    ],
    ids=lambda value: value["key"] if isinstance(value, dict) else "",
)
def test_commit_that_cannot_be_right_is_refused(hub: Hub, operation: dict[str, Any], status: int, reason: str) -> None:
    lines = [{"key": "header", "value": {"summary": "by hand"}}, operation]
    body = "\n".join(map(json.dumps, lines)).encode()
    found = ask(f"{hub.url}/api/models/{REPO}/commit/main", body, Authorization=f"Bearer {WRITER}")
    assert found[0] == status
    assert reason in found[1]
    assert len(hub.repos[REPO].commits) == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("license: [apache-2.0, mit]", ""),
        ("license: apache 2", '"license" must be one of'),
        ("base_model_relation: shrunk", '"base_model_relation" must be one of [adapter, finetune, merge, quantized]'),
        ("base_model: Kokoro 82M", '"base_model" with value "Kokoro 82M" is not valid'),
        ("language: no", '"language[0]" with value "False" is not valid'),
        ("language: ['no', en]", ""),
        ("tags: gguf", '"tags" must be an array'),
        ("license: mit\nlicense: mit", "duplicated mapping key"),
        ("tags: [a, b", "Invalid YAML"),
        ("model-index: [{name: x, results: [{}]}]", '"model-index[0].results[0].task.type" is required'),
    ],
)
def test_front_matter_is_checked_as_the_hub_does(line: str, error: str) -> None:
    errors, warnings = check_card(f"---\n{line}\n---\n# new\n")
    assert not warnings
    assert errors[:1] == [] if not error else error in errors[0]


def test_card_without_front_matter_is_a_warning() -> None:
    assert check_card("# new\n---\nlicense: mit\n---\n") == ([], ["empty or missing yaml metadata in repo card"])
