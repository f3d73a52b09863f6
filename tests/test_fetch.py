"""`quantize fetch` with the real Hub client, against a stand-in for the Hub on the loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from f2gguf.quantize.fetch import find_model
from f2gguf.quantize.lock import read_lock
from hub import ALWAYS, Fault, Hub, run_command, serving

Fetch = Callable[..., CompletedProcess[str]]
REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = f"{REPO}@{COMMIT}"
NEEDED = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": bytes(range(256)) * 64,
    "modules.json": b"[]\r\n",
    "tokenizer.json": '{"text": "blåbærgrød"}'.encode(),
    "1_Pooling/config.json": b"{}",
}
NOT_NEEDED = {"pytorch_model.bin": b"\x80\x04pickle", "modeling.py": b"raise SystemExit", "README.md": b"# tiny"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add(REPO, NEEDED | NOT_NEEDED, sha=COMMIT)
    with serving(hub):
        yield hub


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    return lambda *arguments: run_command("quantize", "fetch", *arguments, hub=hub, home=tmp_path / "home")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock with a pinned entry, and one that still lacks its revision."""
    path = tmp_path / "models.lock"
    pinned = f'[models.pinned]\nrepo = "{REPO}"\nrevision = "{COMMIT}"\n'
    path.write_text(f'default = "pinned"\n{pinned}[models.preview]\nrepo = "org/preview"\nmax_tokens = 77\n')
    return path


def printed_files(process: CompletedProcess[str]) -> dict[str, bytes]:
    """What the folder holds whose path the command printed as its only line."""
    assert (process.returncode, process.stderr) == (0, "")
    folder = Path(process.stdout.removesuffix("\n"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_error(process: CompletedProcess[str], exit_code: int = 1) -> str:
    """The one line of a refusal; retries that the client logs may come before it."""
    assert (process.returncode, process.stdout) == (exit_code, "")
    assert "Traceback" not in process.stderr
    *before, last = process.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith("error: ")]
    return last


def test_needed_files_arrive_byte_for_byte(fetch: Fetch, lock: Path) -> None:
    assert printed_files(fetch("pinned", "--lock", lock)) == NEEDED


def test_code_and_pickles_are_not_even_asked_about(fetch: Fetch, hub: Hub) -> None:
    assert fetch(PINNED).returncode == 0
    assert hub.asked_for("GET", "HEAD") == set(NEEDED)


def test_weights_in_subfolders_are_not_sent(fetch: Fetch, hub: Hub) -> None:
    """`read_checkpoint` never looks there, and they can double the download."""
    hub.repos[REPO].commit({"checkpoint-100/model.safetensors": b"of an earlier step"})
    assert fetch(REPO).returncode == 0
    assert hub.asked_for("GET") == set(NEEDED)


@pytest.mark.parametrize("model", ["pinned", REPO, PINNED])
def test_every_request_names_the_revision_of_the_lock(fetch: Fetch, hub: Hub, lock: Path, model: str) -> None:
    assert fetch(model, "--lock", lock).returncode == 0
    assert hub.requests
    on_hub = [request.path for request in hub.requests if "/stored/" not in request.path]
    assert [path for path in on_hub if COMMIT not in path] == []


def test_repository_that_no_lock_knows_is_fetched_from_main(fetch: Fetch, hub: Hub) -> None:
    assert printed_files(fetch(REPO)) == NEEDED
    assert hub.requests[0].path == f"/api/models/{REPO}/revision/main"


def test_printed_folder_is_named_after_the_commit(fetch: Fetch) -> None:
    assert Path(fetch(REPO).stdout.strip()).name == COMMIT


@pytest.mark.parametrize("model", [PINNED, REPO])
def test_cached_model_needs_no_hub(fetch: Fetch, hub: Hub, model: str) -> None:
    first = fetch(model)
    hub.stop()
    second = fetch(model)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")


def test_cached_files_are_not_sent_again(fetch: Fetch, hub: Hub) -> None:
    fetch(PINNED)
    hub.requests.clear()
    assert printed_files(fetch(PINNED)) == NEEDED
    assert not hub.asked_for("GET")


@pytest.mark.parametrize("model", [PINNED, REPO])
def test_unreachable_hub_is_one_clear_error(fetch: Fetch, hub: Hub, model: str) -> None:
    hub.stop()
    assert "the Hub cannot be reached" in only_error(fetch(model))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("org/missing", "repository not found"),
        (f"org/missing@{COMMIT}", "repository not found"),
        (f"{REPO}@v9", "revision not found"),
        (f"{REPO}@{'f' * 40}", "revision not found"),
    ],
)
def test_what_is_not_on_the_hub_is_one_clear_error(fetch: Fetch, model: str, reason: str) -> None:
    line = only_error(fetch(model))
    assert model in line
    assert reason in line.lower()


def test_gated_repository_is_one_clear_error(fetch: Fetch, hub: Hub) -> None:
    hub.repos[REPO].is_gated = True
    assert "gated" in only_error(fetch(PINNED))


def test_connection_that_breaks_is_one_clear_error(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.faults += [Fault("GET", "/stored/", send_bytes=1000), Fault("GET", "/stored/", ALWAYS, send_bytes=0)]
    assert PINNED in only_error(fetch(PINNED))
    assert not [path for path in (tmp_path / "home").rglob("model.safetensors") if path.is_file()]


def test_connection_that_breaks_once_breaks_nothing(fetch: Fetch, hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/stored/", send_bytes=1000))
    process = fetch(PINNED)
    assert process.returncode == 0
    assert (Path(process.stdout.strip()) / "model.safetensors").read_bytes() == NEEDED["model.safetensors"]
    assert len(hub.asked("GET", "/stored/")) == 2


def test_repository_without_safetensors_is_refused(fetch: Fetch, hub: Hub) -> None:
    hub.repos[REPO].commit({"model.safetensors": None})
    assert "safetensors" in only_error(fetch(REPO))
    assert not hub.asked_for("GET")


def test_disk_that_is_too_small_is_refused_before_any_file_is_sent(fetch: Fetch, hub: Hub) -> None:
    stated = {"X-Linked-Size": str(10**18)}  # an exabyte: no disk here takes it
    hub.faults.append(Fault("HEAD", "model.safetensors", headers=stated))
    line = only_error(fetch(PINNED))
    assert "needs 1000000000.00 GB and the disk has" in line
    assert "--out" not in line, "`quantize fetch` has no such flag"
    assert not hub.asked_for("GET")


@pytest.mark.parametrize("model", ["preview", "org/preview"])
def test_entry_without_revision_says_how_to_name_one(fetch: Fetch, hub: Hub, lock: Path, model: str) -> None:
    assert "org/preview@<commit>" in only_error(fetch(model, "--lock", lock), exit_code=2)
    assert not hub.requests


def test_naming_the_revision_keeps_what_the_lock_states(lock: Path) -> None:
    entry, _ = find_model(f"org/preview@{COMMIT}", read_lock(lock))
    assert (entry.revision, entry.max_tokens) == (COMMIT, 77)
