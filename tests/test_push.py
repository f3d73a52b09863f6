"""`quantize push` with the real Hub client, against a stand-in for the Hub on the loopback."""

from __future__ import annotations

import json
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import Release
from hub import (
    ALWAYS,
    READER,
    WRITER,
    Commit,
    Fault,
    Hub,
    Repo,
    finish,
    flip_bit,
    reading,
    run_command,
    run_python,
    serving,
    start_command,
)
from hub.call import Answer
from test_push_check import FILES, Q8, put_over_bound, seal, sha256

REPO = "org/tiny"
PUSHED = [*FILES, "SHA256SUMS"]
LARGE = ["drift.png", "tiny-F16.gguf", "tiny-Q8_0.gguf"]  # in the order in which they are sent


@dataclass(frozen=True)
class Site:
    """A release, a Hub, and who pushes the one to the other."""

    hub: Hub
    folder: Path
    home: Path

    @property
    def repo(self) -> Repo:
        return self.hub.repos[REPO]

    @property
    def pushed(self) -> list[Commit]:
        """Commits besides the one that the Hub itself makes."""
        return list(self.repo.history(self.repo.head))[:-1]

    def push(self, *arguments: str, token: str = WRITER) -> CompletedProcess[str]:
        return run_command("quantize", *self._arguments(arguments), hub=self.hub, home=self.home, token=token)

    def push_killed(self, fault: Fault, *, late: bool) -> None:
        """Push, and kill -9 at a request: when it comes, or after the Hub has done what it asks."""
        arguments = self._arguments(("--yes",))
        process = start_command("quantize", *arguments, hub=self.hub, home=self.home, token=WRITER)

        def kill(body: bytes = b"") -> bytes:
            process.kill()
            return body

        if late:
            fault.sent = kill
        else:
            fault.before = lambda _: kill()
        self.hub.faults.append(fault)
        assert finish(process).returncode == -9

    def _arguments(self, arguments: tuple[str, ...]) -> list[str]:
        return ["push", "tiny", "--out", str(self.folder.parent), "--repo", REPO, *arguments]


@pytest.fixture
def site(tiny_release: Release, tmp_path: Path) -> Iterator[Site]:
    hub = Hub()
    hub.add(REPO)
    folder = shutil.copytree(tiny_release.folder, tmp_path / "dist" / "tiny")
    with serving(hub):
        yield Site(hub, Path(folder), tmp_path / "home")


def refusal(process: CompletedProcess[str], exit_code: int = 1) -> str:
    """The one line of a refusal; progress and retries that the client logs may come before it."""
    assert process.returncode == exit_code, process.stderr
    assert "Traceback" not in process.stderr
    *before, last = process.stderr.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.startswith("error: ")]
    return last


def require_pushed(site: Site, process: CompletedProcess[str], tag: str = "") -> None:
    """The Hub holds the release byte for byte, in one commit, and that has the tag."""
    assert process.returncode == 0, process.stderr
    tag = tag or f"f2gguf-0.1.0-{sha256(site.folder / 'SHA256SUMS')[:8]}"
    assert {name: site.repo.read(name) for name in PUSHED} == {n: (site.folder / n).read_bytes() for n in PUSHED}
    assert len(site.pushed) == 1
    assert site.repo.tags == {tag: site.repo.head.sha}
    assert process.stdout.splitlines()[-1] == f"{site.hub.url}/{REPO}/tree/{tag}"


def require_ends_well(site: Site, *arguments: str) -> None:
    """Push again: all is there in the end, and nothing that the Hub held was sent once more."""
    held = set(site.repo.objects) if REPO in site.hub.repos else set()
    site.hub.faults.clear()
    site.hub.requests.clear()
    require_pushed(site, site.push("--yes", *arguments))
    assert held.isdisjoint(sent_objects(site.hub))


def sent_objects(hub: Hub) -> list[str]:
    """The SHA-256 of every object that storage was sent, whole or not, in order."""
    bodies = [request.path for request in hub.asked("PUT", "/upload/")]
    assert len(bodies) == len(set(bodies)), "nothing is sent twice"
    return list(dict.fromkeys(path.split("/")[4] for path in bodies))


def read_back(site: Site) -> set[str]:
    """The files that were sent back in full, of the head's commit or its objects."""
    whole = [r for r in site.hub.requests if r.method == "GET" and r.status == 200]
    kinds = (f"/resolve/{site.repo.head.sha}/", "/stored/")
    return {r.path.rsplit("/", 1)[1] for r in whole if any(kind in r.path for kind in kinds)}


def writes(hub: Hub) -> list[str]:
    """What was asked that changes something."""
    return [r.path for r in hub.requests if r.method not in ("GET", "HEAD") and r.path != "/api/validate-yaml"]


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


