"""Where a model's checkpoint is: a folder, an installed package, or the Hub at its pinned revision."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from f2gguf.quantize.checkpoint import NEEDED
from f2gguf.quantize.lock import Entry, Lock, package_folder
from f2gguf.runtime.errors import UnsupportedCheckpoint, WrongUsage
from f2gguf.runtime.hub import Listing, download, list_files

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def find_model(model: str, lock: Lock) -> tuple[Entry, Path | None]:
    """What `MODEL` on the command line means: its entry, and its folder where that is already on this disk.

    A name in the lock goes first, then an existing folder, then org/name[@revision] on the Hub. Raises `UnknownName`.
    """
    if model.lower() in {name.lower() for name in lock.entries}:
        entry = lock.entry(model)
        return entry, package_folder(entry) if entry.package else None
    folder = Path(model)
    try:
        is_folder, exists = bool(model) and folder.is_dir(), bool(model) and folder.exists()
    except OSError:  # a name too long for any file system
        is_folder = exists = False
    if is_folder:
        return Entry(name=folder.resolve().name), folder
    if exists or folder.is_absolute() or model.startswith("."):
        raise WrongUsage(f"{model}: is no folder. Pass the folder that holds the checkpoint's config.json.")
    match = _REPO.fullmatch(model)
    if not match:
        return lock.entry(model), None  # raises, and suggests the nearest name
    repo, revision = match["repo"], match["revision"]
    known = next((entry for entry in lock.entries.values() if entry.repo == repo), None)
    if known and revision in (None, known.revision):
        return known, None
    if known and not known.revision:
        return replace(known, revision=revision), None
    return Entry(name=repo.split("/")[1], repo=repo, revision=revision or "main"), None


def fetch(entry: Entry, folder: Path | None = None) -> Path:
    """The checkpoint folder of a model, downloaded into the Hub's cache where it is not on this disk yet, and verified.

    Raises a `HubError` with the Hub's reason, `OutputError` where the disk is too small, `WrongUsage` for an entry
    without a revision, `UnsupportedCheckpoint` for a repository without safetensors.
    """
    if folder is not None:
        return folder
    if entry.package or not entry.repo:
        return package_folder(entry)
    if not entry.revision:
        raise WrongUsage(
            f"{entry.name} has no revision in models.lock. Name one: {entry.repo}@<commit>, or add it to the lock."
        )
    listing = list_files(entry.repo, entry.revision)
    return download(listing, needed_files(listing))


def needed_files(listing: Listing) -> list[str]:
    """What a conversion reads of a repository; raises `UnsupportedCheckpoint` where there are no safetensors."""
    names = [name for name in listing.files if any(is_match(name, pattern) for pattern in NEEDED)]
    if not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedCheckpoint(f"{listing}: has no safetensors weights; f2gguf converts no others.")
    return names


def is_match(name: str, pattern: str) -> bool:
    """Whether a path is what `read_checkpoint` would find by `pattern`: * stays within a folder."""
    return name.count("/") == pattern.count("/") and PurePosixPath(name).match(pattern)
