"""Sends a release to the Hub in one commit, reads it back, and tags it after that."""

from __future__ import annotations

import hashlib
import sys

from f2gguf.quantize.release.plan import PushPlan
from f2gguf.runtime.console import Progress, say
from f2gguf.runtime.errors import HashMismatch
from f2gguf.runtime.files import format_size
from f2gguf.runtime.hub.client import hide_progress, receive
from f2gguf.runtime.hub.listing import Listing, ask_for_files, hub_errors


def push(plan: PushPlan, progress: Progress) -> str:
    """Push what `plan` says, and give the commit, which then holds the release and has the tag.

    Files that the Hub holds already are not sent again. Raises `HashMismatch` where it holds or sends other bytes than
    SHA256SUMS states, `RepoMoved` where somebody committed since the plan, and a `HubError` for all else.
    """
    from huggingface_hub import HfApi

    listing = plan.listing or _create_repo(plan)
    commit = _send(plan, listing) if plan.changed else listing.commit
    _read_back(plan, commit, progress)
    if not plan.is_tagged:
        with hub_errors(f"{plan.repo}: tag {plan.tag}"):
            HfApi().create_tag(plan.repo, tag=plan.tag, revision=commit)
    return commit


def _create_repo(plan: PushPlan) -> Listing:
    from huggingface_hub import HfApi

    with hub_errors(plan.repo):
        HfApi().create_repo(plan.repo, private=plan.is_private)
    say(f"{plan.repo}: created")
    return ask_for_files(plan.repo)


def _send(plan: PushPlan, listing: Listing) -> str:
    """Send large files one by one, so that an interrupted push goes on where it was; then all files in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if not sys.stderr.isatty():
        hide_progress()
    api, release, additions = HfApi(), plan.release, []
    for i, name in enumerate(plan.changed, start=1):
        addition = CommitOperationAdd(name, release.folder / name)
        addition.upload_info.sha256 = bytes.fromhex(release.hashes[name])  # or the client reads the whole file for it
        say(f"send {i} of {len(plan.changed)}: {name}, {format_size(release.size_bytes(name))}")
        with hub_errors(f"{plan.repo}: {name}"):
            api.preupload_lfs_files(plan.repo, [addition])
        additions.append(addition)
    with hub_errors(plan.repo):
        message = f"{release.report.model}: {plan.tag}"
        made = api.create_commit(plan.repo, additions, commit_message=message, parent_commit=listing.commit)
    say(f"commit {made.oid}")
    return str(made.oid)


def _read_back(plan: PushPlan, commit: str, progress: Progress) -> None:
    """Raise `HashMismatch` unless the Hub states, and sends, every file of the release as it is here."""
    release, at = plan.release, f"{plan.repo}@{commit[:12]}"
    for name, fault in _stated_faults(plan, commit).items():
        raise HashMismatch(f"{at}: the Hub states of {name}: {fault}. Nothing was tagged. Push again.")
    n_bytes = sum(map(release.size_bytes, release.hashes))
    with progress("read back", n_bytes) as advance:
        for name, sha256 in release.hashes.items():
            sent = hashlib.sha256()
            with hub_errors(f"{at}: {name}"):
                for chunk in receive(plan.repo, commit, name, release.size_bytes(name)):
                    sent.update(chunk)
                    advance(len(chunk))
            if sent.hexdigest() != sha256:
                raise HashMismatch(
                    f"{at}: the Hub sends {name} with the SHA-256 {sent.hexdigest()} instead of {sha256}. Nothing was "
                    "tagged. Push again; where that stays, delete the file on the Hub with its LFS object first."
                )
    say(f"read back: {len(release.hashes)} files, {format_size(n_bytes)}, each with the SHA-256 of its file here")


def _stated_faults(plan: PushPlan, commit: str) -> dict[str, str]:
    """How the Hub's hashes differ from those of the files here, by name."""
    from huggingface_hub import HfApi

    with hub_errors(plan.repo):
        compared = HfApi().verify_repo_checksums(plan.repo, revision=commit, local_dir=plan.release.folder)
    faults = dict.fromkeys(compared.extra_paths, "no such file")
    for one in compared.mismatches:
        faults[one["path"]] = f"{one['algorithm']} {one['expected']} instead of {one['actual']}"
    return {name: faults[name] for name in plan.release.hashes if name in faults}
