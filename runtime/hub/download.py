"""Files of a repository in the Hub's own cache: verified, and fetched only where one is missing or differs."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from f2gguf.runtime.console import progress
from f2gguf.runtime.errors import HashMismatch
from f2gguf.runtime.files import open_locked, require_free_space
from f2gguf.runtime.hub.client import receive
from f2gguf.runtime.hub.listing import COMMIT, Listing, RemoteFile, hub_errors

_N_AT_ONCE = 4  # downloads


def cached_folder(listing: Listing, names: Iterable[str]) -> Path | None:
    """The folder of the Hub's cache that holds `names`, each with the size and hash that `listing` states.

    None where one is missing; one that differs is removed.
    """
    return None if _missing(listing, names) else _snapshot(listing)


def files_of_others(repo: str, revision: str = "main") -> Listing | None:
    """What another tool (`hf download`, llama.cpp, transformers) left of `revision` in the Hub's cache, if anything.

    The name of a blob is the hash of its content, so that `cached_folder` can verify it. A file that is no link to a
    blob is left out.
    """
    refs, snapshots = (_repo_folder(repo) / name for name in ("refs", "snapshots"))
    try:
        commit = revision if COMMIT.fullmatch(revision) else (refs / revision).read_text().strip()
    except (OSError, ValueError):
        return None
    found = (snapshots / commit).rglob("*") if COMMIT.fullmatch(commit) else ()
    blobs = {path.relative_to(snapshots / commit).as_posix(): _blob(path) for path in found if path.is_symlink()}
    files = {name: blob for name, blob in blobs.items() if blob}
    return Listing(repo, commit, files) if files else None


def _blob(link: Path) -> RemoteFile | None:
    """The size and hash of the blob that a link of the cache names; None where that is no blob."""
    path = link.resolve()
    if not path.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", path.name):
        return None
    size_bytes, is_sha256 = path.stat().st_size, len(path.name) == 64
    return RemoteFile(size_bytes, sha256=path.name) if is_sha256 else RemoteFile(size_bytes, blob_id=path.name)


def download(listing: Listing, names: Iterable[str]) -> Path:
    """`cached_folder`, after files that are missing or differ were fetched. LFS files go on where a killed run stopped.

    Raises `HashMismatch` where the Hub sends other bytes twice, `OutputError` before a disk that is too small, and the
    errors of `list_files`.
    """
    if missing := _missing(listing, names):
        _download_all(listing, missing)
    return _snapshot(listing)


def _missing(listing: Listing, names: Iterable[str]) -> list[str]:
    """The files that the cache lacks; one with other bytes than stated is removed, and counts as missing."""
    from huggingface_hub import try_to_load_from_cache

    missing = []
    for name in names:
        path = try_to_load_from_cache(listing.repo, name, revision=listing.commit)
        if not isinstance(path, str):
            missing.append(name)
        elif listing.files[name].fault(Path(path)):
            _remove(Path(path))
            missing.append(name)
    return missing


def _remove(path: Path) -> None:
    """Remove a file of the Hub's cache, and the blob that it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _download_all(listing: Listing, names: list[str]) -> None:
    size_bytes = sum(listing.files[name].size_bytes for name in names)
    here = sum(part.stat().st_size for name in names if (part := _part(listing, name)).exists())
    require_free_space(
        _repo_folder(listing.repo), size_bytes - here, f"downloading {listing.repo}", choose_with="HF_HOME"
    )
    with progress(f"download {listing.repo}", size_bytes) as advance:
        bar = _bar_class(advance)
        pool = ThreadPoolExecutor(_N_AT_ONCE)
        try:
            list(pool.map(lambda name: _download(listing, name, bar), names))
        except BaseException as error:  # Ctrl-C does not wait for downloads under way
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise


def _download(listing: Listing, name: str, bar: type) -> None:
    from huggingface_hub import hf_hub_download

    for _ in range(2):
        with hub_errors(f"{listing}: {name}"):
            if listing.files[name].sha256 and not _is_in_xet(listing, name):
                _resume(listing, name, bar)
            path = Path(hf_hub_download(listing.repo, name, revision=listing.commit, tqdm_class=bar))
        if (fault := listing.files[name].fault(path)) is None:
            return
        _remove(path)
    raise HashMismatch(f"{listing}: the Hub sends {name} with {fault}, twice. Nothing of it was kept.")


def _is_in_xet(listing: Listing, name: str) -> bool:
    """Whether the client fetches the file by Xet."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    return get_hf_file_metadata(hf_hub_url(listing.repo, name, revision=listing.commit)).xet_file_data is not None


def _resume(listing: Listing, name: str, bar: type) -> None:
    """Bring an LFS file to where the client looks for it, going on from what an earlier run left of it.

    The client itself begins anew in every process (huggingface_hub 2.4, `_download_to_tmp_and_move`).
    """
    part, size_bytes = _part(listing, name), listing.files[name].size_bytes
    blob = part.with_name(str(listing.files[name].sha256))
    part.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(open_locked(part, os.O_WRONLY | os.O_APPEND | os.O_CREAT, wait=True), "ab") as file:
        if blob.exists():  # by another run, for which this one waited
            part.unlink()
            return
        if file.seek(0, os.SEEK_END) > size_bytes:
            file.truncate(0)
        n_there = file.seek(0, os.SEEK_END)
        with bar(initial=n_there) as shown:
            for chunk in receive(listing.repo, listing.commit, name, size_bytes, start=n_there):
                file.write(chunk)
                shown.update(len(chunk))
        file.flush()
        part.replace(blob)


def _part(listing: Listing, name: str) -> Path:
    """Where the first part of an unfinished LFS file is, beside the cache's other blobs."""
    return _repo_folder(listing.repo) / "blobs" / f"{listing.files[name].sha256}.f2gguf.incomplete"


def _snapshot(listing: Listing) -> Path:
    return _repo_folder(listing.repo) / "snapshots" / listing.commit


def _repo_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _bar_class(advance: Callable[[int], None]) -> type:
    """A class that the client uses as its progress bar, one for each file and thread. All advance the same line."""
    lock = threading.Lock()

    class Bar:
        def __init__(self, *, initial: int = 0, **_: Any) -> None:
            self.update(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n_bytes: int) -> None:
            with lock:
                advance(n_bytes)

        def update_transfer(self, *_: object, **__: object) -> None:
            """Xet calls this for the bytes that it received, and `update` for those that it wrote."""

        set_postfix_str = set_transfer_postfix_str = update_transfer

    return Bar
