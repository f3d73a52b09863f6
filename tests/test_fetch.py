"""`quantize fetch` with the real Hub client, against a stand-in for the Hub on the loopback."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from f2gguf.quantize.checkpoint.folder import NEEDED as READ
from f2gguf.quantize.source.fetch import find_model, is_needed
from f2gguf.quantize.source.lock import read_lock
from hub import (
    ALWAYS,
    READER,
    WRITER,
    Fault,
    Hub,
    finish,
    flip_bit,
    only_error,
    run_command,
    run_python,
    serving,
    start_command,
)

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
    "LICENSE.txt": b"Apache License",
    "NOTICE": b"written by org",
}
LFS = "model.safetensors"
LARGE = random.Random(0).randbytes(12_000_000)
KEPT = 11 * 2**20  # of LARGE, where its last byte is missing: 1 MiB is written at a time
NOT_NEEDED = {"pytorch_model.bin": b"\x80\x04pickle", "modeling.py": b"raise SystemExit", "README.md": b"# tiny"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add(REPO, NEEDED | NOT_NEEDED, sha=COMMIT)
    with serving(hub):
        yield hub


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    home = tmp_path / "home"
    return lambda *arguments, **options: run_command("quantize", "fetch", *arguments, hub=hub, home=home, **options)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    """A lock with a pinned entry, and one that still lacks its revision."""
    path = tmp_path / "models.lock"
    pinned = f'[models.pinned]\nrepo = "{REPO}"\nrevision = "{COMMIT}"\n'
    path.write_text(f'default = "pinned"\n{pinned}[models.preview]\nrepo = "org/preview"\nmax_tokens = 77\n')
    return path


@pytest.fixture
def locked(lock: Path, hub: Hub, tmp_path: Path) -> Path:
    """The lock, after `quantize lock` wrote the files of its pinned entry."""
    assert run_command("quantize", "lock", "pinned", "--lock", lock, hub=hub, home=tmp_path / "other").returncode == 0
    hub.requests.clear()
    return lock


def cached(tmp_path: Path, name: str) -> Path:
    """Where the cache keeps the bytes of a file of the pinned commit."""
    return (tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / COMMIT / name).resolve()


def fault_of(name: str, *, times: int = 1) -> Fault:
    """A bit flips in a file whenever it is sent."""
    return Fault(
        "GET", f"stored/{sha256_of(NEEDED[name])}" if name == LFS else f"{COMMIT}/{name}", times, sent=flip_bit
    )


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def printed_files(process: CompletedProcess[str]) -> dict[str, bytes]:
    """What the folder holds whose path the command printed as its only line."""
    assert (process.returncode, process.stderr) == (0, "")
    folder = Path(process.stdout.removesuffix("\n"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_needed_files_arrive_byte_for_byte(fetch: Fetch, lock: Path) -> None:
    assert printed_files(fetch("pinned", "--lock", lock)) == NEEDED


def test_code_and_pickles_are_not_even_asked_about(fetch: Fetch, hub: Hub) -> None:
    assert fetch(PINNED).returncode == 0
    assert hub.asked_for("GET", "HEAD") == set(NEEDED)


def test_licences_come_along_and_are_no_part_of_what_is_converted() -> None:
    legal = ("LICENSE", "License.md", "license.txt", "LICENCE", "NOTICE", "NOTICE.txt")
    assert all(map(is_needed, legal))
    assert not any(Path(name).match(pattern) for name in legal for pattern in READ)
    assert not any(map(is_needed, ("docs/LICENSE", "README.md", "tokenizer.py", "2_Dense/pytorch_model.bin")))


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


@pytest.mark.parametrize("is_offline", [False, True])
@pytest.mark.parametrize("model", [PINNED, REPO])
def test_cached_model_needs_no_hub(fetch: Fetch, hub: Hub, model: str, is_offline: bool) -> None:
    first = fetch(model)
    hub.stop()
    second = fetch(model, is_offline=is_offline)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")


def test_cached_commit_is_not_asked_about_again(fetch: Fetch, hub: Hub) -> None:
    fetch(PINNED)
    hub.requests.clear()
    assert printed_files(fetch(PINNED)) == NEEDED
    assert not hub.requests


def test_cached_files_are_not_sent_again(fetch: Fetch, hub: Hub) -> None:
    fetch(REPO)
    hub.repos[REPO].commit({"README.md": b"# new"})
    hub.requests.clear()
    assert printed_files(fetch(REPO)) == NEEDED
    assert not hub.asked_for("GET")


def test_cached_model_of_the_lock_needs_neither_hub_nor_memory(
    fetch: Fetch, hub: Hub, locked: Path, tmp_path: Path
) -> None:
    assert printed_files(fetch("pinned", "--lock", locked)) == NEEDED
    shutil.rmtree(tmp_path / "home" / "f2gguf")
    hub.requests.clear()
    assert printed_files(fetch("pinned", "--lock", locked)) == NEEDED
    assert not hub.requests


def test_lock_that_the_hub_contradicts_is_refused_before_any_file_is_sent(fetch: Fetch, hub: Hub, locked: Path) -> None:
    sha256 = sha256_of(NEEDED[LFS])
    locked.write_text(locked.read_text().replace(sha256, "f" * 64))
    line = only_error(fetch("pinned", "--lock", locked))
    assert [words for words in (LFS, sha256, "f" * 64, "`quantize lock --check pinned`") if words not in line] == []
    assert not hub.asked_for("GET")


def test_bit_that_flips_in_the_cache_costs_that_file_only(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    fetch(PINNED)
    for name in NEEDED:
        path = cached(tmp_path, name)
        before = path.stat()
        path.write_bytes(flip_bit(path.read_bytes()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        hub.requests.clear()
        assert printed_files(fetch(PINNED)) == NEEDED
        assert hub.asked_for("GET") == {name}


def test_bits_that_flip_on_the_way_are_seen_and_files_sent_again(fetch: Fetch, hub: Hub) -> None:
    hub.faults += [fault_of(name) for name in NEEDED]
    assert printed_files(fetch(PINNED)) == NEEDED
    sent = [request for request in hub.asked("GET", COMMIT) if request.status == 200 and "/api/" not in request.path]
    assert len(sent + hub.asked("GET", "/stored/")) == 2 * len(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_hub_that_sends_other_bytes_is_refused(fetch: Fetch, hub: Hub, tmp_path: Path, name: str) -> None:
    hub.faults.append(fault_of(name, times=ALWAYS))
    assert f"the Hub sends {name} with " in only_error(fetch(PINNED))
    assert not cached(tmp_path, name).exists()


def test_killed_download_goes_on_where_it_stopped(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    hub.repos[REPO].commit({LFS: LARGE})
    hub.faults.append(Fault("GET", "/stored/", send_bytes=len(LARGE) - 1))
    hub.faults.append(Fault("GET", "/stored/", before=lambda _: started[0].kill()))
    started.append(start_command("quantize", "fetch", REPO, hub=hub, home=tmp_path / "home"))
    assert finish(started[0]).returncode == -9
    hub.requests.clear()
    assert printed_files(fetch(REPO)) == {**NEEDED, LFS: LARGE}
    sent = [(request.range, request.sent_bytes) for request in hub.asked("GET", "/stored/")]
    assert sent == [(f"bytes={KEPT}-", len(LARGE) - KEPT)]


@pytest.mark.parametrize("left", [b"other bytes", NEEDED[LFS], flip_bit(NEEDED[LFS]), NEEDED[LFS] + b"more"])
def test_what_a_killed_download_left_is_verified(fetch: Fetch, tmp_path: Path, left: bytes) -> None:
    name = f"{sha256_of(NEEDED[LFS])}.f2gguf.incomplete"
    part = tmp_path / "home" / "hub" / "models--org--tiny" / "blobs" / name
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert printed_files(fetch(PINNED)) == NEEDED
    assert not part.exists()


def test_connection_that_is_reset_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    """The stand-in cannot reset connections."""
    code = """
