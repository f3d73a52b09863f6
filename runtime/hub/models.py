"""The model that `-m` and `Embedder` name: a .gguf file here, or one of a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.runtime import errors
from f2gguf.runtime.files import sha256_file
from f2gguf.runtime.gguf.header import PART, Header, read_header
from f2gguf.runtime.hub.download import cached_folder, download, files_of_others
from f2gguf.runtime.hub.listing import REPO, Listing, list_files, recorded_files

_BASES = ("F16", "BF16", "F32")  # which variants are made from
USUAL = ("Q4_K_M", "Q8_0", "Q4_0", *_BASES)  # the first of them that holds its bound is recommended
# In a repository without drift.json, precision goes before size: plain 4-bit files drifted by up to 0.3
_UNMEASURED = ("Q8_0", "F16", "BF16", "F32", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
_HUB_FILE = re.compile(rf"(?P<repo>{REPO.pattern})(?::(?P<variant>[^:@]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_WHOLE = re.compile(r"-00001-of-00001(?=\.gguf$)", re.IGNORECASE)  # so llama-gguf-split names what is not split
# What lies beside models and is none, as llama.cpp's tools and their users name it: vision and audio projectors,
# importance matrices, adapters, bare vocabularies, and models that only guess ahead for another
_COMPANION = re.compile(
    r"(?:^|[-._/])(?:mmproj|imatrix)(?=[-._])|(?:^|/)(?:lora|adapter|ggml-vocab|draft|mtp|eagle3)[-._]"
    r"|[-._](?:lora|adapter|vocab|draft|mtp|eagle3)\.gguf$",
    re.IGNORECASE,
)
_VARIANT = re.compile(r"(?:^|[-./])((?:I?Q|TQ)\d\w*|BF16|F16|F32)\.gguf$", re.IGNORECASE)
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)\n?")  # a line of sha256sum


@dataclass(frozen=True)
class _Report:
    """The part of a repository's drift.json that is used here."""

    files: dict[str, dict[str, Any]]
    variants: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: `variant` is how its name ends, or its whole name; None asks for the recommended one."""

    repo: str
    variant: str | None = None
    revision: str = "main"


def parse_model(text: str) -> HubFile | None:
    """`org/name[:VARIANT][@revision]`; None for anything else, such as what ends in .gguf before the colon."""
    match = _HUB_FILE.fullmatch(text)
    if not match or match["repo"].lower().endswith(".gguf"):
        return None
    return HubFile(match["repo"], match["variant"], match["revision"] or "main")


def open_header(model: str | Path) -> Header:
    """The header of `model`: a path, or where no file has that path, the name of a file on the Hub.

    A `Path` is always a path. Warns of a file from the Hub that is over its bound, or was never measured. Raises
    `NotGGUF`, `UnknownName`, `WrongUsage`, and what downloads raise.
    """
    file = _named_on_hub(model)
    if file is None:
        return read_header(model)
    try:
        header = read_header(_locate(file))
    except (errors.RepoMissing, errors.HubUnreachable) as error:
        raise type(error)(f"{model}: no such file here, and on the Hub: {error}") from error
    _warn_unless_good(header, str(model))
    return header


def name_elsewhere(model: str | Path, path: Path) -> str:
    """What opens the file that `open_header` found at `path` from another folder, process or machine.

    'org/name:FILE@commit' for one of the Hub, so that all processes have the same file; else its absolute path.
    """
    file = _named_on_hub(model)
    if file is None:
        return str(path.absolute())
    commit, _, name = path.as_posix().rpartition("/snapshots/")[2].partition("/")  # as the Hub's cache names it
    return f"{file.repo}:{name}@{commit}"


def find_file(file: HubFile) -> tuple[Listing, str]:
    """The repository as the Hub has it now, or had it when it was last in reach, and the name of the file.

    A Hub that cannot be reached, and was never asked, is stood in for by what another tool left in its cache.
    """
    try:
        listing = list_files(file.repo, file.revision)
    except errors.HubUnreachable as error:
        return _of_others(file, error)
    return listing, _choose(listing, file.variant)


def fetch_file(listing: Listing, name: str) -> Path:
    """The file in the Hub's cache, with the hash that the Hub states and SHA256SUMS, where there is one, repeats.

    Raises `HashMismatch` where the two differ, before the download where the Hub states a SHA-256.
    """
    digest = listing.files[name].sha256 or sha256_file(download(listing, [name]) / name)
    if (stated := _sums(listing).get(name, digest)) != digest:
        raise errors.HashMismatch(
            f"{listing}: {name} has the SHA-256 {digest}, and the repository's SHA256SUMS states {stated}: one of "
            "them was not uploaded as it was made. Tell its owner, or name an earlier revision: org/name@revision."
        )
    return download(listing, [name]) / name


def first_usual(holding: Iterable[str], there: Container[str]) -> str:
    """The variant to recommend: the first usual one that is there and holds its bound, else their base."""
    good = {*holding, *_BASES}
    return next((name for name in USUAL if name in good and name in there), "F16")


def matching(listing: Listing, variant: str | None) -> list[str]:
    """The model files that a variant names: one, or none, or several that end alike.

    `quantize all` calls them NAME-VARIANT.gguf, others also name.VARIANT.gguf.
    """
    names = [name for name in listing.files if is_model_file(name)]
    if variant is None:
        return _recommended(listing, names)
    if variant in listing.files and variant.lower().endswith(".gguf"):
        return [variant]
    ends = tuple(f"{sign}{variant}.gguf".lower() for sign in "-./")
    return [name for name in names if f"/{PART.sub('', name)}".lower().endswith(ends)]


def is_model_file(name: str) -> bool:
    """Whether a .gguf file may hold a model, by its name. Its header, which may say otherwise, has the last word."""
    return name.lower().endswith(".gguf") and not _COMPANION.search(name)


def is_part(name: str) -> bool:
    """Whether a model was split over several files, and this is one of them."""
    return bool(PART.search(name)) and not _WHOLE.search(name)


def variant_of(name: str) -> str | None:
    """'x/nano-q8_0.gguf' -> 'Q8_0'; None where the name ends in no type of llama.cpp."""
    match = _VARIANT.search(PART.sub("", name))
    return match[1].upper() if match else None


def _named_on_hub(model: str | Path) -> HubFile | None:
    return None if isinstance(model, Path) or os.path.lexists(model) else parse_model(model)


def _locate(file: HubFile) -> Path:
    """The file from the cache, where that holds the file that the Hub named in its last answer; else from the Hub."""
    if known := recorded_files(file.repo, file.revision):
        names = matching(known, file.variant)
        if len(names) == 1 and (folder := cached_folder(known, names)):
            return folder / names[0]
    found = find_file(file)
    try:
        return fetch_file(*found)
    except errors.HubUnreachable as error:
        return fetch_file(*_of_others(file, error))


def _of_others(file: HubFile, error: errors.HubUnreachable) -> tuple[Listing, str]:
    """The file among those that another tool downloaded; `error` where it is not there, with those that are."""
    listing = files_of_others(file.repo, file.revision)
    if listing is None:
        raise error
    if not matching(listing, file.variant):
        there = ", ".join(name for name in listing.files if is_model_file(name)) or "no .gguf file"
        raise errors.HubUnreachable(f"{error} The Hub's cache here holds of {listing}: {there}.") from error
    return listing, _choose(listing, file.variant)


def _choose(listing: Listing, variant: str | None) -> str:
    """The one whole file that `variant` names, or an error that says which there are."""
    known = list(dict.fromkeys(variant_of(name) or name for name in listing.files if is_model_file(name)))
    if not known:
        raise errors.NotGGUF(f"{listing}: holds no .gguf model. Make one: quantize all {listing.repo}")
    names = matching(listing, variant)
    if variant and not names:
        raise errors.UnknownName(f"variant of {listing}", variant, known)
    if names and all(map(is_part, names)):
        raise errors.NotGGUF(
            f"{listing}: {names[0]} is one part of a split model, which f2gguf does not read. Join the parts with "
            f"`llama-gguf-split --merge`, or name another variant of: {', '.join(known)}."
        )
    if len(names) != 1:
        raise errors.WrongUsage(
            f"{listing}: which of {', '.join(names or known)}? Name one: {listing.repo}:VARIANT, or {listing.repo}:FILE"
        )
    return names[0]


def _recommended(listing: Listing, names: Sequence[str]) -> list[str]:
    """The file that drift.json recommends, as `quantize all` writes it; without one, by the order of _UNMEASURED."""
    if "drift.json" in listing.files:
        holding, files = _read_report(listing)
        there = {variant: name for variant, name in files.items() if name in listing.files}
        best = there.get(first_usual(holding, there))
        return [best] if best else list(names)
    whole = [name for name in names if not is_part(name)]
    of_variants = ([name for name in whole if variant_of(name) == variant] for variant in _UNMEASURED)
    return next(filter(None, of_variants), whole or list(names))


def _read_report(listing: Listing) -> tuple[list[str], dict[str, str]]:
    """The variants that hold their bound, and the file of each, by the repository's drift.json."""
    from pydantic import TypeAdapter

    content = (download(listing, ["drift.json"]) / "drift.json").read_bytes()
    with errors.parsing(f"{listing}: drift.json", errors.HubError, f"Name a variant: {listing.repo}:Q8_0."):
        report = TypeAdapter(_Report).validate_json(content)
        holding = [variant for variant, verdict in report.variants.items() if verdict["holds"]]
        return holding, {variant: str(file["file"]) for variant, file in report.files.items()}


def _sums(listing: Listing) -> dict[str, str]:
    if "SHA256SUMS" not in listing.files:
        return {}
    with (download(listing, ["SHA256SUMS"]) / "SHA256SUMS").open(encoding="utf-8", errors="replace") as lines:
        return {match[2]: match[1].lower() for match in map(_SUM.fullmatch, lines) if match}


def _warn_unless_good(header: Header, model: str) -> None:
    from f2gguf.runtime.gguf.describe import describe_drift, drift_of, is_reference

    drift = drift_of(header)
    if not (drift.holds if drift else is_reference(header)):
        warnings.warn(f"{model}: drift: {describe_drift(header)}", errors.DriftWarning, stacklevel=3)
