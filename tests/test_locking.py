"""`quantize lock`: what the Hub states is written into models.lock or compared with it; all else in it stays."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from f2gguf.quantize.source.lock import default_path, read_lock
from f2gguf.quantize.source.pin import write_entry
from f2gguf.runtime.hub.listing import RemoteFile
from hub import ALWAYS, Fault, Hub, run_command, run_python, serving
from hypothesis import given, settings
from hypothesis import strategies as st

Lock = Callable[..., CompletedProcess[str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"{ }", "NOTICE": b"by org"}
CARD = b"---\nlicense: mit\nlanguage: [en, de]\n---\n# tiny"
LOCK = f"""# Kept: the first line.
default = "pinned"

[shared.family]  # kept: beside a table
max_tokens = 77

[models.pinned]  # kept: beside an entry
like = "family"
repo = "org/tiny"
revision = "{COMMIT}"  # kept: beside a value
prompts.query = "Query: "

# Kept: what the next one is.

[models.preview]
like = "family"
repo = "org/preview"

[models.packaged]
package = "not_there"
folder = "x"
repo = "org/packaged"
"""
ONE = {"a b.safetensors": RemoteFile(1, sha256="0" * 64), "config.json": RemoteFile(2, blob_id="1" * 40)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add("org/tiny", {**FILES, "README.md": CARD, "pytorch_model.bin": b"pickle"}, sha=COMMIT)
    hub.add("org/preview", FILES)
    hub.add("org/other", {**FILES, "README.md": CARD})
    with serving(hub):
        yield hub


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "models.lock"
    path.write_text(LOCK)
    return path


@pytest.fixture
def lock(hub: Hub, path: Path, tmp_path: Path) -> Lock:
    return lambda *arguments: run_command("quantize", "lock", *arguments, "--lock", path, hub=hub, home=tmp_path / "h")


def entry(path: Path, name: str) -> dict[str, Any]:
    return dict(tomllib.loads(path.read_text())["models"][name])


def changed(before: str, after: str) -> tuple[list[str], list[str]]:
    """The lines that went, and those that came."""
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return [line[2:] for line in lines if line[0] == "-"], [line[2:] for line in lines if line[0] == "+"]


def fails(process: CompletedProcess[str], *words: str, exit_code: int = 1) -> None:
    """It says all of `words` in its one error."""
    assert process.returncode == exit_code, process.stderr
    last = process.stderr.splitlines()[-1]
    assert [word for word in ("error: ", *words) if word not in last] == []


def test_commit_sizes_and_hashes_of_what_a_job_needs_are_written(lock: Lock, path: Path) -> None:
    process = lock("pinned")
    assert process.stdout == f"pinned: org/tiny@{COMMIT}, 4 files, 18 B\n{path}\n"
    blob_id = {name: hashlib.sha1(b"blob %d\0" % len(file) + file).hexdigest() for name, file in FILES.items()}
    assert entry(path, "pinned")["files"] == {
        "config.json": {"size_bytes": 2, "blob_id": blob_id["config.json"]},
        "model.safetensors": {"size_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "1_Pooling/config.json": {"size_bytes": 3, "blob_id": blob_id["1_Pooling/config.json"]},
        "NOTICE": {"size_bytes": 6, "blob_id": blob_id["NOTICE"]},
    }


def test_nothing_else_changes_and_nothing_is_written_twice(lock: Lock, path: Path) -> None:
    assert lock("pinned").returncode == 0
    gone, come = changed(LOCK, path.read_text())
    assert gone == []
    assert len(come) == 6  # a header, four files, an empty line
    assert path.read_text().index("[models.pinned.files]") < path.read_text().index("# Kept: what the next one is.")
    once = path.read_bytes()
    assert lock("pinned").returncode == 0
    assert path.read_bytes() == once


def test_entry_without_revision_gets_the_head_of_main(lock: Lock, path: Path, hub: Hub) -> None:
    assert lock("preview").returncode == 0
    written = entry(path, "preview")
    assert (written["revision"], written["like"]) == (hub.repos["org/preview"].head.sha, "family")
    assert read_lock(path).entry("preview").max_tokens == 77


def test_new_model_is_added_at_the_end_with_what_its_card_states(lock: Lock, path: Path, hub: Hub) -> None:
    hub.repos["org/other"].tags["v1"] = hub.repos["org/other"].head.sha
    assert lock("org/other@v1").returncode == 0
    written = entry(path, "other")
    facts = {
        "repo": "org/other",
        "revision": hub.repos["org/other"].head.sha,
        "license": "mit",
        "languages": ["en", "de"],
    }
    assert {key: value for key, value in written.items() if key != "files"} == facts
    assert list(read_lock(path).entries) == ["pinned", "preview", "packaged", "other"]
    assert path.read_text().startswith(LOCK)


def test_entries_of_one_repository_are_told_apart_by_name(lock: Lock, path: Path, hub: Hub) -> None:
    path.write_text(f'{LOCK}\n[models.newer]\nrepo = "org/tiny"\n')
    head = hub.repos["org/tiny"].commit({"config.json": b'{"new": 1}'})
    assert lock("newer").returncode == 0
    assert entry(path, "newer")["revision"] == head.sha
    assert "files" not in entry(path, "pinned")


def test_repository_with_another_revision_moves_its_entry(lock: Lock, path: Path, hub: Hub) -> None:
    head = hub.repos["org/tiny"].commit({"config.json": b'{"new": 1}'})
    assert lock("org/tiny@main").returncode == 0
    written = entry(path, "pinned")
    assert (written["revision"], written["files"]["config.json"]["size_bytes"]) == (head.sha, 10)


def test_without_model_every_entry_of_the_hub_is_locked_but_those_that_cannot_be(
    lock: Lock, path: Path, hub: Hub
) -> None:
    hub.repos["org/tiny"].commit({"model.safetensors": None, "pytorch_model.bin": None, "a.pt": b"x"}, sha="f" * 40)
    path.write_text(LOCK.replace(COMMIT, "f" * 40))
    process = lock()
    fails(process, "pinned not written")
    assert "pickle only (a.pt)" in process.stderr
    assert "files" not in entry(path, "pinned")
    assert "files" in entry(path, "preview")
    assert not hub.asked("GET", "org/packaged")


@pytest.mark.parametrize(
    ("model", "words", "exit_code"),
    [
        ("packaged", "there is nothing to lock", 2),
        ("org/packaged", "there is nothing to lock", 2),
        ("someone/pinned", "its pinned is another model", 2),
        ("org/absent", "repository not found", 1),
        ("org/tiny@v9", "revision not found", 1),
        ("pined", "Did you mean 'pinned'", 2),
    ],
)
def test_what_cannot_be_locked_is_one_clear_error(
    lock: Lock, path: Path, model: str, words: str, exit_code: int
) -> None:
    fails(lock(model), words, exit_code=exit_code)
    assert path.read_text() == LOCK


def test_folder_is_nothing_to_lock(lock: Lock, tmp_path: Path) -> None:
    fails(lock(tmp_path), "there is nothing to lock", exit_code=2)


def test_lock_that_cannot_be_written_says_how_to_name_another(lock: Lock, path: Path) -> None:
    path.with_name(path.name + ".part").mkdir()
    fails(lock("pinned"), "cannot be written", "--lock")
    assert path.read_text() == LOCK


def test_installed_lock_is_never_written_but_a_copy_in_the_current_folder(
    hub: Hub, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys
from pathlib import Path
import f2gguf.quantize.source.lock as lock
lock._CHECKOUT, shipped = Path("/absent"), Path(sys.argv.pop(1))
lock._shipped_path = lambda: shipped
from f2gguf.quantize.cli import quantize
quantize()
"""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    process = run_python(code, path, "lock", "--check", "pinned", hub=hub, home=tmp_path / "h")
    assert process.returncode == 0, process.stderr
    assert list((tmp_path / "work").iterdir()) == []
    for name in ("pinned", "preview"):
        process = run_python(code, path, "lock", name, hub=hub, home=tmp_path / "h")
        assert process.stdout.splitlines()[-1] == "models.lock", process.stderr
    assert path.read_text() == LOCK
    own = read_lock(tmp_path / "work" / "models.lock")
    assert own.entry("pinned").files
    assert own.entry("preview").files
    run_python(code, path, "lock", "org/other", "--lock", path, hub=hub, home=tmp_path / "h")
    assert "other" in read_lock(path).entries
    assert "other" not in read_lock(tmp_path / "work" / "models.lock").entries