import httpx2, f2gguf.runtime.hub.client as client
from f2gguf.quantize.cli import quantize
real, resets = client._chunks, []
def chunks(url, start):
    if "model.safetensors" in url and not resets:
        resets.append(url)
        yield bytes(range(200))
        raise httpx2.ReadError("Connection reset by peer")
    yield from real(url, start)
client._chunks = chunks
quantize(["fetch", "org/tiny"])
"""
    assert printed_files(run_python(code, hub=hub, home=tmp_path / "home")) == NEEDED
    assert [request.range for request in hub.asked("GET", "/stored/")] == ["bytes=200-"]


@pytest.mark.slow
def test_interrupted_download_ends_at_once(hub: Hub, tmp_path: Path) -> None:
    def interrupt(_: Hub) -> None:
        started[0].send_signal(signal.SIGINT)
        time.sleep(30)

    started: list[subprocess.Popen[str]] = []
    hub.faults.append(Fault("GET", "/stored/", before=interrupt))
    started.append(start_command("quantize", "fetch", PINNED, hub=hub, home=tmp_path / "home"))
    process = finish(started[0], timeout_s=8)  # its connection would time out after 10
    assert (process.returncode, process.stdout) == (130, "")


def test_two_runs_at_once_both_end_well(hub: Hub, tmp_path: Path) -> None:
    both = [start_command("quantize", "fetch", PINNED, hub=hub, home=tmp_path / "home") for _ in range(2)]
    assert [printed_files(finish(process)) for process in both] == [NEEDED, NEEDED]


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


@pytest.mark.parametrize(("attribute", "token"), [("is_private", READER), ("is_gated", WRITER)])
def test_token_opens_what_it_may_open(fetch: Fetch, hub: Hub, attribute: str, token: str) -> None:
    setattr(hub.repos[REPO], attribute, True)
    assert printed_files(fetch(PINNED, token=token)) == NEEDED


def test_connection_that_breaks_is_one_clear_error(fetch: Fetch, hub: Hub, tmp_path: Path) -> None:
    hub.faults += [Fault("GET", "/stored/", send_bytes=1000), Fault("GET", "/stored/", ALWAYS, send_bytes=0)]
    assert f"{REPO}@{COMMIT[:12]}: {LFS}: the Hub cannot be reached" in only_error(fetch(PINNED))
    assert not [path for path in (tmp_path / "home").rglob("model.safetensors") if path.is_file()]


def test_connection_that_breaks_once_breaks_nothing(fetch: Fetch, hub: Hub) -> None:
    hub.faults.append(Fault("GET", "/stored/", send_bytes=1000))
    process = fetch(PINNED)
    assert process.returncode == 0
    assert (Path(process.stdout.strip()) / "model.safetensors").read_bytes() == NEEDED["model.safetensors"]
    assert len(hub.asked("GET", "/stored/")) == 2


def test_repository_without_safetensors_is_refused(fetch: Fetch, hub: Hub) -> None:
    hub.repos[REPO].commit({LFS: None, "pytorch_model.bin": None})
    assert "has no safetensors weights" in only_error(fetch(REPO))
    assert not hub.asked_for("GET")


def test_pickle_is_refused_and_called_so(fetch: Fetch, hub: Hub) -> None:
    hub.repos[REPO].commit({LFS: None, "pytorch_model.bin": None, "model.pt": b"\x80\x04pickle"})
    assert "has its weights as pickle only (model.pt)" in only_error(fetch(REPO))
    assert not hub.asked_for("GET")


def test_archive_of_torch_is_fetched_where_there_are_no_safetensors(fetch: Fetch, hub: Hub) -> None:
    shards = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00002.bin": b"PK\3\4"}
    hub.repos[REPO].commit({LFS: None, **shards, "optimizer.bin": b"PK", "onnx/pytorch_model.bin": b"PK"})
    archives = {**shards, "pytorch_model.bin": NOT_NEEDED["pytorch_model.bin"]}
    assert printed_files(fetch(REPO)) == {name: data for name, data in NEEDED.items() if name != LFS} | archives


def test_disk_that_is_too_small_is_refused_before_any_file_is_sent(fetch: Fetch, hub: Hub) -> None:
    size, exabyte = (b'"size": %d' % size for size in (len(NEEDED[LFS]), 10**18))
    hub.faults.append(Fault("GET", "/api/models", sent=lambda body: body.replace(size, exabyte)))
    line = only_error(fetch(PINNED))
    assert "needs 1000000000.00 GB and the disk has" in line
    assert "HF_HOME" in line
    assert "--out" not in line, "`quantize fetch` has no such flag"
    assert not hub.asked_for("GET")


@pytest.mark.parametrize("model", ["preview", "org/preview"])
def test_entry_without_revision_says_how_to_name_one(fetch: Fetch, hub: Hub, lock: Path, model: str) -> None:
    assert "org/preview@<commit>" in only_error(fetch(model, "--lock", lock), exit_code=2)
    assert not hub.requests


def test_naming_the_revision_keeps_what_the_lock_states(lock: Path) -> None:
    entry, _ = find_model(f"org/preview@{COMMIT}", read_lock(lock))
    assert (entry.revision, entry.max_tokens) == (COMMIT, 77)
