"""`quantize push` with the real Hub client, against a stand-in for the Hub on the loopback."""

from __future__ import annotations

import json

import pytest
from conftest import Release
from hub import (
    READER,
    WRITER,
    Fault,
    Repo,
    flip_bit,
    run_command,
    run_python,
)
from pushing import (
    LARGE,
    PUSHED,
    Q8,
    REPO,
    Site,
    put_over_bound,
    read_back,
    refusal,
    require_pushed,
    seal,
    sent_objects,
    sha256,
    writes,
)

# The plan


def test_plan_names_every_file_and_sends_nothing(site: Site) -> None:
    site.repo.commit({"older.gguf": b"GGUF"})
    process = site.push()
    assert process.returncode == 0
    assert "Pass --yes" in process.stderr
    for name in PUSHED:
        row = next(line for line in process.stdout.splitlines() if line.startswith(f"{name} "))
        assert sha256(site.folder / name)[:12] in row
        assert " new" in row
    assert f"{REPO}, public, on top of {site.repo.head.sha[:12]}; tag f2gguf-0.1.0-" in process.stdout
    assert "only on the Hub, and left there: older.gguf" in process.stdout
    assert ".gitattributes" not in process.stdout
    assert writes(site.hub) == []


def test_plan_tells_new_from_changed_from_same_and_shows_the_card_line_by_line(site: Site) -> None:
    card = (site.folder / "README.md").read_bytes()
    site.repo.commit({"README.md": card.replace(b"# tiny, GGUF", b"# tiny"), Q8: (site.folder / Q8).read_bytes()})
    site.repo.commit({"drift.json": b"{}"})
    plan = json.loads(site.push("--json").stdout)
    states = {file["file"]: file["state"] for file in plan["files"]}
    assert [name for name in PUSHED if states[name] == "changed"] == ["README.md", "drift.json"]
    assert [name for name in PUSHED if states[name] == "same"] == [Q8]
    changed = [line for line in plan["card_diff"].splitlines()[2:] if line[0] in "+-"]
    assert changed == ["-# tiny", "+# tiny, GGUF"]
    assert (plan["parent_commit"], plan["commit"]) == (site.repo.head.sha, None)


def test_what_the_sums_lack_is_named_and_not_pushed(site: Site) -> None:
    (site.folder / "notes.txt").write_text("mine")
    process = site.push("--yes")
    assert "not pushed, for SHA256SUMS lacks it: notes.txt" in process.stdout
    require_pushed(site, process)
    assert "notes.txt" not in site.repo.head.files


def test_unfit_release_is_refused_before_the_hub_is_asked(site: Site) -> None:
    path = site.folder / Q8
    path.write_bytes(flip_bit(path.read_bytes()))
    assert f"{Q8}: has the SHA-256" in refusal(site.push("--yes"))
    assert site.hub.requests == []


def test_file_over_the_bound_is_pushed_only_where_that_is_allowed(site: Site) -> None:
    put_over_bound(site.folder)
    assert "--allow-over-bound" in refusal(site.push("--yes"), exit_code=3)
    assert site.hub.requests == []
    process = site.push("--yes", "--allow-over-bound")
    assert "OVER 2%" in process.stdout
    require_pushed(site, process)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("tinny", "--repo", REPO), "Did you mean 'tiny'?"),
        (("tiny", "--repo", "tiny"), "--repo"),
        (("tiny", "--repo", "org/a--b"), "--repo"),
        (("tiny", "--repo", REPO, "--tag", "a b"), "--tag"),
        (("tiny", "--repo", REPO, "--tag", "../x"), "--tag"),
    ],
)
def test_what_cannot_work_is_wrong_usage(site: Site, arguments: tuple[str, ...], reason: str) -> None:
    command = ("push", *arguments, "--out", site.folder.parent, "--yes")
    process = run_command("quantize", *command, hub=site.hub, home=site.home, token=WRITER)
    assert reason in refusal(process, exit_code=2)
    assert site.hub.requests == []


