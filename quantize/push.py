"""A release goes to the Hub: planned, sent in one commit, read back, and only then tagged."""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.evals.report import label, text_table
from f2gguf.quantize.release import CARD, Release
from f2gguf.runtime.console import Progress, say
from f2gguf.runtime.errors import HashMismatch, HubError, RepoMissing, RepoMoved, UnfitRelease, WrongUsage
from f2gguf.runtime.files import format_size
from f2gguf.runtime.hub import REPO, Listing, ask_for_files, download, hub_errors

_TAG = re.compile(r"\w[\w+-]*(\.[\w+-]+)*")
_N_RETRIES = 5  # of a connection that brings nothing
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a push will do. Make one with `make_plan`."""

    release: Release
    repo: str
    listing: Listing | None  # None: the repository will be created
    is_private: bool
    tag: str
    states: dict[str, str]  # file -> "new", "changed" or "same"
    card_diff: str

    @property
    def changed(self) -> list[str]:
        return [name for name, state in self.states.items() if state != "same"]

    def as_dict(self) -> dict[str, Any]:
        release = self.release
        return {
            "repo": self.repo,
            "is_private": self.is_private,
            "parent_commit": self.listing.commit if self.listing else None,
            "tag": self.tag,
            "files": [
                {"file": name, "size_bytes": release.size_bytes(name), "sha256": release.hashes[name], "state": state}
                for name, state in self.states.items()
            ],
            "card_diff": self.card_diff,
            "not_pushed": list(release.unlisted),
            "only_on_hub": self._only_on_hub(),
        }

    def lines(self) -> list[str]:
        release, labels = self.release, _labels(self.release.report)
        rows = [
            [name, format_size(release.size_bytes(name)), release.hashes[name][:12], state, labels.get(name, "")]
            for name, state in self.states.items()
        ]
        where = f"on top of {self.listing.commit[:12]}" if self.listing else "which will be created"
        lines = [
            f"{self.repo}, {'private' if self.is_private else 'public'}, {where}; tag {self.tag}",
            text_table(("file", "size", "sha256", "state", "drift"), rows),
        ]
        lines += [f"not pushed, for SHA256SUMS lacks it: {name}" for name in release.unlisted]
        lines += [f"only on the Hub, and left there: {name}" for name in self._only_on_hub()]
        return [*lines, self.card_diff] if self.card_diff else lines

    def _only_on_hub(self) -> list[str]:
        return sorted(set(self.listing.files) - set(self.states)) if self.listing else []


def make_plan(release: Release, repo: str, *, tag: str | None = None, create: bool, private: bool) -> Plan:
    """What a push of `release` to `repo` will do; nothing is sent.

    Raises `WrongUsage` for flags that cannot work, `RepoMissing` for a repository that is not there unless `create`,
    `RepoMoved` for a tag that is taken, `UnfitRelease` for a card that the Hub refuses, a `HubError` for a token
    without the right to write.
    """
    _require_names(repo, tag)
    _require_token()
    listing = _find_repo(repo, create=create)
    if listing and private and not listing.is_private:
        raise WrongUsage(f"--private: {repo} exists and is public. Change that in its settings, or leave it out.")
    _require_valid_card(release.folder / CARD)
    states = {name: _state(listing, release.folder / name) for name in release.hashes}
    tag = tag or release.tag
    if listing:
        _require_free_tag(listing, tag, is_changing=set(states.values()) != {"same"})
    is_private = listing.is_private if listing else private
    return Plan(release, repo, listing, is_private, tag, states, _card_diff(release, listing, states[CARD]))


def push(plan: Plan, progress: Progress) -> str:
    """Do what `plan` says; gives the commit, which then holds the release and has the tag.

    What the Hub holds already is not sent again. Raises `HashMismatch` where it holds or sends other bytes than
    SHA256SUMS states, `RepoMoved` where somebody committed since the plan, and a `HubError` for all else.
    """
    listing = plan.listing or _create_repo(plan)
    commit = _send(plan, listing) if plan.changed else listing.commit
    _read_back(plan, commit, progress)
    _set_tag(plan, commit)
    return commit


def _require_names(repo: str, tag: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise WrongUsage(f"--repo: {' '.join(str(error).split())}") from error
    if not REPO.fullmatch(repo):
        raise WrongUsage(f"--repo: {repo!r} is no repository. Write it as org/name.")
    if tag is not None and not _TAG.fullmatch(tag):
        raise WrongUsage(f"--tag: {tag!r} is no name for a tag. Use letters, digits, and - _ + . between them.")


def _require_token() -> None:
    from huggingface_hub import constants, get_token

    if not get_token():
        raise HubError(
            "no token of the Hub. Set HF_TOKEN to one with the right to write "
            f"({constants.ENDPOINT}/settings/tokens), or run `hf auth login`."
        )


def _find_repo(repo: str, *, create: bool) -> Listing | None:
    """What the Hub holds, for those who may write to it; None where the repository is to be created."""
    from huggingface_hub import HfApi

    try:
        listing = ask_for_files(repo)
    except RepoMissing as error:
        if create:
            return None
        raise RepoMissing(
            f"{repo}: repository not found, or hidden from this token. Pass --create to make it (public, or with "
            "--private), or check its name and HF_TOKEN."
        ) from error
    with hub_errors(repo):
        HfApi().auth_check(repo, write=True)
    return listing


def _require_valid_card(path: Path) -> None:
    """Ask the Hub, which would refuse the whole commit for its card after everything else was sent."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {"content": path.read_text(encoding="utf-8"), "repoType": "model"}
    with hub_errors(str(path)):
        response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked, headers=build_hf_headers())
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        reasons = "; ".join(error["message"] for error in response.json()["errors"])
    raise UnfitRelease(f"{path}: the Hub refuses it: {reasons}. Correct models.lock, then run `quantize card`.")


