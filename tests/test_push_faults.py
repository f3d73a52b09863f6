"""`quantize push` where something goes wrong on the way, at the Hub, or here: said, and the same command ends well."""

from __future__ import annotations

from base64 import b64encode

import pytest
from hub import (
    ALWAYS,
    Fault,
    flip_bit,
    reading,
)
from hub.call import Answer
from pushing import LARGE, PUSHED, Q8, REPO, Site, refusal, require_ends_well, require_pushed, sent_objects, sha256

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
    site.hub.faults.append(Fault("GET", "/tree/", ALWAYS, status=500))
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
    "while the commit is listed": ("GET", "/tree/", 0),
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
    assert "the Hub states of Modelfile: git-sha1" in refusal(site.push("--yes"))
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