@pytest.mark.parametrize(
    ("token", "reason"),
    [("", "no token"), (READER, "refuses it (403)"), ("hf_wrong", "refuses it (401)")],
)
def test_without_the_right_to_write_nothing_is_sent(site: Site, token: str, reason: str) -> None:
    for arguments in ((), ("--yes",)):
        line = refusal(site.push(*arguments, token=token))
        assert reason in line
        assert "HF_TOKEN" in line
    assert writes(site.hub) == []


def test_card_that_the_hub_refuses_is_refused_before_anything_is_sent(site: Site) -> None:
    card = site.folder / "README.md"
    card.write_text(card.read_text().replace("library_name: gguf", "license: my-own\nlibrary_name: gguf"))
    seal(site.folder)
    line = refusal(site.push("--yes"))
    assert 'README.md: the Hub refuses it: - Error: "license" must be one of' in line
    assert writes(site.hub) == []


def test_repository_that_is_called_something_else_now_is_refused(site: Site) -> None:
    site.hub.renamed[REPO] = "org/other"
    site.hub.repos["org/other"] = Repo("org/other")
    site.hub.repos["org/other"].commit({".gitattributes": b""})
    assert "is called org/other now" in refusal(site.push("--yes"))
    assert writes(site.hub) == []


# The repository


def test_missing_repository_is_made_only_where_that_is_asked_for(site: Site) -> None:
    del site.hub.repos[REPO]
    for arguments in ((), ("--yes",), ("--yes", "--private")):
        assert "Pass --create" in refusal(site.push(*arguments))
    plan = site.push("--create", "--private")
    assert f"{REPO}, private, which will be created" in plan.stdout
    assert REPO not in site.hub.repos


@pytest.mark.parametrize("private", [True, False])
def test_repository_is_made_as_asked(site: Site, private: bool) -> None:
    del site.hub.repos[REPO]
    require_pushed(site, site.push("--yes", "--create", *(["--private"] if private else [])))
    assert site.repo.is_private is private


def test_namespace_of_others_is_refused(site: Site) -> None:
    site.hub.orgs.clear()
    del site.hub.repos[REPO]
    assert 'under the namespace "org"' in refusal(site.push("--yes", "--create"))


@pytest.mark.parametrize("private", [True, False])
def test_repository_that_exists_stays_as_visible_as_it_is(site: Site, private: bool) -> None:
    site.repo.is_private = private
    process = site.push("--yes", "--create")
    assert f"{REPO}, {'private' if private else 'public'}, on top of" in process.stdout
    require_pushed(site, process)
    assert site.repo.is_private is private


def test_release_that_is_to_be_private_never_goes_to_a_public_repository(site: Site) -> None:
    assert "--private: org/tiny exists and is public" in refusal(site.push("--yes", "--private"), exit_code=2)
    assert writes(site.hub) == []


# The push


def test_release_arrives_in_one_commit_and_is_read_back_before_it_is_tagged(site: Site) -> None:
    parent = site.repo.head.sha
    require_pushed(site, site.push("--yes"))
    assert site.repo.head.parent == parent
    assert read_back(site) == set(PUSHED)
    assert sent_objects(site.hub) == [sha256(site.folder / name) for name in LARGE]
    assert site.hub.requests[-1].path == f"/api/models/{REPO}/tag/{site.repo.head.sha}"


def test_whole_release_of_a_real_model_arrives(nano_release: Release, site: Site) -> None:
    arguments = ("push", nano_release.folder, "--repo", REPO, "--yes", "--json")
    process = run_command("quantize", *arguments, hub=site.hub, home=site.home, token=WRITER)
    assert process.returncode == 0, process.stderr
    pushed = {name: site.repo.read(name) for name in site.repo.head.files if name != ".gitattributes"}
    assert pushed == {path.name: path.read_bytes() for path in nano_release.folder.iterdir()}
    assert json.loads(process.stdout)["commit"] == site.repo.head.sha


