"""Where a model's checkpoint is: a folder, an installed package, or the Hub at its pinned revision."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from f2gguf.quantize.checkpoint.folder import NEEDED, NEEDED_PICKLED, is_legal
from f2gguf.quantize.checkpoint.weights import PICKLES
from f2gguf.quantize.source.lock import Entry, Lock, package_folder
from f2gguf.runtime.errors import HashMismatch, UnsupportedCheckpoint, WrongUsage
from f2gguf.runtime.hub.download import cached_folder, download
from f2gguf.runtime.hub.listing import COMMIT, REPO, Listing, RemoteFile, list_files

_SNAPSHOT = re.compile(rf"/models--(?P<repo>[^/]+--[^/]+)/snapshots/(?P<commit>{COMMIT.pattern})$")
_WEIGHTS = (".safetensors", ".bin")
_NAME = re.compile(r"\w[\w.-]*")
_MODEL = re.compile(rf"(?P<repo>{REPO.pattern})(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def find_model(model: str, lock: Lock, *, name: str | None = None) -> tuple[Entry, Path | None]:
    """What `MODEL` on the command line means: its entry, and its folder where that is already on this disk.

    A name in the lock goes first, then an existing folder, then org/name[@revision] on the Hub. `name` is what the
    user calls the model instead. Raises `UnknownName`, `WrongUsage` for a folder whose name is no name of a model, and
    `UnsupportedCheckpoint` for an entry that the lock calls so.
    """
    entry, folder = find_entry(model, lock)
    if name is not None:
        entry = replace(entry, name=_valid_name(name))
    elif not entry.name.isprintable() or not entry.name or COMMIT.fullmatch(entry.name):
        raise WrongUsage(
            f"{model}: the folder's name is a commit, is empty, or holds what cannot be printed. Name the model: "
            "--name NAME."
        )
    if entry.unsupported:
        raise UnsupportedCheckpoint(
            f"{entry.name}: f2gguf does not convert it yet: {entry.unsupported}. "
            f"Those of {lock.path} that it converts: {', '.join(lock.convertible)}."
        )
    return entry, folder


def find_entry(model: str, lock: Lock) -> tuple[Entry, Path | None]:
    """`find_model`, also for models that f2gguf does not convert."""
    if model.lower() in map(str.lower, lock.entries):
        entry = lock.entry(model)
        return entry, package_folder(entry) if entry.package else None
    folder = Path(model)
    try:
        is_folder, exists = bool(model) and folder.is_dir(), bool(model) and folder.exists()
    except OSError:  # a name too long for any file system
        is_folder = exists = False
    if is_folder:
        _require_utf8(folder)
        return _of_folder(folder.resolve(), lock), folder
    if exists or folder.is_absolute() or model.startswith("."):
        raise WrongUsage(f"{model}: is no folder. Pass the folder that holds the checkpoint's config.json.")
    match = _MODEL.fullmatch(model)
    if not match:
        return lock.entry(model), None  # raises, and suggests the nearest name
    return _of_repo(match["repo"], match["revision"], lock), None


def _require_utf8(folder: Path) -> None:
    """safetensors and tokenizers open no other path, and neither header nor card could hold the name."""
    try:
        os.fspath(folder.resolve()).encode()
    except UnicodeEncodeError as error:
        raise WrongUsage(f"{folder}: the folder's path is no UTF-8. Rename it.") from error


def _of_folder(folder: Path, lock: Lock) -> Entry:
    """The entry of a folder: its repository's, at that commit, where it is a snapshot in the Hub's cache."""
    if match := _SNAPSHOT.search(folder.as_posix()):
        return _of_repo(match["repo"].replace("--", "/", 1), match["commit"], lock)
    return Entry(name=folder.name)


def _valid_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise WrongUsage(f"--name {name}: is no name of files. Use letters, digits, '.', '-' and '_'.")
    return name


def _of_repo(repo: str, revision: str | None, lock: Lock) -> Entry:
    """The lock's entry of a repository, at its revision or another; a nearly empty one where the lock has none."""
    known = [entry for entry in lock.entries.values() if entry.repo == repo]
    if not known:
        return Entry(name=repo.split("/")[1], repo=repo, revision=revision or "main")
    for entry in known:
        if revision in (None, entry.revision):
            return entry
    # the facts are the model's, but the package and the files' hashes are of the locked revision
    return replace(known[0], revision=revision, package=None, folder=None, install=None, files={})


