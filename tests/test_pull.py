"""`f2gguf pull`, `f2gguf list`, and models named `org/name:VARIANT`, with the real Hub client against a stand-in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest
from conftest import Release
from f2gguf.quantize.cli import f2gguf
from f2gguf.runtime.errors import NotGGUF
from f2gguf.runtime.hub.listing import Listing, RemoteFile
from f2gguf.runtime.hub.models import HubFile, is_model_file, is_part, matching, open_header, parse_model, variant_of
from hub import ALWAYS, Fault, Hub, flip_bit, only_error, run_command, run_python, serving

Run = Callable[..., CompletedProcess[str]]
REPO = "org/tiny"
TEXT = "an archiver for zip files"


@pytest.fixture
def release(tiny_variants: Release) -> Release:
    return tiny_variants


@pytest.fixture
def hub(release: Release) -> Iterator[Hub]:
    hub = Hub()
    imatrix = {"tiny.imatrix.gguf": b"GGUF of no model"}
    hub.add(REPO, {path.name: path.read_bytes() for path in release.folder.iterdir()} | imatrix)
    with serving(hub):
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def command(hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`f2gguf ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **options: run_command("f2gguf", *arguments, hub=hub, home=home, **options)


def unmeasured(path: Path) -> bytes:
    """The same file without the key of its mean drift."""
    return path.read_bytes().replace(b"f2gguf.drift.mean", b"f2gguf.other.mean")


def pulled(process: CompletedProcess[str]) -> Path:
    """The file whose path is the last line of a pull."""
    assert process.returncode == 0, process.stderr
    return Path(process.stdout.splitlines()[-1])


def models(hub: Hub) -> set[str]:
    """The .gguf files that were sent."""
    return {name for name in hub.asked_for("GET") if name.endswith(".gguf")}


def test_pull_says_what_it_is_and_prints_the_path_last(command: Run, hub: Hub, release: Release) -> None:
    process = command("pull", f"{REPO}:Q8_0")
    path = pulled(process)
    assert path.read_bytes() == release.file("Q8_0").read_bytes()
    facts, _ = process.stdout.splitlines()
    assert facts.startswith("Q8_0, 1.2 MB, drift: mean 0.0")
    assert facts.endswith(" texts: under the bound of 2%")
    assert process.stderr == f"{REPO}@{hub.repos[REPO].head.sha[:12]}: tiny-Q8_0.gguf, 1.2 MB\n"
    assert models(hub) == {"tiny-Q8_0.gguf"}


@pytest.mark.parametrize("variant", ["q4_k_m", "Q4_K_M", "tiny-Q4_K_M.gguf"])
def test_variant_is_the_end_of_a_name_in_any_case_or_the_name(command: Run, variant: str) -> None:
    assert pulled(command("pull", f"{REPO}:{variant}")).name == "tiny-Q4_K_M.gguf"


def test_over_the_bound_and_unmeasured_are_said(command: Run, hub: Hub, release: Release) -> None:
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": unmeasured(release.file("Q8_0")), "SHA256SUMS": None})
    assert "OVER the bound of 2%" in command("pull", f"{REPO}:Q4_0").stdout
    assert "Q8_0, 1.2 MB, drift: not measured\n" in command("pull", f"{REPO}:Q8_0").stdout


def test_recommended_is_the_first_usual_variant_that_holds(command: Run, hub: Hub) -> None:
    assert pulled(command("pull", REPO)).name == "tiny-Q4_K_M.gguf"
    report = json.loads(hub.repos[REPO].read("drift.json"))
    report["variants"]["Q4_K_M"]["holds"] = False
    hub.repos[REPO].commit({"drift.json": json.dumps(report).encode(), "SHA256SUMS": None})
    assert pulled(command("pull", REPO)).name == "tiny-Q8_0.gguf"
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": None})
    assert pulled(command("pull", REPO)).name == "tiny-F16.gguf"


def test_where_nobody_measured_the_one_nearest_to_full_precision_is_recommended(command: Run, hub: Hub) -> None:
    hub.repos[REPO].commit({"drift.json": None})
    assert pulled(command("pull", REPO)).name == "tiny-Q8_0.gguf"


@pytest.mark.parametrize("content", [b"{}", b"[", b'{"files": {"F16": 1}, "variants": []}'])
def test_drift_json_of_another_kind_is_an_error_that_says_what_to_do(command: Run, hub: Hub, content: bytes) -> None:
    hub.repos[REPO].commit({"drift.json": content})
    assert "Name a variant: org/tiny:Q8_0" in only_error(command("pull", REPO))


def test_unknown_variant_is_told_the_nearest_and_all(command: Run, hub: Hub) -> None:
    line = only_error(command("pull", f"{REPO}:Q8"), exit_code=2)
    assert "Did you mean 'Q8_0'? Known: F16, Q4_0, Q4_K_M, Q8_0." in line
    assert not models(hub)


@pytest.mark.parametrize(
    ("files", "model", "reason"),
    [
        (["model.safetensors", "x.imatrix.gguf"], "org/other", "holds no .gguf model"),
        (["x-Q8_0-00001-of-00002.gguf", "x-Q8_0-00002-of-00002.gguf"], "org/other", "is one part of a split model"),
        (["x-Q8_0-00001-of-00002.gguf", "x-Q4_0.gguf"], "org/other:Q8_0", "another variant of: Q4_0, Q8_0."),
    ],
)
def test_what_is_no_single_model_file_is_refused(
    command: Run, hub: Hub, files: list[str], model: str, reason: str
) -> None:
    hub.add("org/other", dict.fromkeys(files, b"GGUF"))
    assert reason in only_error(command("pull", model))
    assert not hub.asked_for("GET")


def test_names_that_end_alike_must_be_told_apart(command: Run, hub: Hub, release: Release) -> None:
    content = release.file("Q8_0").read_bytes()
    hub.add("org/two", {"a-Q8_0.gguf": content, "b/b-Q8_0.gguf": content})
    assert "which of a-Q8_0.gguf, b/b-Q8_0.gguf?" in only_error(command("pull", "org/two:Q8_0"), exit_code=2)
    path = pulled(command("pull", "org/two:b/b-Q8_0.gguf"))
    assert path.parts[-2:] == ("b", "b-Q8_0.gguf")
    assert [one["model"] for one in json.loads(command("list", "--json").stdout)] == ["org/two:b/b-Q8_0.gguf"]
    assert command("inspect", "org/two:b/b-Q8_0.gguf").returncode == 0


COMPANIONS = ["mmproj-x-Q8_0.gguf", "x-mmproj-Q8_0.gguf", "imatrix.gguf", "x-imatrix.gguf", "x.imatrix-Q8_0.gguf"]
COMPANIONS += ["lora-Q8_0.gguf", "x-lora.gguf", "mtp-x-Q8_0.gguf", "sub/draft-x-Q8_0.gguf", "ggml-vocab-x.gguf"]


def test_what_lies_beside_a_model_makes_no_variant_ambiguous(command: Run, hub: Hub, release: Release) -> None:
    content = release.file("Q8_0").read_bytes()
    hub.add("org/vision", {"x-Q8_0.gguf": content, **dict.fromkeys(COMPANIONS, b"GGUF of no model")})
    for model in ("org/vision:Q8_0", "org/vision"):
        assert pulled(command("pull", model)).name == "x-Q8_0.gguf"
    line = only_error(command("pull", "org/vision:F16"), exit_code=2)
    assert line.endswith("Known: Q8_0.")
    assert "imatrix.gguf: GGUF version " in only_error(command("inspect", "org/vision:imatrix.gguf"))
    assert [one["model"] for one in json.loads(command("list", "--json").stdout)] == ["org/vision:Q8_0"]


@pytest.mark.parametrize("name", ["mmbert-Q8_0.gguf", "vocabulary-Q8_0.gguf", "drafts/x.gguf", "x-00001-of-00001.gguf"])
def test_names_that_only_sound_like_companions_or_parts_are_models(name: str) -> None:
    assert is_model_file(name)
    assert not is_part(name)


def test_file_that_is_split_into_one_part_is_whole(command: Run, hub: Hub, release: Release) -> None:
    hub.add("org/one", {"x-Q8_0-00001-of-00001.gguf": release.file("Q8_0").read_bytes()})
    assert command("embed", "-m", "org/one:Q8_0", TEXT).returncode == 0
    assert [one["model"] for one in json.loads(command("list", "--json").stdout)] == ["org/one:Q8_0"]


DOWNLOAD = "from huggingface_hub import hf_hub_download; print(hf_hub_download('org/tiny', 'tiny-Q8_0.gguf'))"


@pytest.mark.slow
def test_cache_that_another_tool_filled_is_used_where_the_hub_cannot_be_reached(
    command: Run, hub: Hub, home: Path
) -> None:
    path = Path(run_python(DOWNLOAD, hub=hub, home=home).stdout.strip())
    hub.stop()
    commit = path.parent.name
    for model in (f"{REPO}:Q8_0", REPO, f"{REPO}:Q8_0@{commit}", f"{REPO}:tiny-Q8_0.gguf"):
        process = command("embed", "-m", model, TEXT, is_offline=True)
        assert (process.returncode, process.stderr) == (0, "")
    assert pulled(command("pull", f"{REPO}:Q8_0")) == path, "where there is no network, and nobody said so"
    line = only_error(command("inspect", f"{REPO}:Q4_0", is_offline=True))
    assert line.endswith(f"The Hub's cache here holds of {REPO}@{commit[:12]}: tiny-Q8_0.gguf.")
    assert "the Hub cannot be reached" in only_error(command("inspect", f"{REPO}:Q8_0@v2", is_offline=True))


def test_cache_that_another_tool_filled_is_verified(command: Run, hub: Hub, home: Path) -> None:
    path = Path(run_python(DOWNLOAD, hub=hub, home=home).stdout.strip())
    path.resolve().write_bytes(flip_bit(path.read_bytes()))
    hub.stop()
    assert "the Hub cannot be reached" in only_error(command("inspect", f"{REPO}:Q8_0", is_offline=True))


@pytest.mark.slow
def test_cache_that_another_tool_filled_since_is_used_after_an_older_answer_of_the_hub(
    command: Run, hub: Hub, home: Path, release: Release
) -> None:
    command("pull", f"{REPO}:F16")
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": release.file("Q4_K_M").read_bytes(), "SHA256SUMS": None})
    path = Path(run_python(DOWNLOAD, hub=hub, home=home).stdout.strip())
    hub.stop()
    assert "Q4_K_M" in command("inspect", f"{REPO}:Q8_0", is_offline=True).stdout
    assert path.exists()


@pytest.mark.parametrize("model", ["dist/tiny-Q8_0.gguf", "tiny", "./tiny", "a/b/c", f"{REPO}:", "https://host/x"])
def test_pull_takes_repositories_only(command: Run, hub: Hub, model: str) -> None:
    assert "Write org/name[:VARIANT][@revision]" in only_error(command("pull", model), exit_code=2)
    assert not hub.requests


def test_damaged_transfer_is_tried_again_and_never_kept(command: Run, hub: Hub, home: Path, release: Release) -> None:
    hub.faults.append(Fault("GET", "/stored/", sent=flip_bit))
    assert pulled(command("pull", f"{REPO}:Q8_0")).read_bytes() == release.file("Q8_0").read_bytes()
    hub.faults.append(Fault("GET", "tiny-Q4_0", ALWAYS, sent=flip_bit))
    assert "the Hub sends tiny-Q4_0.gguf with SHA-256" in only_error(command("pull", f"{REPO}:Q4_0"))
    assert not list(home.rglob("tiny-Q4_0.gguf"))


def test_file_that_was_damaged_in_the_cache_is_fetched_again(command: Run, hub: Hub, release: Release) -> None:
    path = pulled(command("pull", f"{REPO}:Q8_0"))
    path.resolve().write_bytes(flip_bit(path.read_bytes()))
    assert command("embed", "-m", f"{REPO}:Q8_0", TEXT).returncode == 0
    assert path.read_bytes() == release.file("Q8_0").read_bytes()
    path.resolve().write_bytes(flip_bit(path.read_bytes()))
    hub.stop()
    assert "the Hub cannot be reached" in only_error(command("embed", "-m", f"{REPO}:Q8_0", TEXT))


@pytest.mark.parametrize("arguments", [("pull", f"{REPO}:Q8_0"), ("inspect", f"{REPO}:Q8_0")])
def test_checksums_that_contradict_the_hub_stop_the_download(command: Run, hub: Hub, arguments: tuple) -> None:
    sums = hub.repos[REPO].read("SHA256SUMS").decode().splitlines()
    sums = [f"{'0' * 64}  tiny-Q8_0.gguf" if line.endswith("Q8_0.gguf") else line for line in sums]
    hub.repos[REPO].commit({"SHA256SUMS": "\n".join(sums).encode()})
    assert f"the repository's SHA256SUMS states {'0' * 64}" in only_error(command(*arguments))
    assert not models(hub)
    assert pulled(command("pull", f"{REPO}:Q4_0")).name == "tiny-Q4_0.gguf"


@pytest.mark.parametrize("arguments", [("pull",), ("embed", TEXT, "-m"), ("inspect",)])
def test_refusals_of_the_hub_are_one_clear_error(command: Run, hub: Hub, arguments: tuple[str, ...]) -> None:
    hub.repos[REPO].is_gated = True
    assert "repository not found" in only_error(command(*arguments, "org/missing:Q8_0"))
    assert "revision not found" in only_error(command(*arguments, f"{REPO}:Q8_0@v9"))
    assert "is gated. Ask for access at " in only_error(command(*arguments, f"{REPO}:Q8_0"))


def test_reference_embeds_as_the_path_does(
    command: Run, hub: Hub, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = command("embed", "-m", f"{REPO}:Q8_0", TEXT)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == command("embed", "-m", release.file("Q8_0"), TEXT).stdout
    monkeypatch.setenv("F2GGUF_MODEL", f"{REPO}:q8_0@main")
    assert command("embed", TEXT).stdout == process.stdout
    assert "tiny-Q8_0.gguf" in command("inspect").stdout


def test_every_command_takes_a_reference(command: Run, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text("a chess engine\nan archiver\n")
    model = f"{REPO}:Q8_0"
    for arguments in (
        ("search", "-m", model, "--docs", "docs.txt", TEXT),
        ("inspect", model),
        ("selftest", model, "--device", "cpu"),
    ):
        process = command(*arguments)
        assert process.returncode == 0, process.stderr
        assert process.stdout
    process = command("bench", "-m", model, "--pooling", "max")  # refused by the header: the bench itself takes longer
    assert "no pooling is called 'max'" in only_error(process, exit_code=2)


@pytest.mark.parametrize("model", [f"{REPO}:Q8_0", REPO, f"{REPO}:Q8_0@main"])
def test_second_use_asks_nobody(command: Run, hub: Hub, model: str) -> None:
    first = command("inspect", model)
    assert first.returncode == 0, first.stderr
    hub.requests.clear()
    assert command("inspect", model).stdout == first.stdout
    assert not hub.requests
    hub.stop()
    assert command("inspect", model).stdout == first.stdout
    assert command("inspect", model, is_offline=True).stdout == first.stdout
    assert pulled(command("pull", model, is_offline=True)).exists()


def test_offline_without_the_file_is_one_clear_error(command: Run, hub: Hub) -> None:
    line = only_error(command("embed", "-m", f"{REPO}:Q8_0", TEXT, is_offline=True))
    assert "the Hub cannot be reached" in line
    assert "HF_HUB_OFFLINE" in line
    assert not hub.requests
    command("pull", f"{REPO}:Q8_0")
    assert "the Hub cannot be reached" in only_error(command("inspect", f"{REPO}:Q4_0", is_offline=True))


def test_model_changes_when_it_is_pulled_and_not_before(command: Run, hub: Hub, release: Release) -> None:
    before = command("inspect", f"{REPO}:Q8_0").stdout
    old = hub.repos[REPO].head.sha
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": release.file("Q4_K_M").read_bytes(), "SHA256SUMS": None})
    assert command("inspect", f"{REPO}:Q8_0").stdout == before
    command("pull", f"{REPO}:Q8_0")
    assert command("inspect", f"{REPO}:Q8_0").stdout != before
    assert command("inspect", f"{REPO}:Q8_0@{old}").stdout == before


def test_variant_that_was_added_since_is_found(command: Run, hub: Hub, release: Release) -> None:
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": None})
    command("pull", f"{REPO}:Q4_K_M")
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": release.file("Q8_0").read_bytes()})
    assert command("inspect", f"{REPO}:Q8_0").returncode == 0


def test_files_that_are_not_known_to_be_good_are_warned_of(command: Run, hub: Hub, release: Release) -> None:
    hub.add("org/other", {"x.q8_0.gguf": unmeasured(release.file("Q8_0"))})
    (over,) = command("inspect", f"{REPO}:Q4_0").stderr.splitlines()
    assert over.startswith(f"warning: {REPO}:Q4_0: drift: mean ")
    assert over.endswith("OVER the bound of 2%")
    process = command("inspect", "org/other:Q8_0")
    assert process.stderr == "warning: org/other:Q8_0: drift: not measured\n"
    assert command("inspect", f"{REPO}:F16").stderr == "", "a reference drifts from nothing"


def test_embedder_takes_a_reference_as_a_string(hub: Hub, home: Path, release: Release) -> None:
    code = """
