"""Where a model's checkpoint is: a folder, an installed package, or the Hub at its pinned revision."""

from __future__ import annotations

import re
from pathlib import Path

from f2gguf.quantize.checkpoint import NEEDED
from f2gguf.quantize.lock import Entry, Lock, package_folder
from f2gguf.runtime.errors import DownloadFailed, WrongUsage
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
    if folder.is_dir():
        return Entry(name=folder.resolve().name), folder
    match = _REPO.fullmatch(model)
    if not match or model.startswith("."):
        return lock.entry(model), None  # raises, and suggests the nearest name
    repo, revision = match["repo"], match["revision"]
    known = next((entry for entry in lock.entries.values() if entry.repo == repo), None)
    if known and revision in (None, known.revision):
        return known, None
    return Entry(name=repo.split("/")[1], repo=repo, revision=revision or "main"), None


def fetch(entry: Entry, folder: Path | None = None) -> Path:
    """The checkpoint folder of a model, downloaded into the Hub's cache where it is not on this disk yet.

    Raises `DownloadFailed` with the Hub's reason, `OutputError` where the disk is too small, `WrongUsage` for an entry
    without a revision.
    """
    if folder is not None:
        return folder
    if entry.package:
        return package_folder(entry)
    if not entry.revision:
        raise WrongUsage(
            f"{entry.name} has no revision in models.lock. Name one: {entry.repo}@<commit>, or add it to the lock."
        )
    return _download(str(entry.repo), entry.revision)


def _download(repo: str, revision: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        planned = snapshot_download(repo, revision=revision, allow_patterns=list(NEEDED), dry_run=True)
        missing_bytes = sum(file.file_size or 0 for file in planned if file.will_download)
        require_free_space(Path(constants.HF_HUB_CACHE), missing_bytes, f"downloading {repo}")
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(NEEDED)))
    except LocalEntryNotFoundError as error:
        raise DownloadFailed(
            f"{repo}@{revision}: the Hub cannot be reached, and its cache lacks the model. Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, or pass a checkpoint folder."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DownloadFailed(f"{repo}@{revision}: {str(error).splitlines()[0]}") from error
