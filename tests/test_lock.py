"""models.lock: complete, pinned, and clear where it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run
from f2gguf.quantize.source.fetch import find_model
from f2gguf.quantize.source.lock import read_lock
from f2gguf.runtime.errors import UnknownName, WrongUsage

INSTRUCT = {f"F2LLM-v2-{size}" for size in ("80M", "160M", "330M", "0.6B", "1.7B", "4B", "8B", "14B")}
PREVIEWS = {f"F2LLM-v2-{size}-Preview" for size in ("0.6B", "1.7B", "4B", "8B", "14B")}


def test_every_model_of_the_family_and_its_peers_is_locked() -> None:
    lock = read_lock()
    peers = {entry.repo for entry in lock.entries.values() if entry.repo} - {None}
    assert lock.default == "F2LLM-v2-4B"
    assert set(lock.entries) >= INSTRUCT | PREVIEWS | {"all-MiniLM-L6-v2", "f2llm-nano"}
    assert {"Qwen/Qwen3-Embedding-0.6B", "BAAI/bge-large-en-v1.5", "google/embeddinggemma-300m"} <= peers


def test_every_model_but_the_previews_is_pinned_to_a_commit() -> None:
    unpinned = {name for name, entry in read_lock().entries.items() if entry.repo and not entry.revision}
    commits = {entry.revision for entry in read_lock().entries.values() if entry.revision}
    assert unpinned == PREVIEWS
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("default = ", "does not parse as TOML"),
        ('default = "a"', "the default 'a' is not among its models"),
        ('default = "a"\n[models.a]\nrepos = "x/y"', "Did you mean 'repo'"),
        ('default = "a"\n[models.a]\nlike = "b"', "a is like 'b', which \\[shared\\] does not have"),
        ('default = "a"\nmodels = 5', "models.lock: is damaged, or not what it should be"),
        ('default = "a"\n[models.a]\nmax_tokens = -5', "a has max_tokens = -5, which is no such thing"),
        ('default = "a"\n[models.a]\nprompts = "x"', "a has prompts = 'x'"),
        (
            f'default = "a"\n[models.a]\nfiles = {{ f = {{ size_bytes = 1, sha256 = "{"0" * 64}" }} }}',
            "no commit as its",
        ),
        *[
            (f'default = "a"\n[models.a]\nrevision = "{"0" * 40}"\nfiles = {files}', "a has files = ")
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