import sys, warnings; warnings.simplefilter("error")
from pathlib import Path
from f2gguf.runtime import Embedder, F2ggufError
with Embedder("org/tiny:Q8_0") as one, Embedder(sys.argv[1]) as two:
    assert (one.encode("a text") == two.encode("a text")).all()
try:
    Embedder(Path("org/tiny:Q8_0"))
except F2ggufError as error:
    print(error)
"""
    process = run_python(code, release.file("Q8_0"), hub=hub, home=home)
    assert process.stdout.startswith("org/tiny:Q8_0: no such file. "), process.stderr


def test_a_pickled_embedder_has_the_same_commit_elsewhere(
    hub: Hub, home: Path, release: Release, tmp_path: Path
) -> None:
    """The repository moves on between two workers: their vectors must still compare."""
    dump = """
import pickle, sys
from f2gguf.runtime import Embedder
with Embedder("org/tiny:Q8_0") as model, open(sys.argv[1], "wb") as file:
    pickle.dump(model, file)
"""
    load = """
import pickle, sys
with pickle.load(open(sys.argv[1], "rb")) as model:
    print(model.header.path.name, model.header.path.parent.name, model.encode("a text").shape)
"""
    first = hub.repos[REPO].head.sha
    assert run_python(dump, tmp_path / "model.pickle", hub=hub, home=home).returncode == 0
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": release.file("Q4_0").read_bytes(), "SHA256SUMS": None})
    n_requests = len(hub.requests)
    here = run_python(load, tmp_path / "model.pickle", hub=hub, home=home)
    assert here.stdout == f"tiny-Q8_0.gguf {first} (32,)\n", here.stderr
    assert len(hub.requests) == n_requests, "the cache of this machine has the file"
    there = run_python(load, tmp_path / "model.pickle", hub=hub, home=tmp_path / "another")
    assert there.stdout == here.stdout, there.stderr


def test_path_that_exists_is_no_reference(command: Run, hub: Hub, tmp_path: Path, release: Release) -> None:
    (tmp_path / "org").mkdir()
    shutil.copy(release.file("Q4_K_M"), tmp_path / REPO)
    assert f"file             {REPO} (1.2 MB)" in command("inspect", REPO).stdout
    assert not hub.requests


@pytest.mark.parametrize("path", ["dist/absent.gguf", "absent", "./absent", "~/absent", "a/b/c", "dist/x.gguf:Q8_0"])
def test_missing_file_is_not_looked_up(command: Run, hub: Hub, path: str) -> None:
    assert f"error: {Path(path)}: no such file. " in only_error(command("inspect", path))
    assert not hub.requests


def test_what_may_be_both_is_told_as_both(command: Run, hub: Hub) -> None:
    line = only_error(command("embed", "-m", "dist/nano", TEXT))
    assert "dist/nano: no such file here, and on the Hub: dist/nano@main: repository not found." in line
    hub.stop()
    line = only_error(command("embed", "-m", "dist/nano", TEXT))
    assert "dist/nano: no such file here, and on the Hub: dist/nano@main: the Hub cannot be reached" in line


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("Org-1/Na.me_2", HubFile("Org-1/Na.me_2")),
        ("org/name:Q8_0", HubFile("org/name", "Q8_0")),
        ("org/name:a/b.gguf@refs/pr/1", HubFile("org/name", "a/b.gguf", "refs/pr/1")),
        ("org/name@v1.0", HubFile("org/name", None, "v1.0")),
        ("org/name.GGUF", None),
        ("org/a..b", None),
        ("org/name-", None),
        ("../name", None),
        ("org/näme", None),
        ("org/name:@v1", None),
        ("org/name@v1:Q8_0", None),
        ("", None),
    ],
)
def test_references_are_told_from_paths(text: str, file: HubFile | None) -> None:
    assert parse_model(text) == file


def test_path_too_long_for_any_file_system_is_one_clear_error() -> None:
    with pytest.raises(NotGGUF, match="cannot be read"):
        open_header("x" * 5000)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("nano-Q4_K_M.gguf", "Q4_K_M"),
        ("nano.i1-iq3_xxs.gguf", "IQ3_XXS"),
        ("sub/Q8_0.gguf", "Q8_0"),
        ("nano-bf16-00001-of-00003.gguf", "BF16"),
        ("nano.gguf", None),
        ("q8_0-nano.gguf", None),
    ],
)
def test_variant_is_read_from_a_name(name: str, variant: str | None) -> None:
    assert variant_of(name) == variant
    listing = Listing("org/x", "0" * 40, {name: RemoteFile(1), "other-F32.gguf": RemoteFile(1)})
    assert matching(listing, variant or name) == [name]


def test_list_shows_cache_and_folders_with_what_to_pass_to_m(
    command: Run, hub: Hub, release: Release, tmp_path: Path
) -> None:
    hub.add("org/a", {"x-q4_0.gguf": unmeasured(release.file("Q4_0")), "y.gguf": b"GGUF\3\0\0\0"})
    for model in (f"{REPO}:Q8_0", f"{REPO}:Q4_0", "org/a:Q4_0"):
        assert command("pull", model).returncode == 0
    command("pull", "org/a:y.gguf")
    shutil.copytree(release.folder, tmp_path / "dist" / "tiny", ignore=shutil.ignore_patterns("*Q*"))
    process = command("list")
    assert process.returncode == 0
    header, *rows = ([cell.strip() for cell in line.split("  ") if cell] for line in process.stdout.splitlines())
    assert header == ["model", "variant", "size", "mean drift", "bound", "dims"]
    assert rows[0] == ["org/a:y.gguf", "damaged", "8 B"]
    assert rows[1] == ["org/a:Q4_0", "Q4_0", "1.2 MB", "not measured", "32"]
    assert [row[0] for row in rows[2:]] == [f"{REPO}:Q4_0", f"{REPO}:Q8_0", "dist/tiny/tiny-F16.gguf"]
    assert rows[2][4:] == ["OVER 2%", "32"]
    assert rows[3][4:] == ["under 2%", "32"]
    assert rows[4][3:] == ["reference", "32"]
    assert process.stderr.startswith("damaged: ")
    hub.stop()
    for row in rows[1:]:
        assert command("inspect", row[0]).returncode == 0
    assert command("inspect", rows[0][0]).returncode == 1


def test_list_names_older_commits_by_their_revision(command: Run, hub: Hub, release: Release) -> None:
    old = hub.repos[REPO].head.sha
    command("pull", f"{REPO}:Q8_0")
    command("pull", f"{REPO}:F16")
    hub.repos[REPO].commit({"tiny-Q8_0.gguf": release.file("Q4_K_M").read_bytes(), "SHA256SUMS": None})
    command("pull", f"{REPO}:Q8_0")
    command("pull", f"{REPO}:F16")
    found = json.loads(command("list", "--json").stdout)
    assert [one["model"] for one in found] == [f"{REPO}:Q8_0", f"{REPO}:Q8_0@{old}", f"{REPO}:F16"]
    assert [one["variant"] for one in found] == ["Q4_K_M", "Q8_0", "F16"]
    assert [one["holds"] for one in found] == [True, True, None]
    assert all(Path(one["path"]).exists() for one in found)


def test_list_shows_what_other_tools_downloaded_by_its_path(command: Run, hub: Hub, home: Path) -> None:
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('org/tiny', 'tiny-Q8_0.gguf'))"
    path = run_python(code, hub=hub, home=home).stdout.strip()
    assert [one["model"] for one in json.loads(command("list", "--json").stdout)] == [path]


def test_list_leaves_out_what_is_no_embedding_model(command: Run, release: Release, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    content = release.file("Q8_0").read_bytes()
    (folder / "llm.gguf").write_bytes(content.replace(b"qwen3.pooling_type", b"qwen3.pooling_tope"))
    (folder / "x-00001-of-00002.gguf").write_bytes(content)
    (folder / "x.imatrix.gguf").write_bytes(content)
    (folder / ".work").mkdir()
    (folder / ".work" / "stock.gguf").write_bytes(content)
    (folder / "gone.gguf").symlink_to(folder / "absent")
    process = command("list", folder)
    (row,) = process.stdout.splitlines()[1:]
    assert row.split()[:2] == [str(folder / "gone.gguf"), "damaged"]
    damaged, left_out = process.stderr.splitlines()
    assert "gone.gguf: no such file" in damaged
    assert left_out == "left out: 1 .gguf files that are no embedding models"


def test_list_of_nothing_says_where_models_come_from(command: Run) -> None:
    process = command("list")
    assert (process.returncode, process.stdout) == (0, "")
    assert "f2gguf pull org/name" in process.stderr
    assert command("list", "--json").stdout == "[]\n"
    assert command("list", "absent").returncode == 2


def test_commands_are_listed_in_the_order_of_work() -> None:
    names = "embed pull list inspect repair-header selftest index search fit bench serve quantize"
    assert f2gguf.list_commands(click.Context(f2gguf)) == names.split()
