"""models.lock: complete, pinned, and clear where it is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import f2gguf.quantize.source.lock as lock_module
import pytest
from conftest import Run
from f2gguf.quantize.source.fetch import find_entry, find_model
from f2gguf.quantize.source.lock import path_to_write, read_lock
from f2gguf.quantize.source.pin import find_targets, write_entry
from f2gguf.runtime.errors import UnknownName, WrongUsage
from f2gguf.runtime.hub.listing import RemoteFile
from hub import Hub, only_error, run_command, serving

INSTRUCT = {f"F2LLM-v2-{size}" for size in ("80M", "160M", "330M", "0.6B", "1.7B", "4B", "8B", "14B")}
PREVIEWS = {f"F2LLM-v2-{size}-Preview" for size in ("0.6B", "1.7B", "4B", "8B", "14B")}
UNPINNED = {"jina-code-embeddings-0.5b", "jina-code-embeddings-1.5b", "all-distilroberta-v1", "all-roberta-large-v1"}
UNPINNED |= PREVIEWS  # as the mteb registry has no revision of theirs


def test_every_model_of_the_family_and_its_peers_is_locked() -> None:
    lock = read_lock()
    peers = {entry.repo for entry in lock.entries.values() if entry.repo} - {None}
    assert lock.default == "F2LLM-v2-4B"
    assert set(lock.entries) >= INSTRUCT | PREVIEWS | {"all-MiniLM-L6-v2", "f2llm-nano"}
    assert {"Qwen/Qwen3-Embedding-0.6B", "BAAI/bge-large-en-v1.5", "google/embeddinggemma-300m"} <= peers


def test_every_model_whose_revision_is_published_is_pinned_to_a_commit() -> None:
    unpinned = {name for name, entry in read_lock().entries.items() if entry.repo and not entry.revision}
    commits = {entry.revision for entry in read_lock().entries.values() if entry.revision}
    assert unpinned == UNPINNED
    assert all(len(commit) == 40 and set(commit) <= set("0123456789abcdef") for commit in commits)


def test_instruct_models_have_their_prompt_and_widths() -> None:
    for name in INSTRUCT:
        entry = read_lock().entry(name)
        assert entry.prompts["query"].endswith("answer the question.\nQuery: ")
        assert entry.matryoshka_dims[0] == 8
        assert (entry.max_tokens, entry.license, entry.eos_token) == (8192, "apache-2.0", "<|im_end|>")
    assert all(read_lock().entry(name).prompts == {} for name in PREVIEWS)


def test_a_model_is_found_by_name_repository_or_folder(tmp_path: Path) -> None:
    lock = read_lock()
    assert find_model("f2llm-V2-80m", lock)[0].name == "F2LLM-v2-80M"
    assert find_model("codefuse-ai/F2LLM-v2-80M", lock)[0].name == "F2LLM-v2-80M"
    assert find_model("codefuse-ai/F2LLM-v2-80M@main", lock)[0].revision == "main"
    assert find_model("someone/else", lock)[0].revision == "main"
    assert find_model(str(tmp_path), lock) == (find_model(str(tmp_path), lock)[0], tmp_path)
    with pytest.raises(UnknownName, match="Did you mean 'F2LLM-v2-80M'"):
        find_model("F2LLM-v2-80", lock)


@pytest.mark.parametrize("model", ["codefuse-ai/F2LLM-v2-80M@main", "sentence-transformers/all-MiniLM-L6-v2@main"])
def test_another_revision_keeps_the_facts_of_the_model_and_not_its_files(tmp_path: Path, model: str) -> None:
    path = tmp_path / "models.lock"
    path.write_text(read_lock().path.read_text())
    for name in ("F2LLM-v2-80M", "all-MiniLM-L6-v2"):
        write_entry(path, name, {}, {"config.json": RemoteFile(2, blob_id="1" * 40)})
    lock = read_lock(path)
    entry, folder = find_model(model, lock)
    locked = lock.entry(entry.name)
    assert locked.files
    at_main = {"revision": "main", "files": {}, "package": None, "folder": None, "install": None}
    assert (entry, folder) == (replace(locked, **at_main), None)


def test_entry_at_the_revision_that_is_named_is_taken_of_several_of_one_repository(tmp_path: Path) -> None:
    path = tmp_path / "models.lock"
    entries = (f'[models.{name}]\nrepo = "x/y"\nrevision = "{name * 40}"\n' for name in "ab")
    path.write_text('default = "a"\n' + "".join(entries))
    lock = read_lock(path)
    assert [find_model(f"x/y@{name * 40}", lock)[0].name for name in "ab"] == ["a", "b"]
    assert [find_targets([f"x/y@{name * 40}"], lock)[0].name for name in "ab"] == ["a", "b"]
    assert find_model("x/y", lock)[0].name == "a"


UNSUPPORTED = {"all-mpnet-base-v2", "gte-multilingual-base"}  # by stock llama.cpp


def test_names_that_are_not_converted_yet_say_why() -> None:
    lock = read_lock()
    assert {name for name, entry in lock.entries.items() if entry.unsupported} == UNSUPPORTED
    assert set(lock.entries) - UNSUPPORTED - UNPINNED == set(lock.convertible)
    assert find_entry("all-mpnet-base-v2", lock)[0].unsupported


@pytest.mark.parametrize(
    "arguments",
    [
        ("all", "all-mpnet-base-v2"),
        ("all", "f2llm-nano", "sentence-transformers/all-mpnet-base-v2@main"),
        ("fetch", "All-MPNet-base-v2"),
    ],
)
def test_model_that_is_not_converted_yet_is_refused_before_anything_is_asked_or_made(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    hub = Hub()
    with serving(hub):
        process = run_command("quantize", *arguments, hub=hub, home=tmp_path / "home")
    line = only_error(process)
    assert "all-mpnet-base-v2: f2gguf does not convert it yet: llama.cpp has no MPNet" in line
    assert "Those of models.lock that it converts: F2LLM-v2-80M, F2LLM-v2-160M, " in line
    assert "Preview" not in line
    assert not hub.requests


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an installation, away from any checkout and from the current folder."""
    shipped = tmp_path / "share" / "models.lock"
    shipped.parent.mkdir()
    shipped.write_text('default = "a"\n[models.a]\nrepo = "org/a"\n')
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(lock_module, "_CHECKOUT", tmp_path / "absent")
    monkeypatch.setattr(lock_module, "_shipped_path", lambda: shipped)
    return shipped


