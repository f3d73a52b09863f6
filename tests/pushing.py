"""A release, a stand-in for the Hub, and `quantize push` from the one to the other; what must hold afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from f2gguf.quantize.convert.reserved import fill_in
from hub import (
    WRITER,
    Commit,
    Fault,
    Hub,
    Repo,
    finish,
    run_command,
    serving,
    start_command,
)

REPO = "org/tiny"
FILES = ["Modelfile", "README.md", "drift.json", "drift.png", "report.html", "tiny-F16.gguf", "tiny-Q8_0.gguf"]
Q8 = "tiny-Q8_0.gguf"
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


@contextmanager
def open_site(release: Path, home: Path) -> Iterator[Site]:
    """A site in `home`, with a copy of the release."""
    hub = Hub()
    hub.add(REPO)
    folder = shutil.copytree(release, home / "dist" / "tiny")
    with serving(hub):
        yield Site(hub, Path(folder), home / "home")


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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Write drift.json and SHA256SUMS again, with the hashes of the files as they are, so that only facts differ."""
    report = json.loads((folder / "drift.json").read_text())
    for file in report["files"].values():
        file["sha256"] = sha256(folder / file["file"])
    edit(report)
    (folder / "drift.json").write_text(json.dumps(report))
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names if (folder / name).exists()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def put_over_bound(folder: Path) -> None:
    """As a variant is written that was measured and drifts too much."""
    fill_in(folder / Q8, {"f2gguf.drift.mean": 0.03, "f2gguf.drift.upper": 0.04, "f2gguf.drift.holds": False})
    verdict = {"mean": 0.03, "upper": 0.04, "holds": False, "over": ["upper end of the mean 4.00%"]}
    seal(folder, lambda report: report["variants"]["Q8_0"].update(verdict))