def test_unchanged_release_is_only_read_back(site: Site) -> None:
    site.push("--yes")
    site.hub.requests.clear()
    require_pushed(site, site.push("--yes"))
    assert writes(site.hub) == []
    assert read_back(site) == set(PUSHED)


def test_only_what_changed_is_sent(site: Site) -> None:
    site.push("--yes")
    (site.folder / "drift.png").write_bytes((site.folder / "drift.png").read_bytes() + b"\0")
    seal(site.folder)
    site.hub.requests.clear()
    assert site.push("--yes").returncode == 0
    assert sent_objects(site.hub) == [sha256(site.folder / "drift.png")]
    changed, before = site.pushed
    differing = {name for name in PUSHED if changed.files[name] != before.files[name]}
    assert differing == {"drift.png", "drift.json", "SHA256SUMS"}
    assert len(site.repo.tags) == 2, "other bytes, another tag"


def test_client_does_not_hash_files_once_more(site: Site) -> None:
    code = (
        "import huggingface_hub.lfs as lfs\n"
        "def refuse(file): raise SystemExit(f'hashed {file.name}')\n"
        "lfs.sha_fileobj = refuse\n"
        "from f2gguf.quantize.cli import quantize; quantize()"
    )
    arguments = ("push", site.folder, "--repo", REPO, "--yes")
    require_pushed(site, run_python(code, *arguments, hub=site.hub, home=site.home, token=WRITER))


def test_large_objects_go_in_parts(site: Site) -> None:
    site.hub.part_bytes = 500_000
    require_pushed(site, site.push("--yes"))
    assert len(site.hub.asked("PUT", "/upload/")) == 1 + 4 + 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(site: Site) -> None:
    code = (
        "import sys; from f2gguf.quantize.cli import quantize\n"
        "quantize(standalone_mode=False)\n"
        "from f2gguf.evals.bench.sides import peak_rss_bytes; print(peak_rss_bytes(), file=sys.stderr)"
    )
    arguments = ("push", site.folder, "--repo", REPO, "--yes")

    def peak_bytes() -> int:
        process = run_python(code, *arguments, hub=site.hub, home=site.home, token=WRITER)
        return int(process.stderr.split()[-1])

    small = peak_bytes()
    with (site.folder / "tiny-F16.gguf").open("ab") as file:
        file.write(bytes(200_000_000))
    seal(site.folder)
    assert peak_bytes() < small + 50_000_000
    assert len(site.repo.head.files["tiny-F16.gguf"].sha256) == 64


# The tag


def test_tag_may_be_named(site: Site) -> None:
    require_pushed(site, site.push("--yes", "--tag", "v1.0"), tag="v1.0")
    require_pushed(site, site.push("--yes", "--tag", "v1.0"), tag="v1.0")


def test_tag_of_another_commit_is_refused_in_the_plan(site: Site) -> None:
    site.repo.tags["v1"] = site.repo.head.sha
    for arguments in ((), ("--yes",)):
        line = refusal(site.push("--tag", "v1", *arguments))
        assert "the tag v1 names another commit" in line
        assert "--tag" in line
    assert writes(site.hub) == []
    site.push("--yes")
    assert "the tag v1 names another commit" in refusal(site.push("--tag", "v1", "--yes"))
    assert "has a branch main" in refusal(site.push("--tag", "main", "--yes"))


def test_tag_that_somebody_sets_meanwhile_is_an_error(site: Site) -> None:
    first = site.repo.head.sha
    site.hub.faults.append(Fault("POST", "/tag/", before=lambda _: site.repo.tags.update(v1=first)))
    assert "Reference already exists" in refusal(site.push("--yes", "--tag", "v1"))
    assert site.repo.tags == {"v1": first}
    assert "names another commit" in refusal(site.push("--yes", "--tag", "v1"))
