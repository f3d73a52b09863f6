"""Writes entries of models.lock, and compares them with the commit and files that the Hub states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from f2gguf.quantize.source.fetch import differing, find_entry, needed_files, require_as_locked
from f2gguf.quantize.source.lock import Entry, Lock, path_to_write, read_lock
from f2gguf.runtime.errors import OutputError, WrongUsage
from f2gguf.runtime.files import format_size, writing
from f2gguf.runtime.hub.listing import Listing, RemoteFile, ask_for_files, hub_errors


@dataclass(frozen=True)
class PinTarget:
    """A model to lock: its entry (None for a new one), and the revision that is asked for."""

    name: str
    repo: str
    revision: str
    entry: Entry | None


def find_targets(models: Iterable[str], lock: Lock) -> list[PinTarget]:
    """The models that `quantize lock` was asked for; without any, every entry that is fetched from the Hub.

    org/name finds the entry of that repository. Raises `WrongUsage` for what is not on the Hub, and for a new entry
    whose name is taken.
    """
    fetched = [entry.name for entry in lock.entries.values() if entry.repo and not entry.package]
    return [_target(model, lock) for model in list(models) or fetched]


def _target(model: str, lock: Lock) -> PinTarget:
    named = {name.lower(): entry for name, entry in lock.entries.items()}
    entry = named.get(model.lower()) or find_entry(model, lock)[0]
    known = named.get(entry.name.lower())
    if known and entry.repo and known.repo != entry.repo:
        raise WrongUsage(f"{lock.path}: its {known.name} is another model. Write an entry for {entry.repo} by hand.")
    if not entry.repo or (known and known.package):
        raise WrongUsage(f"{model}: comes from an installed package or a folder: there is nothing to lock.")
    return PinTarget(known.name if known else entry.name, entry.repo, entry.revision or "main", known)


def lock_model(target: PinTarget, path: Path | None = None) -> str:
    """Write a model's commit, and its files' sizes and hashes, into a lock; gives a line that says so.

    Without `path` that is the models.lock of the current folder, or of the checkout.
    """
    listing = ask_for_files(target.repo, target.revision)
    files = needed_files(listing)
    if target.entry and target.entry.revision == listing.commit:
        require_as_locked(replace(target.entry, files={**files, **target.entry.files}), listing)
    facts = {} if target.entry else _card_facts(listing)
    write_entry(path or path_to_write(), target.name, {"repo": target.repo, "revision": listing.commit, **facts}, files)
    size = format_size(sum(file.size_bytes for file in files.values()))
    return f"{target.name}: {listing.repo}@{listing.commit}, {len(files)} files, {size}"


def check_model(target: PinTarget) -> str:
    """A line that says what changed on the Hub since a model was locked.

    Raises `HashMismatch` where the Hub states other files for the locked commit, `RepoMissing` where repository or
    commit are gone, `RepoRenamed`.
    """
    entry = target.entry
    if entry is None:
        raise WrongUsage(f"{target.repo}: is not in the lock. Add it: quantize lock {target.repo}")
    head = ask_for_files(target.repo)
    if not entry.files:
        return f"{entry.name}: is not locked; main is at {head.commit}. Run: quantize lock {entry.name}"
    require_as_locked(entry, ask_for_files(target.repo, str(entry.revision)))
    if head.commit == entry.revision:
        return f"{entry.name}: as locked, which is the head of main"
    names = ", ".join(differing(entry, head)) or "no file that is needed"
    return f"{entry.name}: as locked; main has moved to {head.commit}, and changed {names}"


def _card_facts(listing: Listing) -> dict[str, Any]:
    """Licence and languages, as the front matter of the model's card states them."""
    from huggingface_hub import HfApi, constants

    with hub_errors(str(listing)):
        timeout_s = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(listing.repo, revision=listing.commit, timeout=timeout_s)
    card = vars(info.card_data) if info.card_data else {}
    licences, languages = (_texts(card.get(key)) for key in ("license", "language"))
    facts = {"license": licences and licences[0], "languages": languages}
    return {key: value for key, value in facts.items() if value}


def _texts(value: object) -> list[str]:
    """A text or a list of texts as a list; empty for anything else."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(text and isinstance(text, str) for text in texts) else []


def write_entry(path: Path, name: str, values: Mapping[str, Any], files: Mapping[str, RemoteFile]) -> None:
    """Set `values` and `files` of one entry, a new one where there is none; all else stays, comments and order too."""
    import tomlkit

    document: Any = tomlkit.parse(path.read_bytes().decode())
    entry = document["models"].setdefault(name, tomlkit.table())
    after = _cut_tail(entry)
    entry.update(values)
    entry.pop("files", None)
    table: Any = tomlkit.table()
    for file, stated in files.items():
        inline = tomlkit.inline_table()
        inline.update({key: value for key, value in asdict(stated).items() if value is not None})
        table.append(file, inline)
    entry["files"] = table
    for item in after or [tomlkit.nl()]:
        table.add(item)
    try:
        with writing(path) as part:
            part.write_bytes((tomlkit.dumps(document).rstrip() + "\n").encode())
            read_lock(part)
    except OutputError as error:
        raise OutputError(f"{error} Write another lock with --lock.") from error


def _cut_tail(table: Any) -> list[Any]:
    """Take off the comments and empty lines at the end of a table: they belong to what follows it."""
    from tomlkit.items import Table

    body = table.value.body
    if body and isinstance(body[-1][1], Table):
        return _cut_tail(body[-1][1])
    tail: list[Any] = []
    while body and body[-1][0] is None:
        tail.insert(0, body.pop()[1])
    return tail
