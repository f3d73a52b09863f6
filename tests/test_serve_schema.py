"""schemathesis against the served schema: requests that it allows and forbids, and no answer that it does not state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from f2gguf.runtime import Embedder
from f2gguf.runtime.server.models import Limits
from hypothesis import HealthCheck, given, settings
from serving import serving_thread

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

OURS = ("nano", "nano:query", "nano:latest")
READ = (
    "/v1/models",
    "/v1/models/{name}",
    "/info",
    "/api/tags",
    "/api/ps",
    "/api/version",
    "/health",
    "/fit",
    "/metrics",
)
ASKED = (
    "/v1/embeddings",
    "/v2/embed",
    "/embed",
    "/similarity",
    "/tokenize",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
)


@pytest.fixture(scope="module")
def schema(nano: Embedder) -> Iterator[Any]:
    with serving_thread(nano, Limits(max_body_bytes=100_000, allow_token_ids=True)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_of_the_schema_is_tried(schema: Any) -> None:
    assert set(schema) == {*READ, *ASKED}


CASES = [("GET", path, GenerationMode.POSITIVE) for path in READ]
CASES += [("POST", path, mode) for path in ASKED for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_every_answer_is_one_that_the_schema_states(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Never a 5xx. Other models' names than ours reach nothing: most requests get ours."""

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(case: Any) -> None:
        body = case.body if isinstance(case.body, dict) else {}
        if isinstance(body.get("model"), str) and len(body["model"]) % 4:
            body["model"] = OURS[len(body["model"]) % len(OURS)]
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
