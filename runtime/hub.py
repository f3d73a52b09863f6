"""The Hugging Face Hub through its own client: what a repository holds, files verified, errors in words."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import (
    HashMismatch,
    HubError,
    HubUnreachable,
    RateLimited,
    RepoGated,
    RepoMissing,
    RepoRenamed,
    parsing,
)
from f2gguf.runtime.files import cache_folder, require_free_space, sha256_file, write_text

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
_N_AT_ONCE = 4  # downloads


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub, or a lock, states of a file: its size, and one hash."""

    size_bytes: int
    sha256: str | None = None  # of a file in LFS or Xet storage
    blob_id: str | None = None  # git's, of any other

    def fault(self, path: Path) -> str | None:
        """How the file at `path` differs; None where it is the one."""
        if path.stat().st_size != self.size_bytes:
            return f"{path.stat().st_size} bytes instead of {self.size_bytes}"
        found = sha256_file(path) if self.sha256 else git_blob_id(path)
        wanted = self.sha256 or self.blob_id
        return None if found == wanted else f"{'SHA-256' if self.sha256 else 'git blob'} {found} instead of {wanted}"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    def path(self, name: str) -> Path | None:
        """Where the Hub's cache holds a file, whatever its content; None where it does not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None


def list_files(repo: str, revision: str = "main") -> Listing:
    """What `repo` holds at `revision` (a commit, branch or tag), from the Hub; a commit that was asked about before,
    and any revision while the Hub is out of reach, from what it said then.

    Raises `RepoMissing`, `RepoGated`, `RepoRenamed`, `RateLimited`, `HubUnreachable` or another `HubError`.
    """
    if COMMIT.fullmatch(revision) and (known := _recorded(repo, revision)):
        return known
    try:
        return ask_for_files(repo, revision)
    except HubUnreachable:
        if known := _recorded(repo, revision):
            return known
        raise


def ask_for_files(repo: str, revision: str = "main") -> Listing:
    """`list_files` that always asks the Hub, and records its answer."""
    from huggingface_hub import HfApi

    with hub_errors(f"{repo}@{revision}"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    if info.id != repo:
        raise RepoRenamed(f"{repo}: is called {info.id} now. Use that name.")
    with parsing(f"{repo}@{revision}", HubError, "The Hub's answer is not one that f2gguf knows. Try again."):
        files = {
            file.rfilename: RemoteFile(int(file.size), sha256=file.lfs.sha256)  # type: ignore[arg-type]
            if file.lfs
            else RemoteFile(int(file.size), blob_id=file.blob_id)  # type: ignore[arg-type]
            for file in info.siblings or []
        }
        listing = Listing(repo, str(info.sha), files)
    for name in {revision, listing.commit}:
        write_text(_record_path(repo, name), json.dumps(asdict(listing)))
    return listing


def recorded_files(repo: str, revision: str = "main") -> Listing | None:
    """What the Hub said when it was asked last, without asking; None where it never was."""
    return _recorded(repo, revision)


def download(listing: Listing, names: Iterable[str]) -> Path:
    """The folder of the Hub's cache that holds `names` of `listing`, each with the size and hash that it states.

    Only what is missing or differs is fetched. Raises `HashMismatch` where the Hub sends other bytes twice,
    `OutputError` before a disk that is too small, and the errors of `list_files`.
    """
    names = list(names)
    missing = [name for name in names if not _is_sound(listing, name)]
    if missing:
        from huggingface_hub import constants

        needed = sum(listing.files[name].size_bytes for name in missing)
        cache = Path(constants.HF_HUB_CACHE)
        require_free_space(cache, needed, f"downloading {listing.repo}", choose_with="HF_HOME")
        with ThreadPoolExecutor(_N_AT_ONCE) as pool:
            list(pool.map(lambda name: _download(listing, name), missing))
    path = listing.path(names[0])
    assert path is not None  # it is there, and sound
    return path.parents[names[0].count("/")]


def _download(listing: Listing, name: str) -> None:
    from huggingface_hub import hf_hub_download

    wanted = listing.files[name]
    for _ in range(2):
        with hub_errors(f"{listing}: {name}"):
            path = Path(hf_hub_download(listing.repo, name, revision=listing.commit))
        fault = wanted.fault(path)
        if fault is None:
            return
        _remove(path)
    raise HashMismatch(f"{listing}: the Hub sends {name} with {fault}, twice. Nothing of it was kept.")


def _is_sound(listing: Listing, name: str) -> bool:
    """Whether the cache holds the file with the right bytes; one with others is removed."""
    path = listing.path(name)
    if path is None:
        return False
    if listing.files[name].fault(path) is None:
        return True
    _remove(path)
    return False


def _remove(path: Path) -> None:
    """Remove a file of the Hub's cache, and the blob that it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def git_blob_id(path: Path) -> str:
    """The name that git gives to the content of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises on `what` into one `HubError` that says what to do."""
    from huggingface_hub import errors as hub

    try:
        yield
    except (hub.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]
        raise _in_words(what, error) from error


def _in_words(what: str, error: Exception) -> HubError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    cause: Any = error  # the client keeps the Hub's answer in the cause of what it raises
    while not isinstance(cause, hub.HfHubHTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(cause, hub.GatedRepoError):
        url = f"{constants.ENDPOINT}/{what.partition('@')[0]}"
        return RepoGated(f"{what}: is gated. Ask for access at {url}, then set HF_TOKEN to your token.")
    if isinstance(cause, hub.RepositoryNotFoundError):
        return RepoMissing(f"{what}: repository not found. Check its name; for a private one set HF_TOKEN.")
    if isinstance(cause, hub.RevisionNotFoundError):
        return RepoMissing(f"{what}: revision not found in this repository.")
    if not isinstance(cause, hub.HfHubHTTPError):
        return HubUnreachable(
            f"{what}: the Hub cannot be reached, and its cache lacks this ({reason}). Check the network, HF_ENDPOINT "
            "and HF_HUB_OFFLINE, or pass a checkpoint folder."
        )
    status = cause.response.status_code
    if status == 429:
        wait = cause.response.headers.get("Retry-After")
        return RateLimited(
            f"{what}: too many requests for the Hub. Try again {f'in {wait} s' if wait else 'later'}; it gives more to "
            "those who set HF_TOKEN. What was fetched is kept."
        )
    if status in (401, 403):
        return HubError(f"{what}: the Hub refuses it ({status}): {reason}. Check the rights of HF_TOKEN.")
    return HubError(f"{what}: the Hub answers {status}: {reason}. Try again: what was done is kept.")


def _record_path(repo: str, revision: str) -> Path:
    return cache_folder() / "hub" / repo.replace("/", "--") / f"{revision.replace('/', '--')}.json"


def _recorded(repo: str, revision: str) -> Listing | None:
    """What the Hub said of `revision` when it was asked last."""
    try:
        content = json.loads(_record_path(repo, revision).read_text(encoding="utf-8"))
        files = {name: RemoteFile(**file) for name, file in content["files"].items()}
        return Listing(content["repo"], content["commit"], files)
    except (OSError, ValueError, TypeError, KeyError):  # not asked yet, or by another version: ask
        return None
