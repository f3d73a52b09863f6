"""The stand-in for the Hub, driven by the real client: what a release needs works, and what is wrong is refused."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from hub import READER, WRITER, Fault, Hub, flip_bit, run_python, serving, start_python
from hub.card import check_card

Hf = Callable[..., CompletedProcess[str]]
REPO = "org/new"
WEIGHTS = random.Random(0).randbytes(100_000)
CARD = b"---\nlicense: apache-2.0\nbase_model: org/tiny\nbase_model_relation: quantized\n---\n# new\n"
START = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, errors, hf_hub_download, snapshot_download
api, repo, folder = HfApi(), "org/new", Path(sys.argv[1])
def upload(*names, **options):
    files = [CommitOperationAdd(name, str(folder / name)) for name in names]
    return api.create_commit(repo, files, commit_message="release", **options)
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        hub.add(REPO)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the scripts upload."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "README.md").write_bytes(CARD)
    (folder / "new-Q8_0.gguf").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def hf(hub: Hub, folder: Path, tmp_path: Path) -> Hf:
    """Run a script after START, as the writer."""

    def run(code: str, token: str = WRITER) -> CompletedProcess[str]:
        return run_python(START + code, folder, hub=hub, home=tmp_path / "home", token=token)

    return run


def printed(process: CompletedProcess[str]) -> Any:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def uploads(hub: Hub) -> list[int]:
    return [request.received_bytes for request in hub.asked("PUT", "/upload/")]


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and error message of a request by hand, for what the client would never send."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["X-Error-Message"]


def test_release_is_uploaded_tagged_and_downloaded(hf: Hf, hub: Hub) -> None:
    code = """
api.create_repo("org/made", private=True)
api.create_repo("org/made", exist_ok=True)
made = upload("README.md", "new-Q8_0.gguf")
api.create_tag(repo, tag="v1.0", revision=made.oid)
api.upload_file(path_or_fileobj=b"{}", path_in_repo="a folder/later.json", repo_id=repo)
got = Path(snapshot_download(repo, revision="v1.0"))
refs = api.list_repo_refs(repo)
print(json.dumps({
    "user": api.whoami()["name"],
    "oid": made.oid,
    "files": {path.relative_to(got).as_posix(): path.read_bytes().hex() for path in got.rglob("*") if path.is_file()},
    "tags": {tag.name: tag.target_commit for tag in refs.tags},
    "titles": [commit.title for commit in api.list_repo_commits(repo)],
}))
"""
    found = printed(hf(code))
    assert hub.repos["org/made"].is_private
    assert found["files"]["new-Q8_0.gguf"] == WEIGHTS.hex()
    assert found["files"]["README.md"] == CARD.hex()
    assert set(found["files"]) == {".gitattributes", "README.md", "new-Q8_0.gguf"}
    assert found["tags"] == {"v1.0": found["oid"]}
    assert found["titles"][1:] == ["release", "initial commit"]
    assert found["user"] == "writer"
    assert hub.repos[REPO].read("a folder/later.json") == b"{}"
    assert uploads(hub) == [len(WEIGHTS)]


def test_large_file_is_uploaded_in_parts(hf: Hf, hub: Hub) -> None:
    hub.part_bytes = 40_000
    assert hf('upload("new-Q8_0.gguf")').returncode == 0
    assert uploads(hub) == [40_000, 40_000, 20_000]
    assert hub.repos[REPO].read("new-Q8_0.gguf") == WEIGHTS


def test_folder_is_uploaded_and_a_file_deleted(hf: Hf, hub: Hub) -> None:
    code = 'api.upload_folder(repo_id=repo, folder_path=folder)\napi.delete_file("README.md", repo)'
    assert hf(code).returncode == 0
    assert set(hub.repos[REPO].head.files) == {".gitattributes", "new-Q8_0.gguf"}


def test_what_the_hub_holds_is_not_uploaded_again(hf: Hf, hub: Hub) -> None:
    code = 'upload("new-Q8_0.gguf")\n(folder / "again.gguf").write_bytes((folder / "new-Q8_0.gguf").read_bytes())\n'
    assert hf(f'{code}upload("again.gguf")\nupload("again.gguf", "new-Q8_0.gguf")').returncode == 0
    assert len(uploads(hub)) == 1
    assert len(hub.asked("POST", "/commit/")) == 2, "the third upload changes nothing"


def test_metadata_names_sizes_and_hashes(hf: Hf, hub: Hub) -> None:
    hub.page_size = 2
    hub.repos[REPO].commit({"README.md": CARD, "new-Q8_0.gguf": WEIGHTS, "sub/x.json": b"{}"}, title="all")
    code = """