def test_lock_of_the_current_folder_goes_first_then_the_checkouts_then_the_shipped(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_lock().path == installed
    monkeypatch.setattr(lock_module, "_CHECKOUT", tmp_path / "checkout.lock")
    (tmp_path / "checkout.lock").write_text('default = "b"\n[models.b]\n')
    assert (read_lock().default, path_to_write()) == ("b", tmp_path / "checkout.lock")
    Path("models.lock").write_text('default = "c"\n[models.c]\n')
    assert (read_lock().default, path_to_write()) == ("c", Path("models.lock"))
    assert read_lock(installed).default == "a"


def test_shipped_lock_is_copied_before_it_is_written(installed: Path) -> None:
    before = installed.read_text()
    assert path_to_write() == Path("models.lock")
    write_entry(path_to_write(), "a", {"revision": "1" * 40}, {"config.json": RemoteFile(2, blob_id="1" * 40)})
    assert (installed.read_text(), read_lock().entry("a").revision) == (before, "1" * 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("default = ", "does not parse as TOML"),
        ('default = "a"', "the default 'a' is not among its models"),
        ('default = "a"\n[models.a]\nrepos = "x/y"', "Did you mean 'repo'"),
        ('default = "a"\n[models.a]\nlike = "b"', "a is like 'b', which \\[shared\\] does not have"),
        ('default = "a"\nmodels = 5', "models.lock: models is 5, which holds no tables such as"),
        ('default = "a"\n[models]\na = 5', "models.lock: models is {'a': 5}, which holds no tables"),
        ('default = "a"\nshared = [1]\n[models.a]', "models.lock: shared is "),
        ('default = ["a"]\n[models.a]', "default \"\\['a'\\]\" is not among"),
        ('default = "a"\n[models.a]\nlike = ["b"]', "a is like \\['b'\\], which"),
        ('default = "a"\n[models.a]\npooling = ["cls"]', "a has pooling = "),
        ('default = "a"\n[models.a]\nmax_tokens = -5', "a has max_tokens = -5: Input should be greater than 1"),
        ('default = "a"\n[models.a]\nprompts = "x"', "a has prompts = 'x'"),
        (
            f'default = "a"\n[models.a]\nfiles = {{ f = {{ size_bytes = 1, sha256 = "{"0" * 64}" }} }}',
            "no commit as its",
        ),
        *[
            (f'default = "a"\n[models.a]\nrevision = "{"0" * 40}"\nfiles = {files}', "a has files")
            for files in (
                "{}",
                "5",
                "{ f = 5 }",
                "{ f = { size_bytes = 1 } }",
                f'{{ "../f" = {{ size_bytes = 1, sha256 = "{"0" * 64}" }} }}',
                f'{{ "/f" = {{ size_bytes = 1, sha256 = "{"0" * 64}" }} }}',
                f'{{ f = {{ sha256 = "{"0" * 64}" }} }}',
                f'{{ f = {{ size_bytes = -1, sha256 = "{"0" * 64}" }} }}',
                f'{{ f = {{ size_bytes = true, sha256 = "{"0" * 64}" }} }}',
                f'{{ f = {{ size_bytes = 1, sha256 = "{"0" * 40}" }} }}',
                f'{{ f = {{ size_bytes = 1, blob_id = "{"0" * 64}" }} }}',
                f'{{ f = {{ size_bytes = 1, sha256 = "{"0" * 64}", blob_id = "{"0" * 40}" }} }}',
            )
        ],
    ],
)
def test_damaged_lock_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "models.lock").write_text(content)
    with pytest.raises(WrongUsage, match=message):
        read_lock(tmp_path / "models.lock")


def test_uninstalled_package_says_what_to_install(tmp_path: Path, run: Run) -> None:
    (tmp_path / "l").write_text('default = "a"\n[models.a]\npackage = "not_there"\nfolder = "x"\ninstall = "not-there"')
    process = run("quantize", "fetch", "a", "--lock", tmp_path / "l")
    assert process.returncode == 1
    assert "pip install not-there" in process.stderr
