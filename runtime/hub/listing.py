"""What a repository on the Hugging Face Hub holds, asked through the Hub's own client, and the client's errors."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2gguf.runtime import errors
from f2gguf.runtime.files import recall, remember, sha256_file

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.hf_api import RepoSibling

COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = r"\w+(?:[.-]\w+)*"  # as the Hub allows it; no path such as ./x or ~/x/y
REPO = re.compile(f"{_NAME}/{_NAME}", re.ASCII)


@dataclass(frozen=True)
class RemoteFile:
    """The size and one hash of a file, as the Hub or a lock states them."""

    size_bytes: int
    sha256: str | None = None  # of a file in LFS or Xet storage
    blob_id: str | None = None  # git's, of any other

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes with {'SHA-256' if self.sha256 else 'git blob'} {self.sha256 or self.blob_id}"

    def fault(self, path: Path) -> str | None:
        """How the file at `path` differs from this; None where it does not."""
        if path.stat().st_size != self.size_bytes:
            return f"{path.stat().st_size} bytes instead of {self.size_bytes}"
        kind, stated = ("SHA-256", self.sha256) if self.sha256 else ("git blob", self.blob_id)
        actual = sha256_file(path) if self.sha256 else git_blob_id(path)
        return None if actual == stated else f"{kind} {actual} instead of {stated}"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]
    is_private: bool = False  # where the Hub was asked now

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"


def list_files(repo: str, revision: str = "main") -> Listing:
    """What `repo` holds at `revision` (a commit, branch or tag).

    The Hub's recorded answer is used for a commit that was asked about before, and while the Hub cannot be reached.

    Raises `RepoMissing`, `RepoGated`, `RepoRenamed`, `RateLimited`, `HubUnreachable` or another `HubError`.
    """
    if COMMIT.fullmatch(revision) and (known := recorded_files(repo, revision)):
        return known
    try:
        return ask_for_files(repo, revision)
    except errors.HubUnreachable:
        if known := recorded_files(repo, revision):
            return known
        raise


def ask_for_files(repo: str, revision: str = "main") -> Listing:
    """`list_files` that always asks the Hub, and records its answer."""
    what = f"{repo}@{revision}"
    with errors.parsing(what, errors.HubError, "The Hub's answer is not one that f2gguf knows. Try again."):
        info = _model_info(what, repo, revision)
        files = {file.rfilename: _remote_file(file) for file in info.siblings or []}
    if info.id != repo:
        raise errors.RepoRenamed(f"{repo}: is called {info.id} now. Use that name.")
    listing = Listing(repo, str(info.sha), files, bool(info.private))
    for name in {revision, listing.commit}:
        remember(_record(repo, name), asdict(listing))
    return listing


def _model_info(what: str, repo: str, revision: str) -> ModelInfo:
    """The Hub's answer about a repository; `ValueError` where the client cannot read it."""
    from huggingface_hub import HfApi, constants

    timeout_s = constants.HF_HUB_ETAG_TIMEOUT  # its default here is to wait for ever
    try:
        with hub_errors(what):
            return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout_s)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error


def _remote_file(file: RepoSibling) -> RemoteFile:
    if file.size is None or leads_out(file.rfilename):
        raise ValueError(f"{file.rfilename} has no size, or its path leads out of the repository")
    return RemoteFile(file.size, sha256=file.lfs.sha256) if file.lfs else RemoteFile(file.size, blob_id=file.blob_id)


def leads_out(name: str) -> bool:
    """Whether a file's path is outside of its repository."""
    return name.startswith("/") or ".." in name.split("/")


def git_blob_id(path: Path) -> str:
    """The name that git gives to the content of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client about `what` into one `HubError` with the next step."""
    import httpx2

    try:
        yield
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _error_of(what, error) from error


def _error_of(what: str, error: Exception) -> errors.F2ggufError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, OSError) and error.errno:  # of this machine: the client's own have no number
        where = error.filename or constants.HF_HUB_CACHE
        return errors.OutputError(
            f"{what}: {where}: {error.strerror}. Free some space, or choose another disk with HF_HOME."
        )
    cause: Any = error  # the client keeps the Hub's answer in the cause of what it raises
    while not isinstance(cause, hub.HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    said = getattr(cause, "server_message", None) or str(cause)  # the Hub's own words, without the client's
    reason = " ".join(said.split()).rstrip(".") or type(cause).__name__
    if isinstance(cause, hub.GatedRepoError):
        url = f"{constants.ENDPOINT}/{what.partition('@')[0]}"
        return errors.RepoGated(f"{what}: is gated. Ask for access at {url}, then set HF_TOKEN to your token.")
    if isinstance(cause, hub.RepositoryNotFoundError):
        return errors.RepoMissing(f"{what}: repository not found. Check its name; for a private one set HF_TOKEN.")
    if isinstance(cause, hub.RevisionNotFoundError):
        return errors.RepoMissing(f"{what}: revision not found in this repository.")
    if not isinstance(cause, hub.HfHubHTTPError):
        check = "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and run the same command again"
        return errors.HubUnreachable(f"{what}: the Hub cannot be reached ({reason}). {check}: it goes on from here.")
    status = cause.response.status_code
    if status == 429:
        wait_s = cause.response.headers.get("Retry-After", "")
        when = f"in {wait_s} s" if wait_s.isdigit() else "later"
        advice = f"Try again {when}: it goes on from here. The Hub answers more requests where HF_TOKEN is set."
        return errors.RateLimited(f"{what}: too many requests for the Hub. {advice}")
    if status == 412:
        return errors.RepoMoved(
            f"{what}: has moved since: somebody committed. Run it again: it sends only what is missing."
        )
    if status in (401, 403):
        return errors.HubError(f"{what}: the Hub refuses it ({status}): {reason}. Check the rights of HF_TOKEN.")
    return errors.HubError(f"{what}: the Hub answers {status}: {reason}. Try again: it goes on from here.")


def _record(repo: str, revision: str) -> str:
    return f"hub/{repo.replace('/', '--')}/{revision.replace('/', '--')}"


def recorded_files(repo: str, revision: str = "main") -> Listing | None:
    """The Hub's last answer about `revision`; None where it was never asked."""
    try:
        content = recall(_record(repo, revision))
        files = {name: RemoteFile(**file) for name, file in content["files"].items()}
        return Listing(content["repo"], content["commit"], files)
    except (TypeError, KeyError):  # not asked yet, or by another version: ask
        return None