info = api.model_info(repo, files_metadata=True)
sibling = next(file for file in info.siblings if file.rfilename == "new-Q8_0.gguf")
entry = api.get_paths_info(repo, ["new-Q8_0.gguf", "not there"], expand=True)
print(json.dumps({
    "sibling": [sibling.size, sibling.lfs.sha256], "entry": [entry[0].size, entry[0].lfs.sha256], "found": len(entry),
    "last": entry[0].last_commit.title, "tags": info.tags, "license": info.card_data.license, "sha": info.sha,
    "all": [file.path for file in api.list_repo_tree(repo, recursive=True)],
    "sub": [file.path for file in api.list_repo_tree(repo, "sub")],
}))
"""
    found = printed(hf(code, token=READER))
    assert found["sibling"] == found["entry"] == [len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest()]
    assert (found["found"], found["last"], found["sha"]) == (1, "all", hub.repos[REPO].head.sha)
    assert found["tags"] == ["license:apache-2.0", "base_model:org/tiny", "base_model:quantized:org/tiny"]
    assert found["all"] == [".gitattributes", "README.md", "new-Q8_0.gguf", "sub", "sub/x.json"]
    assert found["sub"] == ["sub/x.json"]


def test_download_is_taken_up_where_the_connection_broke(hf: Hf, hub: Hub) -> None:
    """The client keeps 10 MiB at a time; what came after the last of them is sent again."""
    content = random.Random(1).randbytes(12 * 2**20)
    hub.repos[REPO].commit({"large.gguf": content})
    hub.faults.append(Fault("GET", "/stored/", send_bytes=11 * 2**20))
    path = hf('print(hf_hub_download(repo, "large.gguf"), end="")').stdout
    assert Path(path).read_bytes() == content
    asked = [(request.status, request.range, request.sent_bytes) for request in hub.asked("GET", "/stored/")]
    assert asked == [(200, "", 11 * 2**20), (206, f"bytes={10 * 2**20}-", 2 * 2**20)]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "/upload/", receive_bytes=1000),
        Fault("PUT", "/upload/", status=503),
        Fault("POST", "/objects/batch", status=429, headers={"Retry-After": "7"}),
        Fault("POST", "/preupload/", times=2, status=500),
        Fault("POST", "/complete_multipart/", status=500, is_late=True),
        Fault("POST", "/objects/verify", send_bytes=0),
    ],
    ids=lambda fault: fault.path,
)
def test_client_tries_again_after_a_fault_that_passes(hf: Hf, hub: Hub, fault: Fault) -> None:
    hub.part_bytes = 60_000
    hub.faults.append(replace(fault))
    process = hf('upload("new-Q8_0.gguf")')
    assert process.returncode == 0, process.stderr
    assert hub.faults[0].times == 0
    assert "Retrying in" in process.stderr or "Waiting 8.0s" in process.stderr
    assert hub.repos[REPO].read("new-Q8_0.gguf") == WEIGHTS


@pytest.mark.parametrize("part_bytes", [40_000, 10**6])
def test_upload_that_is_not_what_was_announced_is_refused(hf: Hf, hub: Hub, part_bytes: int) -> None:
    hub.part_bytes = part_bytes
    hub.faults.append(Fault("PUT", "/upload/", received=flip_bit))
    assert "BadDigest" in hf('upload("new-Q8_0.gguf")').stderr
    assert set(hub.repos[REPO].head.files) == {".gitattributes"}


def test_corruption_in_the_store_and_on_the_way_reaches_the_client(hf: Hf, hub: Hub) -> None:
    """It checks sizes only: whoever wants to know must hash."""
    hub.faults += [Fault("PUT", "/upload/", stored=flip_bit), Fault("GET", "README.md", sent=flip_bit)]
    assert hf('upload("README.md", "new-Q8_0.gguf")').returncode == 0
    got = Path(hf('print(snapshot_download(repo), end="")').stdout)
    assert (got / "new-Q8_0.gguf").read_bytes() == flip_bit(WEIGHTS)
    assert (got / "README.md").read_bytes() == flip_bit(CARD)


def test_stated_size_that_is_wrong_is_an_error_of_the_client(hf: Hf, hub: Hub) -> None:
    hub.repos[REPO].commit({"new-Q8_0.gguf": WEIGHTS})
    hub.faults.append(Fault("HEAD", "new-Q8_0.gguf", headers={"X-Linked-Size": "7"}))
    assert "should be of size 7" in hf('hf_hub_download(repo, "new-Q8_0.gguf")').stderr


def test_body_that_is_short_is_an_error_of_the_client(hf: Hf, hub: Hub) -> None:
    hub.repos[REPO].commit({"new-Q8_0.gguf": WEIGHTS})
    hub.faults.append(Fault("GET", "/stored/", sent=lambda body: body[:-1]))
    assert "should be of size 100000 but has size 99999" in hf('hf_hub_download(repo, "new-Q8_0.gguf")').stderr


def test_commit_of_somebody_else_in_between_is_a_412(hf: Hf, hub: Hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", before=lambda hub: hub.repos[REPO].commit({"theirs.txt": b"first"})))
    process = hf('upload("new-Q8_0.gguf", parent_commit=api.model_info(repo).sha)')
    assert "412" in process.stderr
    assert "A commit has happened since" in process.stderr
    assert set(hub.repos[REPO].head.files) == {".gitattributes", "theirs.txt"}


def test_commit_that_was_made_though_the_answer_got_lost(hf: Hf, hub: Hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", send_bytes=0))
    assert hf('upload("new-Q8_0.gguf")').returncode != 0
    assert hub.repos[REPO].read("new-Q8_0.gguf") == WEIGHTS


def test_client_that_is_killed_amid_an_upload_leaves_no_commit(hf: Hf, hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.part_bytes = 40_000
    is_in_second_part = threading.Event()
    hub.faults.append(Fault("PUT", "/upload/", after=1, before=lambda _: is_in_second_part.set() or process.wait()))
    code = START + 'upload("new-Q8_0.gguf")'
    process = start_python(code, folder, hub=hub, home=tmp_path / "home", token=WRITER)
    with process:
        assert is_in_second_part.wait(60)
        process.kill()
    assert set(hub.repos[REPO].head.files) == {".gitattributes"}
    assert hf('upload("new-Q8_0.gguf")').returncode == 0
    assert hub.repos[REPO].read("new-Q8_0.gguf") == WEIGHTS


def test_tags_and_branches_are_made_once_and_deleted(hf: Hf, hub: Hub) -> None:
    code = """
