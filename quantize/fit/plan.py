"""The files that MODEL means to `f2gguf fit`: those that are there, and those that `quantize all` would make.

Of a file that is not here, or not made yet, there is a skeleton: its header, and holes where its numbers belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from f2gguf.quantize.convert.reserved import VERDICT
from f2gguf.quantize.convert.write import write_skeleton
from f2gguf.quantize.fit.remote import drift_of_release, fetch_heads, is_release
from f2gguf.quantize.repair.assemble import file_bytes
from f2gguf.quantize.repair.plan import VARIANTS, plan_variant
from f2gguf.quantize.repair.recipe import Recipe, stated
from f2gguf.quantize.repair.tensors import size_as
from f2gguf.quantize.source.facts import NOTHING, Facts, Stated, read_facts
from f2gguf.quantize.source.fetch import fetch, fetch_settings, find_model
from f2gguf.quantize.source.lock import Entry, Lock
from f2gguf.runtime.errors import WrongUsage
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.describe import StatedDrift, drift_of, is_reference
from f2gguf.runtime.gguf.header import Header, read_header
from f2gguf.runtime.hub.listing import list_files


@dataclass(frozen=True)
class Candidate:
    """A file that could run, made or not."""

    model: str
    variant: str
    size_bytes: int
    header: Header  # its own, or that of the model's skeleton with the tensors that the file would have
    is_made: bool
    is_reference: bool  # others are measured against it
    drift: StatedDrift | None  # where it was measured
    is_listed: bool = False  # a model of models.lock, and no other checkpoint of its name

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}"


def candidates(
    model: str, variants: Sequence[str], lock: Lock, folder: Path, *, stated: Stated = NOTHING
) -> list[Candidate]:
    """The files that MODEL means, the largest first. Skeletons are written into `folder`.

    MODEL is a .gguf file or a folder of them, a name in the lock, a checkpoint folder, or org/name[@revision] on the
    Hub: a release, or a checkpoint, of which nothing but small files is downloaded. Raises what `read_header`,
    `find_model`, `fetch` and `read_facts` raise.
    """
    if model.lower().endswith(".gguf"):
        return [_made(read_header(model), pooling=stated.pooling)]
    is_listed = model.lower() in map(str.lower, lock.entries)
    if not is_listed and (files := _release_files(Path(model))):
        return [_made(read_header(path), pooling=stated.pooling) for path in files]
    entry, there = find_model(model, lock, name=stated.name)
    folder = folder / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    if there is None and entry.repo and entry.revision:
        listing = list_files(entry.repo, entry.revision)
        if is_release(listing):
            drifts = drift_of_release(listing)
            return [_made(read_header(path), drifts.get(name)) for name, path in fetch_heads(listing, variants, folder)]
    facts = _facts(entry, there, stated)
    return planned(facts, variants, folder, is_listed=is_listed and stated.name is None)


def _release_files(folder: Path) -> list[Path]:
    """The models of a folder without a checkpoint, the largest first."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return []
    files = [path for path in folder.glob("*.gguf") if not path.name.endswith(".imatrix.gguf")]
    return sorted(files, key=lambda path: -path.stat().st_size)


def planned(facts: Facts, variants: Sequence[str], folder: Path, *, is_listed: bool = False) -> list[Candidate]:
    """The base file and the `variants` of a checkpoint, with the sizes that llama.cpp's own types give."""
    path = folder / f"{facts.name}-{facts.base.upper()}.gguf"
    write_skeleton(facts, path)
    header = read_header(path)
    found = [_made(header, is_made=False)]
    for variant in variants:
        plan = plan_variant(path, variant)
        types = {tensor.name: tensor.new_type for tensor in plan.tensors}
        values = stated(Recipe(variant), {**VERDICT, keys.KEY_MAX_DRIFT: 0.0, keys.KEY_N_TEXTS: 0})
        size_bytes = file_bytes(header, types, values)
        tensors = (replace(it, type=types[it.name], size_bytes=size_as(it, types[it.name])) for it in header.tensors)
        its_own = replace(header, tensors=tuple(tensors))
        found.append(Candidate(facts.name, variant, size_bytes, its_own, False, False, None, is_listed))
    return sorted(found, key=lambda candidate: -candidate.size_bytes)


def _made(
    header: Header, drift: StatedDrift | None = None, *, pooling: str | None = None, is_made: bool = True
) -> Candidate:
    header.require_pooling(pooling)
    size_bytes = header.path.stat().st_size
    found = drift or drift_of(header)
    return Candidate(header.name, header.variant, size_bytes, header, is_made, is_reference(header), found)


def _facts(entry: Entry, there: Path | None, stated: Stated) -> Facts:
    if there is None and not entry.package and not entry.revision:
        fetch(entry)  # raises, and says how to name a revision
    folder = there or fetch_settings(entry)
    weights = ("*.safetensors", "pytorch_model*.bin")
    has_weights = there is not None and any(next(folder.rglob(pattern), None) for pattern in weights)
    return read_facts(entry, folder, stated=stated, has_weights=has_weights)


def require_variants(names: str) -> list[str]:
    """'Q8_0,Q4_0' -> their names as llama.cpp spells them. Raises `UnknownName`, and `WrongUsage` for none."""
    from f2gguf.quantize.repair.plan import require_variant

    chosen = list(dict.fromkeys(require_variant(name.strip()) for name in names.split(",") if name.strip()))
    if not chosen:
        raise WrongUsage(f"--variants: names none. There are {', '.join(VARIANTS)}.")
    return chosen
