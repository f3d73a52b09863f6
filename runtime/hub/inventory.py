"""Which embedding models are on this disk: in the Hub's cache, and in folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import NotGGUF
from f2gguf.runtime.files import format_bound, format_size
from f2gguf.runtime.gguf.describe import drift_of, is_reference
from f2gguf.runtime.gguf.header import Header, read_header
from f2gguf.runtime.hub.listing import recorded_files
from f2gguf.runtime.hub.models import is_model_file, is_part, matching, variant_of

COLUMNS = ("model", "variant", "size", "mean drift", "bound", "dims")


@dataclass(frozen=True)
class ModelFile:
    """A .gguf file: its name for -m, its size, and its header, or the reason why the header cannot be read."""

    model: str
    path: Path
    size_bytes: int
    header: Header | None
    error: str | None = None

    @property
    def is_embedding_model(self) -> bool:
        return self.header is None or self.header.pooling is not None


def find_models(folders: Sequence[Path]) -> list[ModelFile]:
    """Every .gguf model of the Hub's cache, then those below `folders`: by repository or folder, the smallest first.

    Only headers are read. A file with several names is listed by the shortest one.
    """
    named = [*_in_cache(), *((str(path), path) for folder in folders for path in _model_files(folder))]
    by_file: dict[Path, tuple[str, Path]] = {}
    for model, path in sorted(named, key=lambda pair: len(pair[0])):
        by_file.setdefault(path.resolve(), (model, path))
    return sorted((_read(model, path) for model, path in by_file.values()), key=_place)


def names_in_cache() -> list[str]:
    """The models of the Hub's cache that f2gguf downloaded, by their names for -m. No file is read."""
    return sorted({name for name, path in _in_cache() if name != str(path)})


def table_row(file: ModelFile) -> list[str]:
    """Cells of `COLUMNS`."""
    header, size = file.header, format_size(file.size_bytes)
    if header is None:
        return [file.model, "damaged", size, "", "", ""]
    drift = drift_of(header)
    unmeasured = "reference" if is_reference(header) else "not measured"
    return [
        file.model,
        header.variant,
        size,
        f"{drift.mean:.3%}" if drift else unmeasured,
        f"{'under' if drift.holds else 'OVER'} {format_bound(drift.max_drift)}" if drift else "",
        " to ".join(map(str, sorted({min(header.dims), header.n_embd}))),
    ]


def as_dict(file: ModelFile) -> dict[str, Any]:
    """The file for machines; a fact that a damaged or unmeasured file does not state is null."""
    header = file.header
    drift = drift_of(header) if header else None
    keys = {"mean_drift": "mean", "upper_drift": "upper", "max_drift": "max_drift", "holds": "holds"}
    return {
        "model": file.model,
        "path": str(file.path),
        "variant": header.variant if header else None,
        "size_bytes": file.size_bytes,
        **{key: getattr(drift, name, None) for key, name in keys.items()},
        "dims": list(header.dims) if header else None,
        "error": file.error,
    }


def _in_cache() -> Iterator[tuple[str, Path]]:
    """Models of the Hub's cache: their names for -m, and their paths."""
    from huggingface_hub import constants

    for snapshot in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"):
        for path in _model_files(snapshot):
            yield _hub_name(snapshot, path) or str(path), path


def _hub_name(snapshot: Path, path: Path) -> str | None:
    """`org/name:VARIANT`, with a revision where main is another commit; None for what f2gguf did not download."""
    repo, commit = snapshot.parent.parent.name.removeprefix("models--").replace("--", "/", 1), snapshot.name
    name, main, listing = path.relative_to(snapshot).as_posix(), recorded_files(repo), recorded_files(repo, commit)
    if listing is None or name not in listing.files:
        return None
    variant = variant_of(name)
    is_only = variant is not None and matching(listing, variant) == [name]
    revision = "" if main and main.commit == commit else f"@{commit}"
    return f"{repo}:{variant if is_only else name}{revision}"


def _model_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.gguf"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)  # such as a run's .work
        if is_model_file(path.name) and not is_part(path.name) and not is_hidden and not path.is_dir():
            yield path


def _read(model: str, path: Path) -> ModelFile:
    size_bytes = path.stat().st_size if path.exists() else 0  # a link of the cache whose file was removed
    try:
        return ModelFile(model, path, size_bytes, read_header(path))
    except NotGGUF as error:
        return ModelFile(model, path, size_bytes, None, str(error))


def _place(file: ModelFile) -> tuple[bool, str, int]:
    is_path = file.model == str(file.path)
    return is_path, str(file.path.parent) if is_path else file.model.partition(":")[0], file.size_bytes