api.create_branch(repo, branch="next/one")
upload("new-Q8_0.gguf", revision="next/one")
api.create_tag(repo, tag="v1", revision="next/one")
for again in ('api.create_tag(repo, tag="v1")', 'api.create_tag(repo, tag="v2", revision="none")'):
    try:
        eval(again)
    except errors.HfHubHTTPError as error:
        print(error.response.status_code)
api.create_tag(repo, tag="v1", exist_ok=True)
api.delete_branch(repo, branch="next/one")
"""
    assert hf(code).stdout.split() == ["409", "404"]
    assert hub.repos[REPO].read("new-Q8_0.gguf", "v1") == WEIGHTS
    assert set(hub.repos[REPO].branches) == {"main"}


def test_cached_files_need_no_hub_in_offline_mode(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.repos[REPO].commit({"new-Q8_0.gguf": WEIGHTS})
    code = START + 'print(snapshot_download(repo), end="")'
    first = run_python(code, folder, hub=hub, home=tmp_path / "home")
    hub.requests.clear()
    second = run_python(code, folder, hub=hub, home=tmp_path / "home", is_offline=True)
    assert second.stdout == first.stdout != ""
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "status", "reason"),
    [("", 401, "Invalid username or password"), ("hf_wrong", 401, "Invalid credentials"), (READER, 403, "write token")],
)
def test_only_the_writer_writes(hf: Hf, hub: Hub, token: str, status: int, reason: str) -> None:
    code = """
for write in ('upload("new-Q8_0.gguf")', 'api.create_repo("org/more")', 'api.create_tag(repo, tag="v1")'):
    try:
        eval(write)
    except errors.HfHubHTTPError as error:
        print(error.response.status_code, error.server_message)
"""
    process = hf(code, token=token)
    lines = process.stdout.splitlines()
    assert len(lines) == 3, process.stderr
    assert all(line.startswith(str(status)) and reason in line for line in lines)
    assert len(hub.repos[REPO].commits) == 1
    assert list(hub.repos) == [REPO]


@pytest.mark.parametrize(
    ("token", "private", "gated"),
    [
        (WRITER, "1", "2"),
        (READER, "1", "GatedRepoError"),
        ("", "RepositoryNotFoundError", "GatedRepoError"),
    ],
)
def test_private_gated_and_renamed_repositories(hf: Hf, hub: Hub, token: str, private: str, gated: str) -> None:
    hub.add("org/private", {"x.json": b"1"}).is_private = True
    hub.add("org/gated", {"x.json": b"2"}).is_gated = True
    hub.add("org/renamed", {"x.json": b"3", "x.gguf": b"4"})
    hub.renamed["org/old"] = "org/renamed"
    code = """
def read(name, file="x.json"):
    try:
        return Path(hf_hub_download(name, file)).read_text()
    except Exception as error:
        return type(error).__name__
print(json.dumps([read("org/private"), read("org/gated"), read("org/old"), read("org/old", "x.gguf"),
                  read("org/none"), read("org/renamed", "none"), api.model_info("org/old").id]))
"""
    rest = ["3", "4", "RepositoryNotFoundError", "RemoteEntryNotFoundError", "org/renamed"]
    assert printed(hf(code, token=token)) == [private, gated, *rest]


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
        ({"key": "deletedFile", "value": {"path": "x"}}, 404, "A file with this name doesn't exist"),
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


def test_card_that_the_hub_refuses_stops_a_commit_before_any_upload(hf: Hf, hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: asdf\n---\n")
    assert '- "license" must be one of' in hf('upload("README.md", "new-Q8_0.gguf")').stderr
    assert [request.path for request in hub.requests] == ["/api/validate-yaml"]


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
