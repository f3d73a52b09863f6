"""Where a model's checkpoint is: a folder, an installed package, or the Hub at its pinned revision."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from f2gguf.quantize.checkpoint import NEEDED
from f2gguf.quantize.lock import Entry, Lock, package_folder
from f2gguf.runtime.errors import DownloadFailed, UnsupportedCheckpoint, WrongUsage
from f2gguf.runtime.files import require_free_space

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
    """The checkpoint folder of a model, downloaded into the Hub's cache where it is not on this disk yet.

    Raises `DownloadFailed` with the Hub's reason, `OutputError` where the disk is too small, `WrongUsage` for an entry
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
    return _download(entry.repo, entry.revision)


def _download(repo: str, revision: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(NEEDED),
        "ignore_patterns": ["*/*.safetensors"],  # the client's * crosses folders, read_checkpoint's does not
    }
    try:
        try:
            planned = snapshot_download(repo, **wanted, dry_run=True)
        except DryRunError:  # the Hub gave no list of files; its cache may hold them all the same
            with contextlib.suppress(LocalEntryNotFoundError):
                return Path(snapshot_download(repo, **wanted, local_files_only=True))
            raise
        if not any(file.filename.endswith(".safetensors") for file in planned):
            raise UnsupportedCheckpoint(f"{repo}@{revision}: has no safetensors weights; f2gguf converts no others.")
        missing_bytes = sum(file.file_size or 0 for file in planned if file.will_download)
        require_free_space(Path(constants.HF_HUB_CACHE), missing_bytes, f"downloading {repo}", choose_with="HF_HOME")
        return Path(snapshot_download(repo, **wanted))
    except (HTTPError, OSError, ValueError) as error:
        raise DownloadFailed(f"{repo}@{revision}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The Hub's own words on one line; the client keeps them in the cause of what it raises."""
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, LocalEntryNotFoundError

    is_wrapped = isinstance(error, (DryRunError, LocalEntryNotFoundError))
    if is_wrapped and not isinstance(error.__cause__, HfHubHTTPError):
        return (
            "the Hub cannot be reached, and its cache lacks the model. Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, or pass a checkpoint folder."
        )
    words = str(error.__cause__ if is_wrapped else error).split()
    return " ".join(words) or type(error).__name__
