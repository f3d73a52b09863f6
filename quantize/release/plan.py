"""The plan of a push to the Hub: every file, the card's diff, the tag; or the reason why it cannot be done."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.quantize.release.check import CARD, Release
from f2gguf.quantize.report.report import Report
from f2gguf.runtime.console import text_table
from f2gguf.runtime.errors import HubError, RepoMissing, RepoMoved, UnfitRelease, WrongUsage
from f2gguf.runtime.files import format_size
from f2gguf.runtime.hub.download import download
from f2gguf.runtime.hub.listing import REPO, Listing, ask_for_files, hub_errors

_TAG = re.compile(r"\w[\w+-]*(\.[\w+-]+)*")


@dataclass(frozen=True)
class PushPlan:
    """What a push will send. Make one with `make_plan`."""

    release: Release
    repo: str
    listing: Listing | None  # None: the repository will be created
    is_private: bool
    tag: str
    is_tagged: bool  # the Hub's commit holds the release, and has the tag
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
        lines = [self.card_diff, ""] if self.card_diff else []
        lines += [
            f"{self.repo}, {'private' if self.is_private else 'public'}, {where}; tag {self.tag}",
            text_table(("file", "size", "sha256", "state", "drift"), rows),
        ]
        lines += [f"not pushed, for SHA256SUMS lacks it: {name}" for name in release.unlisted]
        return [*lines, *(f"only on the Hub, and left there: {name}" for name in self._only_on_hub())]

    def _only_on_hub(self) -> list[str]:
        return sorted(set(self.listing.files) - {*self.states, ".gitattributes"}) if self.listing else []


def make_plan(release: Release, repo: str, *, tag: str | None = None, create: bool, private: bool) -> PushPlan:
    """Plan a push of `release` to `repo`; nothing is sent.

    Raises `WrongUsage` for flags that cannot work, `RepoMissing` for a repository that is not there unless `create`,
    `RepoMoved` for a tag that is taken, `UnfitRelease` for a card that the Hub refuses, a `HubError` for a token
    without the right to write.
    """
    if not REPO.fullmatch(repo):
        raise WrongUsage(f"--repo: {repo!r} is no repository. Write it as org/name.")
    if tag is not None and not _TAG.fullmatch(tag):
        raise WrongUsage(f"--tag: {tag!r} is no name for a tag. Use letters, digits, and - _ + . between them.")
    _require_token()
    listing = _find_repo(repo, create=create)
    if listing and private and not listing.is_private:
        raise WrongUsage(f"--private: {repo} exists and is public. Change that in its settings, or leave it out.")
    _require_valid_card(release.folder / CARD)
    states = {name: _state(listing, release.folder / name) for name in release.hashes}
    tag = tag or release.tag
    is_tagged = listing is not None and _is_tagged(listing, tag, is_changing={*states.values()} != {"same"})
    is_private = listing.is_private if listing else private
    card_diff = _card_diff(release, listing, states[CARD])
    return PushPlan(release, repo, listing, is_private, tag, is_tagged, states, card_diff)


def _require_token() -> None:
    from huggingface_hub import constants, get_token

    if not get_token():
        raise HubError(
            "no token of the Hub. Set HF_TOKEN to one with the right to write "
            f"({constants.ENDPOINT}/settings/tokens), or run `hf auth login`."
        )


def _find_repo(repo: str, *, create: bool) -> Listing | None:
    """What the repository holds, if the token may write to it; None if it will be created."""
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
    """Ask the Hub now. It would refuse the whole commit for its card after all files were sent."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import RepoCard

    with hub_errors(str(path)):
        try:
            RepoCard(path.read_text(encoding="utf-8")).validate("model")
        except (ValueError, yaml.YAMLError) as error:
            reasons = " ".join(str(error).split())
            raise UnfitRelease(
                f"{path}: the Hub refuses it: {reasons}. Correct models.lock, then run `quantize card`."
            ) from error


def _state(listing: Listing | None, path: Path) -> str:
    remote = listing.files.get(path.name) if listing else None
    if remote is None:
        return "new"
    return "changed" if remote.fault(path) else "same"


def _is_tagged(listing: Listing, tag: str, *, is_changing: bool) -> bool:
    """Whether the tag is there already; raises `RepoMoved` where it names another commit than the push ends with."""
    from huggingface_hub import HfApi

    with hub_errors(listing.repo):
        refs = HfApi().list_repo_refs(listing.repo)
    if tag in {branch.name for branch in refs.branches}:
        raise RepoMoved(f"{listing.repo}: has a branch {tag}. Pass another name with --tag.")
    commit = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    if commit and (is_changing or commit != listing.commit):
        raise RepoMoved(
            f"{listing.repo}: the tag {tag} names another commit ({commit[:12]}). Pass another name with --tag."
        )
    return bool(commit)


def _card_diff(release: Release, listing: Listing | None, state: str) -> str:
    """The card as a unified diff against the Hub's; empty where they are the same."""
    old = ""
    if listing and state == "changed":
        old = (download(listing, [CARD]) / CARD).read_text(encoding="utf-8", errors="replace")
    new = (release.folder / CARD).read_text(encoding="utf-8") if state != "same" else ""
    names = (f"{CARD} on the Hub", f"{release.folder / CARD}")
    return "\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""))


def _labels(report: Report) -> dict[str, str]:
    labels = {report.files[report.base].file: "reference"}
    return labels | {report.files[name].file: verdict.label for name, verdict in report.variants.items()}
