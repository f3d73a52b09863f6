"""Files of a release on the Hub, from its listing, its drift.json and the first bytes of each file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import HubError, InputError, NotGGUF, UnknownName, WrongUsage, parsing
from f2gguf.runtime.gguf.describe import StatedDrift
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.hub.client import receive
from f2gguf.runtime.hub.download import download
from f2gguf.runtime.hub.listing import Listing, hub_errors
from f2gguf.runtime.hub.models import is_model_file, is_part, variant_of

REPORT = "drift.json"
_HEAD_BYTES = 1 << 23  # at first: a vocabulary of 150,000 tokens takes 6 MB
_MOST_BYTES = 1 << 27


def is_release(listing: Listing) -> bool:
    """Whether a repository holds .gguf models and no checkpoint."""
    has_weights = any(name.endswith((".safetensors", "pytorch_model.bin")) for name in listing.files)
    return not has_weights and any(map(is_model_file, listing.files))


def drift_of_release(listing: Listing) -> dict[str, StatedDrift]:
    """File -> the drift that the repository's drift.json states; empty where it has none."""
    if REPORT not in listing.files:
        return {}
    content = (download(listing, [REPORT]) / REPORT).read_bytes()
    with parsing(f"{listing}, {REPORT}", InputError, "Tell its owner."):
        report = json.loads(content)
        variants = {name: it for name, it in report["variants"].items() if name in report["files"]}
        return {str(report["files"][name]["file"]): _stated(verdict) for name, verdict in variants.items()}


def _stated(verdict: dict[str, Any]) -> StatedDrift:
    mean, upper, bound = (float(verdict[key]) for key in ("mean", "upper", "max_drift"))
    return StatedDrift(mean, upper, bound, bool(verdict["holds"]), len(verdict["drifts"]))


def fetch_heads(listing: Listing, variants: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and skeleton of each file of `variants`, and of the bases, whose first bytes alone are downloaded.

    Raises `WrongUsage` where all of them are split, and `UnknownName` where there are none.
    """
    wanted = {*variants, "F16", "BF16", "F32"}
    names = [name for name in listing.files if is_model_file(name) and variant_of(name) in wanted]
    whole = [name for name in names if not is_part(name)]
    if names and not whole:
        raise WrongUsage(
            f"{listing}: its files are split ({names[0]}), which f2gguf does not read. Download the parts of one and "
            "join them: `llama-gguf-split --merge FIRST-PART NEW.gguf`."
        )
    if not whole:
        there = sorted(filter(None, {variant_of(name) for name in listing.files if is_model_file(name)}))
        raise UnknownName(f"variant of {listing}", ", ".join(variants), there)
    for name in whole:
        path = folder / name.replace("/", "-")
        _fetch_head(listing, name, path)
        yield name, path


def _fetch_head(listing: Listing, name: str, path: Path) -> None:
    """Write as many bytes of a file as its header takes, and a hole for the rest."""
    n_bytes, total = _HEAD_BYTES, listing.files[name].size_bytes
    while True:
        path.write_bytes(_first_bytes(listing, name, min(n_bytes, total)))
        with path.open("rb+") as file:
            file.truncate(total)
        try:
            header = read_header(path)
        except NotGGUF:
            if n_bytes >= min(total, _MOST_BYTES):
                raise
        else:
            if header.end <= n_bytes:
                return
        n_bytes *= 4


def _first_bytes(listing: Listing, name: str, n_bytes: int) -> bytes:
    data = bytearray()
    receiving = receive(listing.repo, listing.commit, name, listing.files[name].size_bytes)
    with hub_errors(f"{listing}: {name}"), closing(receiving) as chunks:
        for chunk in chunks:
            data += chunk
            if len(data) >= n_bytes:
                return bytes(data[:n_bytes])
    raise HubError(f"{listing}: {name}: the Hub sends {len(data):,} of {n_bytes:,} bytes. Try again.")