def _state(listing: Listing | None, path: Path) -> str:
    remote = listing.files.get(path.name) if listing else None
    if remote is None:
        return "new"
    return "changed" if remote.fault(path) else "same"


def _require_free_tag(listing: Listing, tag: str, *, is_changing: bool) -> None:
    """A tag may be there already where it names the commit that holds this release."""
    from huggingface_hub import HfApi

    with hub_errors(listing.repo):
        refs = HfApi().list_repo_refs(listing.repo)
    if tag in {branch.name for branch in refs.branches}:
        raise RepoMoved(f"{listing.repo}: has a branch {tag}. Pass another name with --tag.")
    taken = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if taken and (is_changing or taken != listing.commit):
        raise RepoMoved(
            f"{listing.repo}: the tag {tag} names another commit ({taken[:12]}). Pass another name with --tag."
        )


def _card_diff(release: Release, listing: Listing | None, state: str) -> str:
    """The card as a unified diff against the Hub's; empty where they are the same."""
    old = ""
    if listing and state == "changed":
        old = (download(listing, [CARD]) / CARD).read_text(encoding="utf-8", errors="replace")
    new = (release.folder / CARD).read_text(encoding="utf-8") if state != "same" else ""
    names = (f"{CARD} on the Hub", f"{release.folder / CARD}")
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""))


def _labels(report: dict[str, Any]) -> dict[str, str]:
    """What was measured of each file: "under 2%"."""
    labels = {name: label(verdict) for name, verdict in report["variants"].items()} | {"F16": "reference"}
    return {file["file"]: labels[name] for name, file in report["files"].items()}


def _create_repo(plan: Plan) -> Listing:
    from huggingface_hub import HfApi

    with hub_errors(plan.repo):
        HfApi().create_repo(plan.repo, private=plan.is_private)
    say(f"{plan.repo}: created")
    return ask_for_files(plan.repo)


def _send(plan: Plan, listing: Listing) -> str:
    """Large files one by one, so that a push that is cut off goes on where it was; then all files in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api, release, additions = HfApi(), plan.release, []
    for i, name in enumerate(plan.changed, start=1):
        addition = CommitOperationAdd(name, release.folder / name)
        addition.upload_info.sha256 = bytes.fromhex(release.hashes[name])  # or the client reads the whole file for it
        say(f"send {i} of {len(plan.changed)}: {name}, {format_size(release.size_bytes(name))}")
        with hub_errors(f"{plan.repo}: {name}"):
            api.preupload_lfs_files(plan.repo, [addition])
        additions.append(addition)
    with hub_errors(plan.repo):
        message = f"{release.report['model']}: {plan.tag}"
        made = api.create_commit(plan.repo, additions, commit_message=message, parent_commit=listing.commit)
    say(f"commit {made.oid}")
    return str(made.oid)


def _read_back(plan: Plan, commit: str, progress: Progress) -> None:
    """Raise `HashMismatch` unless the Hub states, and sends, every file of the release as it is here."""
    release, listing = plan.release, ask_for_files(plan.repo, commit)
    for name in release.hashes:
        remote = listing.files.get(name)
        fault = remote.fault(release.folder / name) if remote else "no such file"
        if fault:
            raise HashMismatch(f"{listing}: the Hub states of {name}: {fault}. The tag was not set. Run it again.")
    n_bytes = sum(map(release.size_bytes, release.hashes))
    with progress("read back", n_bytes) as advance:
        for name, sha256 in release.hashes.items():
            found = _sha256_on_hub(listing, name, advance)
            if found != sha256:
                raise HashMismatch(
                    f"{listing}: the Hub sends {name} with the SHA-256 {found} instead of {sha256}. The tag was not "
                    "set. Run it again; where that stays, delete the file on the Hub with its LFS object first."
                )
    say(f"read back: {len(release.hashes)} files, {format_size(n_bytes)}, each with the SHA-256 of its file here")


def _sha256_on_hub(listing: Listing, name: str, advance: Callable[[int], None]) -> str:
    """The SHA-256 of what the Hub sends of a file; nothing of it is kept."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    digest, n_read, n_failed = hashlib.sha256(), 0, 0
    with hub_errors(f"{listing}: {name}"):
        while n_read < listing.files[name].size_bytes:
            try:
                for chunk in _chunks(listing, name, n_read):
                    digest.update(chunk)
                    advance(len(chunk))
                    n_read, n_failed = n_read + len(chunk), 0
                break
            except HTTPError as error:
                n_failed += 1
                if isinstance(error, HfHubHTTPError) or n_failed > _N_RETRIES:
                    raise
                time.sleep(n_failed)
    return digest.hexdigest()


def _chunks(listing: Listing, name: str, start: int) -> Iterator[bytes]:
    """What the Hub sends of a file from byte `start` on."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-"} if start else {}
    with http_stream_backoff(
        "GET",
        hf_hub_url(listing.repo, name, revision=listing.commit),
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # the caller's part, for they come in the middle of a file as well
    ) as response:
        hf_raise_for_status(response)
        n_known = start if response.status_code == 200 else 0  # it may send the whole file all the same
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            if new := chunk[n_known:]:
                yield new
            n_known = max(0, n_known - len(chunk))


def _set_tag(plan: Plan, commit: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(f"{plan.repo}: tag {plan.tag}"):
        if plan.tag not in {ref.name for ref in api.list_repo_refs(plan.repo).tags}:
            api.create_tag(plan.repo, tag=plan.tag, revision=commit)
