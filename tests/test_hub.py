"""What the runtime remembers: hashes of files until they change, listings of the Hub; and its errors in words."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from f2gguf.runtime import files
from f2gguf.runtime.files import recall, remember, sha256_file
from f2gguf.runtime.hub.listing import RemoteFile, git_blob_id
from hub import ALWAYS, READER, Fault, Hub, flip_bit, run_python, serving

CONTENT = bytes(range(256)) * 8192  # 2 MiB: worth remembering
REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIST = """
import sys
from f2gguf.runtime.errors import F2ggufError
from f2gguf.runtime.hub.listing import list_files
try:
    print(sorted(list_files(*sys.argv[1:]).files))
except F2ggufError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("F2GGUF_CACHE", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that was written a while ago."""
    path = tmp_path / "weights.gguf"
    path.write_bytes(CONTENT)
    time.sleep(0.15)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read."""
    names: list[str] = []
    real = hashlib.file_digest

    def file_digest(file: BinaryIO, digest: str) -> Any:
        names.append(Path(file.name).name)
        return real(file, digest)  # type: ignore[arg-type]

    monkeypatch.setattr(files.hashlib, "file_digest", file_digest)
    return names


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add(REPO, {"config.json": b"{}"}, sha=COMMIT)
    with serving(hub):
        yield hub


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_unchanged_file_is_read_once(path: Path, reads: list[str]) -> None:
    assert [sha256_file(path) for _ in range(3)] == [sha256_of(CONTENT)] * 3
    assert reads == ["weights.gguf"]


def test_bit_flip_with_the_old_times_is_seen(path: Path) -> None:
    sha256_file(path)
    before = path.stat()
    with path.open("rb+") as file:
        file.seek(1000)
        file.write(bytes([CONTENT[1000] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert sha256_file(path) == sha256_of(path.read_bytes()) != sha256_of(CONTENT)


def test_file_in_anothers_place_is_read(path: Path) -> None:
    sha256_file(path)
    other = path.with_name("other")
    other.write_bytes(flip_bit(CONTENT))
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert sha256_file(path) == sha256_of(flip_bit(CONTENT))


def test_file_that_was_just_written_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    """Another write within the same tick of the file system's clock would show nowhere."""
    path = tmp_path / "fresh"
    path.write_bytes(CONTENT)
    sha256_file(path)
    sha256_file(path)
    assert reads == ["fresh", "fresh"]


def test_write_while_the_file_is_read_is_not_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hashlib.file_digest

    def race(file: BinaryIO, digest: str) -> Any:
        result = real(file, digest)  # type: ignore[arg-type]
        monkeypatch.setattr(files.hashlib, "file_digest", real)
        path.write_bytes(flip_bit(CONTENT))
        time.sleep(0.15)
        return result

    monkeypatch.setattr(files.hashlib, "file_digest", race)
    sha256_file(path)
    assert sha256_file(path) == sha256_of(flip_bit(CONTENT))


def test_damaged_memory_is_no_memory(path: Path, memory: Path, reads: list[str]) -> None:
    sha256_file(path)
    for record in memory.rglob("*.json"):
        record.write_bytes(flip_bit(record.read_bytes()))
    assert sha256_file(path) == sha256_of(CONTENT)
    assert reads == ["weights.gguf"] * 2


def test_memory_that_cannot_be_written_changes_nothing(path: Path, memory: Path) -> None:
    memory.write_text("no folder")
    assert [sha256_file(path) for _ in range(2)] == [sha256_of(CONTENT)] * 2


@pytest.mark.parametrize("n_bytes", [0, 1, 64, 65, 70])
def test_memory_that_was_cut_off_is_none(memory: Path, n_bytes: int) -> None:
    remember("a/b", [1, "two"])
    assert recall("a/b") == [1, "two"]
    record = memory / "a" / "b.json"
    record.write_bytes(record.read_bytes()[:n_bytes])
    assert recall("a/b") is None
    assert recall("never") is None


def test_git_names_a_file_as_git_does(tmp_path: Path) -> None:
    """`echo hello | git hash-object --stdin`"""
    (tmp_path / "hello").write_text("hello\n")
    assert git_blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_faults_of_a_file_are_its_size_or_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "hello"
    path.write_text("hello\n")
    sha256, blob_id = sha256_of(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a"
    assert RemoteFile(6, sha256=sha256).fault(path) is None
    assert RemoteFile(6, blob_id=blob_id).fault(path) is None
    assert RemoteFile(7, sha256=sha256).fault(path) == "6 bytes instead of 7"
    assert RemoteFile(6, sha256="0" * 64).fault(path) == f"SHA-256 {sha256} instead of {'0' * 64}"
    assert RemoteFile(6, blob_id="0" * 40).fault(path) == f"git blob {blob_id} instead of {'0' * 40}"


def listed(hub: Hub, tmp_path: Path, *arguments: str, code: str = "", **options: Any) -> str:
    """What `list_files` gives, or the name of its error and its words."""
    process = run_python(code + LIST, *arguments, hub=hub, home=tmp_path / "home", **options)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


FILES = "['.gitattributes', 'config.json']"


def test_commit_is_asked_about_once_and_a_branch_each_time(hub: Hub, tmp_path: Path) -> None:
    assert [listed(hub, tmp_path, REPO, revision) for revision in ("main", COMMIT, "main")] == [FILES] * 3
    assert [request.path.rsplit("/")[-1] for request in hub.requests] == ["main", "main"]


def test_file_name_that_leads_out_of_the_repository_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos[REPO].commit({"../outside.gguf": b"x"})
    assert listed(hub, tmp_path, REPO).startswith(f"HubError {REPO}@main: is damaged, or not what it should be")


def test_what_the_hub_said_last_stands_in_for_it(hub: Hub, tmp_path: Path) -> None:
    listed(hub, tmp_path, REPO)
    hub.stop()
    assert listed(hub, tmp_path, REPO) == listed(hub, tmp_path, REPO, is_offline=True) == FILES
    assert listed(hub, tmp_path, REPO, "v1").startswith(f"HubUnreachable {REPO}@v1: the Hub cannot be reached")


def test_damaged_record_of_a_commit_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    listed(hub, tmp_path, REPO, COMMIT)
    for record in (tmp_path / "home" / "f2gguf").rglob("*.json"):
        record.write_bytes(flip_bit(record.read_bytes()))
    assert listed(hub, tmp_path, REPO, COMMIT) == FILES
    assert len(hub.requests) == 2


def test_record_of_another_version_is_asked_for_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2GGUF_CACHE", str(tmp_path / "home" / "f2gguf"))
    for name, content in (("main", {"files": 5}), (COMMIT, [])):
        remember(f"hub/org--tiny/{name}", content)
    assert listed(hub, tmp_path, REPO, COMMIT) == FILES


def answer(**fault: Any) -> Callable[[Hub], None]:
    return lambda hub: hub.faults.append(Fault("GET", "/api/", ALWAYS, **fault))


def attribute(name: str) -> Callable[[Hub], None]:
    return lambda hub: setattr(hub.repos[REPO], name, True)


def rename(hub: Hub) -> None:
    hub.renamed[REPO] = "org/new"
    hub.repos["org/new"] = hub.repos.pop(REPO)
    hub.repos["org/new"].name = "org/new"


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (attribute("is_private"), {}, "RepoMissing org/tiny@main: repository not found"),
        (rename, {}, "RepoRenamed org/tiny: is called org/new now"),
        (answer(status=429, headers={"Retry-After": "17"}), {}, "RateLimited org/tiny@main: too many requests"),
        (answer(status=429, headers={"Retry-After": "17"}), {}, "Try again in 17 s"),
        (answer(status=429, headers={"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}), {}, "Try again later"),
        (answer(status=500), {}, "HubError org/tiny@main: the Hub answers 500: a fault of 500. Try again"),
        (answer(status=403), {}, "HubError org/tiny@main: the Hub refuses it (403)"),
        (lambda hub: None, {"token": "hf_wrong"}, "the Hub refuses it (401): Invalid credentials"),
        (lambda hub: None, {"is_offline": True}, "HubUnreachable org/tiny@main: the Hub cannot be reached"),
        (answer(send_bytes=30), {}, "HubUnreachable org/tiny@main: the Hub cannot be reached"),
        (answer(sent=lambda _: b"<html>Log in"), {}, "HubUnreachable"),
        (answer(sent=lambda _: b"[1]"), {}, "HubError org/tiny@main: is damaged, or not what it should be"),
        (answer(sent=lambda _: b"{}"), {}, "HubError org/tiny@main: is damaged, or not what it should be"),
        (
            answer(before=lambda _: time.sleep(3)),
            {"code": "import os; os.environ['HF_HUB_ETAG_TIMEOUT'] = '1'"},
            "timed out",
        ),
        (
            lambda hub: None,
            {"code": "import os; os.environ['HF_ENDPOINT'] = 'http://hub.invalid'"},
            "HubUnreachable org/tiny@main: the Hub cannot be reached",
        ),
    ],
)
def test_each_refusal_has_words_of_its_own(
    hub: Hub, tmp_path: Path, change: Callable[[Hub], object], options: dict[str, Any], words: str
) -> None:
    change(hub)
    assert words in listed(hub, tmp_path, REPO, **options)


DOWNLOAD = LIST.replace(
    "import list_files", "import list_files\nfrom f2gguf.runtime.hub.download import download"
).replace("print(sorted(list_files(*sys.argv[1:]).files))", "download(list_files(sys.argv[1]), ['config.json'])")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (attribute("is_gated"), {}, "RepoGated org/tiny@0123456789ab: config.json: is gated. Ask for access at http"),
        (attribute("is_gated"), {"token": READER}, "RepoGated"),
        (lambda hub: hub.faults.append(Fault("HEAD", "", ALWAYS, status=429)), {}, "RateLimited"),
        (lambda hub: hub.faults.append(Fault("HEAD", "", ALWAYS, status=503)), {}, "the Hub answers 503"),
        (lambda hub: hub.faults.append(Fault("GET", "resolve", ALWAYS, status=404)), {}, "the Hub answers 404"),
    ],
)
def test_each_refused_download_has_words_of_its_own(
    hub: Hub, tmp_path: Path, change: Callable[[Hub], object], options: dict[str, Any], words: str
) -> None:
    change(hub)
    process = run_python(DOWNLOAD, REPO, hub=hub, home=tmp_path / "home", **options)
    assert words in process.stdout, process.stderr


def test_cache_that_cannot_be_written_is_no_fault_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("no folder")
    process = run_python(DOWNLOAD, REPO, hub=hub, home=tmp_path / "home")
    assert process.stdout.startswith("OutputError"), process.stderr
    assert "HF_HOME" in process.stdout


def test_xet_that_fails_is_an_error_in_words(hub: Hub, tmp_path: Path) -> None:
    """Its client raises RuntimeError, where it has tried for a minute."""
    hub.repos[REPO].commit({"model.safetensors": b"weights"})
    stated = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.url}/api/models/{REPO}/xet-read-token/{COMMIT}"}
    hub.faults.append(Fault("HEAD", "/model.safetensors", ALWAYS, headers=stated))
    code = """
import os
del os.environ["HF_HUB_DISABLE_XET"]
import huggingface_hub.file_download as client
def xet_get(**_):
    raise RuntimeError("Task error: CAS Client Error")
client.xet_get = xet_get
"""
    process = run_python(
        code + DOWNLOAD.replace("config.json", "model.safetensors"), REPO, hub=hub, home=tmp_path / "h"
    )
    assert "HubUnreachable" in process.stdout, process.stderr
    assert "CAS Client Error" in process.stdout
    assert not hub.asked("GET", "/stored/"), "Xet's own client fetches what Xet stores"