def test_unreachable_hub_ends_the_run_and_keeps_the_lock(lock: Lock, path: Path, hub: Hub) -> None:
    hub.stop()
    fails(lock(), "the Hub cannot be reached")
    assert path.read_text() == LOCK


def test_hash_of_a_locked_commit_is_never_overwritten(lock: Lock, path: Path) -> None:
    assert lock("pinned").returncode == 0
    flipped = path.read_text().replace(hashlib.sha256(b"weights").hexdigest(), "f" * 64)
    path.write_text(flipped)
    fails(lock("pinned"), "model.safetensors", "f" * 64, "remove its files from the lock")
    assert path.read_text() == flipped


def test_check_is_content_with_what_is_as_locked(lock: Lock, path: Path) -> None:
    lock("pinned")
    before = path.read_bytes()
    process = lock("--check")
    assert process.returncode == 0
    assert process.stdout.splitlines()[0] == "pinned: as locked, which is the head of main"
    assert process.stdout.splitlines()[1].startswith("preview: is not locked; main is at ")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "words"), [("config.json", "changed config.json"), ("README.md", "changed no file that is needed")]
)
def test_check_says_that_main_moved_and_what_that_changed(lock: Lock, hub: Hub, name: str, words: str) -> None:
    lock("pinned")
    head = hub.repos["org/tiny"].commit({name: b"{}\n\n"})
    process = lock("--check", "pinned")
    assert process.returncode == 0
    assert f"main has moved to {head.sha}, and {words}" in process.stdout


