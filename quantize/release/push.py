"""A release goes to the Hub: sent in one commit, read back, and only then tagged."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator

from f2gguf.quantize.release.plan import Plan
from f2gguf.runtime.console import Progress, say
from f2gguf.runtime.errors import HashMismatch
from f2gguf.runtime.files import format_size
from f2gguf.runtime.hub.listing import Listing, ask_for_files, hub_errors

_N_RETRIES = 5  # of a connection that brings nothing
_CHUNK_BYTES = 1 << 20


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


def _create_repo(plan: Plan) -> Listing:
    from huggingface_hub import HfApi

    with hub_errors(plan.repo):
        HfApi().create_repo(plan.repo, private=plan.is_private)
    say(f"{plan.repo}: created")
    return ask_for_files(plan.repo)


def _send(plan: Plan, listing: Listing) -> str:
    """Large files one by one, so that a push that is cut off goes on where it was; then all files in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

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
            raise HashMismatch(f"{listing}: the Hub states of {name}: {fault}. Nothing was tagged. Push again.")
    n_bytes = sum(map(release.size_bytes, release.hashes))
    with progress("read back", n_bytes) as advance:
        for name, sha256 in release.hashes.items():
            found = _sha256_on_hub(listing, name, advance)
            if found != sha256:
                raise HashMismatch(
                    f"{listing}: the Hub sends {name} with the SHA-256 {found} instead of {sha256}. Nothing was "
                    "tagged. Push again; where that stays, delete the file on the Hub with its LFS object first."
                )
    say(f"read back: {len(release.hashes)} files, {format_size(n_bytes)}, each with the SHA-256 of its file here")


def _sha256_on_hub(listing: Listing, name: str, advance: Callable[[int], None]) -> str:
    """The SHA-256 of what the Hub sends of a file; nothing of it is kept."""
    import httpx2

    digest, n_read, n_failed = hashlib.sha256(), 0, 0
    with hub_errors(f"{listing}: {name}"):
        while n_read < listing.files[name].size_bytes:
            try:
                for chunk in _chunks(listing, name, n_read):
                    digest.update(chunk)
                    advance(len(chunk))
                    n_read, n_failed = n_read + len(chunk), 0
                break
            except httpx2.TransportError:
                n_failed += 1
                if n_failed > _N_RETRIES:
                    raise
                time.sleep(n_failed)
    return digest.hexdigest()


def _chunks(listing: Listing, name: str, start: int) -> Iterator[bytes]:
    """What the Hub sends of a file from byte `start` on."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

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

    if not plan.is_tagged:
        with hub_errors(f"{plan.repo}: tag {plan.tag}"):
            HfApi().create_tag(plan.repo, tag=plan.tag, revision=commit)