def fetch(entry: Entry, folder: Path | None = None, *, check: Callable[[Path], object] | None = None) -> Path:
    """The checkpoint folder of a model, downloaded into the Hub's cache where it is not on this disk yet, and verified.

    `check` is called with the folder before its weights are downloaded, and raises why they need not be.

    Raises a `HubError` with the Hub's reason, `OutputError` where the disk is too small, `WrongUsage` for an entry
    without a revision, `UnsupportedCheckpoint` for a repository without weights that f2gguf reads. The Hub is not asked
    for a locked model that the cache holds.
    """
    if folder is not None:
        return folder
    if entry.package or not entry.repo:
        return package_folder(entry)
    if not entry.revision:
        raise WrongUsage(
            f"{entry.name} has no revision in models.lock. Name one, {entry.repo}@<commit>, or lock the head of main: "
            f"quantize lock {entry.name}"
        )
    locked = Listing(entry.repo, entry.revision, entry.files)
    if entry.files and (cached := cached_folder(locked, entry.files)):
        return cached
    listing = list_files(entry.repo, entry.revision)
    if entry.files:
        require_as_locked(entry, listing)
    files = needed_files(listing)
    if check:
        check(download(listing, [name for name in files if not name.endswith(_WEIGHTS)]))
    return download(listing, files)


def fetch_settings(entry: Entry) -> Path:
    """`fetch` of all but the weights of a model on the Hub: the small files that say what its tensors are."""
    if entry.package or not entry.repo:
        return package_folder(entry)
    listing = list_files(entry.repo, entry.revision or "main")
    return download(listing, [name for name in needed_files(listing) if not name.endswith(_WEIGHTS)])


def needed_files(listing: Listing) -> dict[str, RemoteFile]:
    """The files of a repository that f2gguf uses; `UnsupportedCheckpoint` where none of them has weights."""
    files = _used(listing)
    if any(name.endswith(_WEIGHTS) for name in files):
        return files
    pickles = [name for name in listing.files if name.endswith(PICKLES)]
    if pickles:
        raise UnsupportedCheckpoint(
            f"{listing}: has its weights as pickle only ({pickles[0]}), which runs code when it is read; f2gguf reads "
            f"safetensors, and pytorch_model.bin. Look for a revision that has them, such as {listing.repo}@refs/pr/1."
        )
    raise UnsupportedCheckpoint(f"{listing}: has no safetensors weights; f2gguf converts no others.")


def _used(listing: Listing) -> dict[str, RemoteFile]:
    """The needed files; those of pytorch_model.bin too where there are no safetensors, as transformers does."""
    files = {name: file for name, file in listing.files.items() if is_needed(name)}
    if any(name.endswith(".safetensors") for name in files):
        return files
    return files | {name: file for name, file in listing.files.items() if _matches(name, NEEDED_PICKLED)}


def is_needed(name: str) -> bool:
    """Whether a conversion reads this file of a repository, or a release must come with it."""
    return is_legal(name) or _matches(name, NEEDED)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # * stays within a folder, as where `read_checkpoint` looks
    matching = (pattern for pattern in patterns if PurePosixPath(name).match(pattern))
    return any(name.count("/") == pattern.count("/") for pattern in matching)


def require_as_locked(entry: Entry, listing: Listing) -> None:
    """Raise `HashMismatch` where the Hub states another size or hash of a needed file than the lock."""
    names = differing(entry, listing)
    if names:
        name = names[0]
        locked, stated = entry.files.get(name, "absent"), listing.files.get(name, "absent")
        raise HashMismatch(
            f"{entry.name}: {name} is {locked} in models.lock, and {stated} at {listing} on the Hub"
            f"{f' (and {len(names) - 1} more files differ)' if names[1:] else ''}. Compare with `quantize "
            f"lock --check {entry.name}`; to take the Hub's word, remove its files from the lock and lock it again."
        )


def differing(entry: Entry, listing: Listing) -> list[str]:
    """The needed files of which lock and Hub do not state the same."""
    stated = _used(listing)
    return sorted(name for name in {*entry.files, *stated} if entry.files.get(name) != stated.get(name))
