"""The command: health, figures, logs, refusals to start, and an end that loses nothing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Release, Run
from f2gguf.runtime import Embedder
from f2gguf.runtime.server.app import create_app
from f2gguf.runtime.server.batching import Schedule
from f2gguf.runtime.server.cli import named_files
from f2gguf.runtime.server.metrics import Metrics
from f2gguf.runtime.server.models import Limits, open_model
from serving import Served, figure, serving_process
from starlette.testclient import TestClient

SECRET = "a text that nobody else may read"


@pytest.fixture(scope="module")
def served(nano_f16: Path) -> Iterator[Served]:
    with serving_process("-m", nano_f16, is_real=True) as served:
        yield served


def test_health_names_the_models_and_their_selftests(served: Served) -> None:
    answer = httpx.get(f"{served.url}/health")
    assert answer.json() == {"status": "ok", "models": {"nano-F16": "file has no golden vectors"}}


def test_every_response_of_one_model_states_its_fingerprint(served: Served) -> None:
    of_model = httpx.get(f"{served.url}/info").headers["X-Embedding-Fingerprint"]
    for path in ("/health", "/metrics", "/api/version", "/v1/models", "/none"):
        assert httpx.get(f"{served.url}{path}").headers["X-Embedding-Fingerprint"] == of_model
    vectors = httpx.post(f"{served.url}/embed", json={"inputs": "a"})
    assert vectors.headers["X-Embedding-Fingerprint"].startswith(f"{of_model}.")


def test_figures_count_requests_texts_tokens_and_cuts(served: Served, nano: Embedder) -> None:
    model = '{model="nano-F16"}'
    names = ("tokens_total", "texts_total", "truncated_texts_total", "tokenize_seconds_count", "compute_seconds_count")
    before = {name: figure(served.url, f"f2gguf_{name}{model}") for name in names}
    httpx.post(f"{served.url}/embed", json={"inputs": ["a b c", "word " * 5000], "truncate": True})
    added = {name: figure(served.url, f"f2gguf_{name}{model}") - before[name] for name in names}
    assert added == {
        "tokens_total": len(nano.tokenize("a b c")) + 2048,
        "texts_total": 2,
        "truncated_texts_total": 1,
        "tokenize_seconds_count": 1,
        "compute_seconds_count": 2,  # the long text is a step of its own
    }
    assert figure(served.url, 'f2gguf_requests_total{path="/embed",status="200"}') >= 1
    assert figure(served.url, f"f2gguf_queue_tokens{model}") == 0


def test_logs_are_json_with_the_requests_id_and_without_its_text(served: Served) -> None:
    asked = {"model": "nano-F16:query", "input": [SECRET, SECRET]}
    answer = httpx.post(f"{served.url}/v1/embeddings", json=asked)
    httpx.post(f"{served.url}/v1/embeddings", json={"model": SECRET, "input": SECRET, "dimensions": SECRET})
    httpx.get(f"{served.url}/{SECRET}")
    httpx.get(f"{served.url}/info", params={"model": SECRET})
    time.sleep(0.2)
    line = next(line for line in served.logs if line["request_id"] == answer.headers["X-Request-Id"])
    tokens = answer.json()["usage"]["prompt_tokens"]
    assert (line["status"], line["model"], line["n_texts"], line["n_tokens"]) == (200, "nano-F16", 2, tokens)
    assert not [line for line in served.lines if SECRET in line or SECRET.replace(" ", "%20") in line]


def test_selftest_runs_where_a_file_has_golden_vectors_and_can_be_insisted_on(
    nano_release, nano_f16: Path, run: Run
) -> None:
    with serving_process("-m", nano_release.file("Q8_0"), "--selftest") as served:
        assert httpx.get(f"{served.url}/health").json()["models"] == {"f2llm-nano-Q8_0": "passed"}
    refused = run("f2gguf", "serve", "-m", nano_f16, "--selftest", "--port", "0")
    assert refused.returncode == 1
    assert "golden" in refused.stderr


def test_a_selftest_is_finished_beside_requests_and_stops_a_model_that_fails(
    nano_release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f2gguf.runtime.server.models._BEGIN_S", 0)  # one text
    limits, metrics, schedule = Limits(), Metrics(), Schedule()
    path = nano_release.file("Q8_0")
    sound, broken = (open_model(path, name, limits, metrics, schedule) for name in ("sound", "broken"))
    app = create_app([sound, broken], limits, metrics)
    with sound.embedder, broken.embedder, TestClient(app, base_url="http://localhost") as client:
        before = client.get("/health")
        assert (before.status_code, before.json()["models"]["sound"]) == (200, "1 of 16 texts passed, the others run")
        assert client.post("/embed", json={"inputs": "a", "model": "broken"}).status_code == 200
        monkeypatch.setattr(broken.batcher, "_compute", lambda texts, *_, **__: np.ones((len(texts), 256), np.float32))
        for model in (sound, broken):
            model.finish_selftest()
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert health.json()["models"] == {"sound": "passed", "broken": "failed"}
        refused = client.post("/v1/embeddings", json={"input": "a", "model": "broken"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "selftest_failed")
        assert "do not use vectors that it gave before" in refused.json()["error"]["message"]
        assert client.post("/v1/embeddings", json={"input": "a", "model": "sound"}).status_code == 200


def test_a_server_that_stops_during_its_selftest_reports_no_fault(
    nano_release: Release, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("f2gguf.runtime.server.models._BEGIN_S", 0)
    model = open_model(nano_release.file("Q8_0"), "nano", Limits(), Metrics(), Schedule())
    state = model.selftest
    model.embedder.close()
    with caplog.at_level("INFO", logger="f2gguf.serve"):
        model.finish_selftest()
    assert (model.selftest, caplog.records) == (state, [])


def test_term_under_load_loses_no_request_that_was_accepted(nano_f16: Path) -> None:
    """Each client opens a connection a request. Until the server closes its socket, each gets vectors or a 503."""
    with Embedder(nano_f16) as model:  # its own: after a text that overflows, an Embedder computes slightly otherwise
        wanted = model.encode_query("text 7")
    with serving_process("-m", f"nano={nano_f16}") as served, ThreadPoolExecutor(16) as clients:
        outcomes: list[httpx.Response] = []

        def call() -> None:
            while True:
                try:
                    body = {"model": "nano:query", "input": ["text 7"] * 20}
                    outcomes.append(httpx.post(f"{served.url}/v1/embeddings", json=body, timeout=60))
                except httpx.ConnectError:  # the socket is closed
                    return
                except httpx.TransportError:  # in the socket's backlog, and not accepted, when it was closed
                    return
                if outcomes[-1].status_code == 503:
                    return

        calls = [clients.submit(call) for _ in range(16)]
        end = time.monotonic() + 60
        while len(outcomes) < 48 and time.monotonic() < end:
            time.sleep(0.05)
        assert served.end() == 0
        for finished in calls:
            finished.result()
        time.sleep(0.2)
    logged = {line["request_id"]: line["status"] for line in served.logs if line["path"] == "/v1/embeddings"}
    got = {answer.headers["X-Request-Id"]: answer.status_code for answer in outcomes}
    assert logged == got, "every accepted request was answered, and every answer arrived"
    assert set(got.values()) <= {200, 503}
    assert list(got.values()).count(200) > 16
    for answer in outcomes:
        if answer.status_code == 200:
            rows = [item["embedding"] for item in answer.json()["data"]]
            np.testing.assert_allclose(rows, np.tile(wanted, (20, 1)), atol=1e-6)


@pytest.mark.slow
def test_while_draining_health_is_a_503_and_what_was_accepted_goes_on(nano_f16: Path) -> None:
    with serving_process("-m", nano_f16) as served, ThreadPoolExecutor(1) as clients:
        with httpx.Client(base_url=served.url) as watcher:
            watcher.get("/health")
            texts = ["word " * 2000 + str(i) for i in range(25)]
            work = clients.submit(httpx.post, f"{served.url}/embed", json={"inputs": texts}, timeout=120)
            time.sleep(0.5)
            served.process.terminate()
            time.sleep(0.3)
            assert watcher.get("/health").status_code == 503
            refused = httpx.post(f"{served.url}/embed", json={"inputs": "late"})
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json()["error_type"] == "Unhealthy"
        assert work.result().status_code == 200
        assert served.process.wait(60) == 0


@pytest.mark.slow
def test_a_second_ctrl_c_waits_for_nobody(nano_f16: Path) -> None:
    with serving_process("-m", nano_f16, "--drain-timeout", "600") as served, ThreadPoolExecutor(1) as clients:
        texts = ["word " * 2000 + str(i) for i in range(400)]
        work = clients.submit(httpx.post, f"{served.url}/embed", json={"inputs": texts}, timeout=600)
        time.sleep(0.5)
        for _ in range(2):
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        with suppress(httpx.TransportError):  # or a last answer
            assert work.result().status_code == 500
        served.process.wait(60)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_other_machines_are_let_in_only_with_a_key_or_by_name(nano_f16: Path, run: Run, host: str) -> None:
    refused = run("f2gguf", "serve", "-m", nano_f16, "--host", host)
    assert refused.returncode == 2
    assert "--allow-open" in refused.stderr


def test_open_to_others_where_told(nano_f16: Path) -> None:
    with serving_process("-m", nano_f16, "--host", "0.0.0.0", "--allow-open") as served:
        assert httpx.get(f"{served.url}/v1/models").status_code == 200


@pytest.fixture(scope="module")
def told(nano_f16: Path) -> Iterator[Served]:
    options = ("--allow-host", "Models.example.org", "--allow-host", "models:8080", "--truncate", "--allow-token-ids")
    with serving_process("-m", nano_f16, *options) as served:
        yield served


def test_a_server_answers_to_its_own_names_and_those_it_was_told(served: Served, told: Served) -> None:
    own, stated = ("localhost", socket.gethostname(), f"{socket.gethostname()}.local"), ("models.example.org", "models")
    for host in (*own, *stated):
        assert httpx.get(f"{told.url}/health", headers={"Host": f"{host}:8080"}).status_code == 200
        status = httpx.get(f"{served.url}/health", headers={"Host": host}).status_code
        assert status == (200 if host in own else 403)
    assert httpx.get(f"{told.url}/health", headers={"Host": "example.org"}).status_code == 403


def test_a_server_truncates_and_takes_token_ids_where_told(served: Served, told: Served, nano: Embedder) -> None:
    long, ids = {"input": "word " * 5000}, {"input": nano.tokenize("a").tolist()}
    assert httpx.post(f"{told.url}/v1/embeddings", json=long).json()["truncated"] == [0]
    assert httpx.post(f"{told.url}/v1/embeddings", json=ids).status_code == 200
    refused = httpx.post(f"{served.url}/v1/embeddings", json=long)
    assert (refused.status_code, "start f2gguf serve with --truncate" in refused.text) == (400, True)
    assert httpx.post(f"{served.url}/v1/embeddings", json=ids).status_code == 400


def test_keys_come_from_a_file_and_the_environment(nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\none\n\n two \n")
    options = ("--api-keys-file", tmp_path / "keys", "--api-key-env", "KEYS")
    with serving_process("-m", nano_f16, *options, KEYS="three four") as served:
        for key in ("one", "two", "three", "four"):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer # ours"}).status_code == 401


def test_what_cannot_be_served_is_named(nano_f16: Path, run: Run, tmp_path: Path, served: Served) -> None:
    port = served.url.rpartition(":")[2]
    (tmp_path / "empty").touch()
    for words, options in {
        "no model: pass -m MODEL": (),
        "another model is called nano-F16": ("-m", nano_f16, "-m", nano_f16),
        "x.gguf: no such file": ("-m", "x.gguf"),
        "-m =: pass MODEL, or NAME=MODEL": ("-m", "="),
        "cannot listen there: Address already in use": ("-m", nano_f16, "--port", port),
        "holds no key. Write one a line": ("-m", nano_f16, "--api-keys-file", tmp_path / "empty"),
        "cannot be read": ("-m", nano_f16, "--api-keys-file", tmp_path / "none"),
        "--api-key-env NO_SUCH_KEY: holds no key": ("-m", nano_f16, "--api-key-env", "NO_SUCH_KEY"),
        "--allow-host http://a: pass a name": ("-m", nano_f16, "--allow-host", "http://a"),
        "--allow-host bad host: pass a name": ("-m", nano_f16, "--allow-host", "bad host"),
        "--allow-host x:70000: pass a name": ("-m", nano_f16, "--allow-host", "x:70000"),
    }.items():
        refused = run("f2gguf", "serve", *options)
        assert refused.returncode in (1, 2)
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_model_is_called_as_its_file_unless_a_name_is_given(nano_f16: Path) -> None:
    given = (str(nano_f16), "mine=x.gguf", "org/nano:Q8_0", "org/bare@v1")
    assert named_files(given) == {
        "nano-F16": str(nano_f16),
        "mine": "x.gguf",
        "nano-Q8_0": "org/nano:Q8_0",
        "bare": "org/bare@v1",
    }


def test_a_missing_extra_is_named(nano_f16: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\nfrom f2gguf.quantize.cli import f2gguf; f2gguf(prog_name='f2gguf')"
    )
    done = subprocess.run([sys.executable, "-c", code, "serve", "-m", nano_f16], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'f2gguf[serve]'" in done.stderr


def test_the_schema_describes_every_dialect(served: Served) -> None:
    schema = httpx.get(f"{served.url}/openapi.json").json()
    assert {"/v1/embeddings", "/v2/embed", "/embed", "/similarity", "/tokenize", "/api/embed", "/health"} <= set(
        schema["paths"]
    )
    assert ":query" in schema["info"]["description"]
    assert ":query" in schema["components"]["schemas"]["EmbeddingsRequest"]["properties"]["model"]["description"]