def rewrite(hub: Hub) -> None:
    """The Hub states another file for the commit."""
    hub.faults.append(Fault("GET", COMMIT, ALWAYS, sent=lambda body: body.replace(b'"size": 7', b'"size": 8')))


def rename(hub: Hub) -> None:
    hub.renamed["org/tiny"] = "org/new"
    hub.repos["org/new"] = hub.repos.pop("org/tiny")
    hub.repos["org/new"].name = "org/new"


def forget(hub: Hub) -> None:
    """The history was squashed."""
    hub.repos["org/tiny"].commit({"config.json": b"{}\n"})
    del hub.repos["org/tiny"].commits[COMMIT]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewrite, ("model.safetensors is 7 bytes", "8 bytes")),
        (rename, ("is called org/new now",)),
        (forget, (COMMIT, "revision not found")),
        (lambda hub: hub.repos.pop("org/tiny"), ("repository not found",)),
    ],
)
def test_check_fails_where_the_hub_no_longer_has_what_is_locked(
    lock: Lock, hub: Hub, change: Callable[[Hub], object], words: tuple[str, ...]
) -> None:
    lock("pinned")
    change(hub)
    fails(lock("--check", "pinned"), *words)
    process = lock("--check")  # and with others to look at
    fails(process, "pinned differ")
    assert "preview: is not locked" in process.stdout


def test_check_asks_the_hub_even_where_it_remembers(lock: Lock, hub: Hub) -> None:
    lock("pinned")
    hub.requests.clear()
    lock("--check", "pinned")
    assert [request.path.rsplit("/")[-1] for request in hub.requests] == ["main", COMMIT]


def test_check_of_what_no_lock_knows_says_so(lock: Lock) -> None:
    fails(lock("--check", "org/other"), "org/other: is not in the lock", exit_code=2)


@pytest.mark.parametrize("name", [name for name, entry in read_lock().entries.items() if entry.repo])
def test_shipped_lock_keeps_every_line_but_the_revision(tmp_path: Path, name: str) -> None:
    before, path = default_path().read_text(), tmp_path / "models.lock"
    path.write_text(before)
    write_entry(path, name, {"revision": "a" * 40}, ONE)
    gone, come = changed(before, path.read_text())
    assert [line for line in gone if not line.startswith("revision = ")] == []
    assert len(come) - len(gone) in (4, 5)  # header, two files, an empty line; a revision where there was none
    assert read_lock(path).entry(name).files == ONE


TEXTS = st.lists(
    st.sampled_from(
        [
            "# a comment",
            "",
            '[models."b.c"]  # beside\nrepo = "x/y"\nprompts.query = "q"\n# inside',
            '[models.d]\nlike = "s"\n[models.d.prompts]\nquery = "q"\n# below',
            "[shared.t]\nmax_tokens = 5\n\n# of t",
            f'[models.e]\nrevision = "{"0" * 40}"\n[models.e.files]\nf = {{size_bytes = 1, blob_id = "{"0" * 40}"}}',
        ]
    ),
    unique=True,
)


@settings(deadline=None)  # the machine that runs it may be busy
@given(head=TEXTS, name=st.sampled_from(["a", "b.c", "d", "e", "new"]))
def test_no_comment_and_no_other_entry_changes_whatever_the_lock_looks_like(
    tmp_path_factory: pytest.TempPathFactory, head: list[str], name: str
) -> None:
    path = tmp_path_factory.mktemp("lock") / "models.lock"
    first = 'default = "a"\n[shared.s]\nmax_tokens = 7\n[models.a]\nrepo = "a/a"'
    path.write_text("\n".join([first, *head]) + "\n")
    before, text = read_lock(path).entries, path.read_text()
    write_entry(path, name, {"repo": "x/z", "revision": "a" * 40}, ONE)
    after = dict(read_lock(path).entries)
    written = after.pop(name)
    assert (written.repo, written.revision, written.files) == ("x/z", "a" * 40, ONE)
    assert after == {other: entry for other, entry in before.items() if other != name}
    comments = [line for line in text.splitlines() if "#" in line]
    assert [line for line in path.read_text().splitlines() if "#" in line] == comments