def test_memory_does_not_grow_with_the_file(site: Site) -> None:
    code = (
        "import sys; from f2gguf.quantize.cli import quantize\n"
        "quantize(standalone_mode=False)\n"
        "from f2gguf.evals.bench_sides import peak_rss_bytes; print(peak_rss_bytes(), file=sys.stderr)"
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


# Faults: one clear line, and the same command again ends well

STEPS = {
    "info": ("GET", "/revision/main", (401, 404, 429, 503)),
    "rights": ("GET", "/auth-check/write", (401, 403, 404, 500)),
    "card": ("POST", "/validate-yaml", (400, 429, 500)),
    "refs": ("GET", "/refs", (403, 500)),
    "modes": ("POST", "/preupload/", (401, 404, 429, 500)),
    "batch": ("POST", "/objects/batch", (403, 404, 429, 503)),
    "upload": ("PUT", "/upload/", (401, 403, 412, 500)),
    "verify": ("POST", "/objects/verify", (403, 404, 500)),
    "commit": ("POST", "/commit/main", (401, 403, 409, 412, 429, 502)),
    "small file": ("GET", "/resolve/", (401, 403, 404, 429, 500)),
    "large file": ("GET", "/stored/", (403, 404, 503)),
    "tag": ("POST", "/tag/", (401, 403, 404, 409, 429, 500)),
}


@pytest.mark.parametrize("step", STEPS)
def test_refusal_at_any_step_is_one_clear_error(site: Site, step: str) -> None:
    method, path, statuses = STEPS[step]
    for status in statuses:
        site.hub.faults[:] = [Fault(method, path, ALWAYS, status=status)]
        line = refusal(site.push("--yes"))
        assert REPO in line or "README.md" in line
        assert site.repo.tags == {}
    assert len(site.pushed) == (step in ("small file", "large file", "tag"))
    require_ends_well(site)


@pytest.mark.parametrize("status", [401, 403, 409, 429, 500])
def test_refusal_to_make_the_repository_is_one_clear_error(site: Site, status: int) -> None:
    del site.hub.repos[REPO]
    site.hub.faults.append(Fault("POST", "/repos/create", ALWAYS, status=status))
    assert REPO in refusal(site.push("--yes", "--create"))
    require_ends_well(site, "--create")


def test_read_back_of_another_listing_is_one_clear_error(site: Site) -> None:
    site.hub.faults.append(Fault("GET", "/revision/", after=1, status=500))
    assert "the Hub answers 500" in refusal(site.push("--yes"))
    assert site.repo.tags == {}
    require_ends_well(site)


@pytest.mark.parametrize("path", ["/repos/create", "/commit/main", "/tag/"])
@pytest.mark.parametrize("fault", [{"status": 500, "is_late": True}, {"send_bytes": 0}])
def test_answer_that_gets_lost_costs_nothing(site: Site, path: str, fault: dict[str, int]) -> None:
    """The Hub did what was asked, and the client never heard of it."""
    del site.hub.repos[REPO]
    site.hub.faults.append(Fault("POST", path, **fault))  # type: ignore[arg-type]
    site.push("--yes", "--create")
    require_ends_well(site, "--create")


def test_hub_out_of_reach_is_one_clear_error(site: Site) -> None:
    site.hub.stop()
    assert "the Hub cannot be reached" in refusal(site.push("--yes"))


@pytest.mark.parametrize("part_bytes", [16_000_000, 500_000])
def test_upload_that_breaks_once_is_made_good_by_the_client(site: Site, part_bytes: int) -> None:
    site.hub.part_bytes = part_bytes
    site.hub.faults += [Fault("PUT", "/upload/", after=1, receive_bytes=100_000), Fault("PUT", "", after=2, status=503)]
    require_pushed(site, site.push("--yes"))


@pytest.mark.parametrize("part_bytes", [16_000_000, 500_000])
def test_upload_that_keeps_breaking_is_one_clear_error(site: Site, part_bytes: int) -> None:
    site.hub.part_bytes = part_bytes
    site.hub.faults.append(Fault("PUT", sha256(site.folder / Q8), ALWAYS, receive_bytes=100_000))
    assert f"{REPO}: {Q8}" in refusal(site.push("--yes"))
    assert site.pushed == []
    require_ends_well(site)


KILLS = {
    "while a mode is asked": ("POST", "/preupload/", 2),
    "before the first object": ("POST", "/objects/batch", 0),
    "in the first object": ("PUT", "/upload/", 0),
    "in the second object": ("PUT", "/upload/", 1),
    "in the last part": ("PUT", "/upload/", 7),
    "while parts are joined": ("POST", "/complete_multipart/", 0),
    "while an object is checked": ("POST", "/objects/verify", 1),
    "at the commit": ("POST", "/commit/main", 0),
    "while the commit is listed": ("GET", "/revision/", 1),
    "while a file is read back": ("GET", "/stored/", 1),
    "at the tag": ("POST", "/tag/", 0),
}


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_the_next_push_goes_on_from_there(site: Site, moment: str, late: bool) -> None:
    site.hub.part_bytes = 500_000
    method, path, after = KILLS[moment]
    site.push_killed(Fault(method, path, after=after), late=late)
    require_ends_well(site)


def test_commit_of_somebody_else_meanwhile_is_said_and_nothing_is_lost(site: Site) -> None:
    site.hub.faults.append(Fault("POST", "/commit/main", before=lambda _: site.repo.commit({"LICENSE": b"MIT"})))
    assert f"{REPO}: has moved since: somebody committed. Run it again" in refusal(site.push("--yes"))
    assert site.repo.tags == {}
    site.hub.requests.clear()
    assert site.push("--yes").returncode == 0
    assert sent_objects(site.hub) == []
    assert site.repo.read("LICENSE") == b"MIT"
    assert list(site.repo.tags.values()) == [site.repo.head.sha]


# Flipped bits, on their way, in the Hub's storage, and on their way back


@pytest.mark.parametrize("name", PUSHED)
def test_bit_that_flips_on_its_way_back_is_found(site: Site, name: str) -> None:
    site.hub.faults.append(Fault("GET", f"/{name}", send_bytes=None, sent=flip_bit, after=name in LARGE))
    line = refusal(site.push("--yes"))
    assert f"the Hub sends {name} with the SHA-256" in line
    assert "Push again" in line
    assert site.repo.tags == {}
    require_ends_well(site)


@pytest.mark.parametrize(("method", "part_bytes"), [("PUT", 16_000_000), ("POST", 500_000)])
def test_bit_that_flips_in_the_storage_is_found_by_every_push(site: Site, method: str, part_bytes: int) -> None:
    site.hub.part_bytes = part_bytes
    site.hub.faults.append(Fault(method, sha256(site.folder / Q8), stored=flip_bit))
    for _ in range(2):
        assert f"the Hub sends {Q8} with the SHA-256" in refusal(site.push("--yes"))
        assert site.repo.tags == {}


def test_bit_that_flips_in_the_storage_of_a_tagged_release_is_found(site: Site) -> None:
    site.push("--yes")
    oid = sha256(site.folder / Q8)
    site.repo.objects[oid] = flip_bit(site.repo.objects[oid])
    assert f"the Hub sends {Q8} with the SHA-256" in refusal(site.push("--yes"))


@pytest.mark.parametrize("part_bytes", [16_000_000, 500_000])
def test_bit_that_flips_on_its_way_to_the_storage_is_refused_there(site: Site, part_bytes: int) -> None:
    site.hub.part_bytes = part_bytes
    site.hub.faults.append(Fault("PUT", sha256(site.folder / Q8), received=flip_bit))
    assert f"{REPO}: {Q8}" in refusal(site.push("--yes"))
    require_ends_well(site)


def test_text_that_changes_on_its_way_into_the_commit_is_found(site: Site) -> None:
    sent, other = b64encode(b"FRO"), b64encode(b"FRN")  # the Modelfile begins so, and is the first
    site.hub.faults.append(Fault("POST", "/commit/main", received=lambda body: body.replace(sent, other, 1)))
    assert "the Hub states of Modelfile: git blob" in refusal(site.push("--yes"))
    assert site.repo.tags == {}
    assert site.push("--yes").returncode == 0
    assert site.repo.read("Modelfile") == (site.folder / "Modelfile").read_bytes()


def test_file_that_changes_during_the_push_is_found(site: Site) -> None:
    """A small one: of a large one, storage refuses the bytes."""
    path = site.folder / "report.html"
    changed = flip_bit(path.read_bytes())
    site.hub.faults.append(Fault("PUT", "/upload/", before=lambda _: path.write_bytes(changed)))
    assert "the Hub sends report.html with the SHA-256" in refusal(site.push("--yes"))
    assert site.repo.tags == {}


@pytest.mark.parametrize("name", ["Modelfile", Q8])
def test_body_that_is_too_short_is_found(site: Site, name: str) -> None:
    site.hub.faults.append(Fault("GET", f"/{name}", sent=lambda body: body[:-1], after=name in LARGE))
    assert f"the Hub sends {name} with the SHA-256" in refusal(site.push("--yes"))
    assert site.repo.tags == {}


def test_file_that_the_commit_lacks_is_found(site: Site) -> None:
    def drop(body: bytes) -> bytes:
        return b"\n".join(line for line in body.split(b"\n") if b'"Modelfile"' not in line)

    site.hub.faults.append(Fault("POST", "/commit/main", received=drop))
    assert "the Hub states of Modelfile: no such file" in refusal(site.push("--yes"))
    assert site.repo.tags == {}


# Connections that break while reading back


@pytest.mark.parametrize("has_ranges", [True, False])
def test_reading_goes_on_where_the_connection_broke(
    site: Site, has_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_ranges:
        monkeypatch.setattr(reading, "_ranged", lambda call, content, headers: Answer(content, headers=headers))
    site.hub.faults.append(Fault("GET", "/stored/", after=1, send_bytes=1_200_000))
    require_pushed(site, site.push("--yes"))
    first, second = (r for r in site.hub.asked("GET", "/tiny-F16.gguf") if "/stored/" in r.path)
    assert (first.sent_bytes, second.range) == (1_200_000, "bytes=1048576-")


def test_reading_that_keeps_breaking_ends(site: Site) -> None:
    site.hub.faults.append(Fault("GET", "/stored/", ALWAYS, send_bytes=1000))
    assert "drift.png" in refusal(site.push("--yes"))
    assert len(site.hub.asked("GET", "/stored/")) == 6
    assert site.repo.tags == {}
    require_ends_well(site)
