"""models.lock: the models known by name, pinned, with what their checkpoints do not state."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import F2ggufError, UnknownName, WrongUsage

FILE_NAME = "models.lock"


@dataclass(frozen=True)
class Entry:
    """One model of the lock, or one that the user named by folder or repository (then nearly empty)."""

    name: str
    repo: str | None = None
    revision: str | None = None
    package: str | None = None  # importable package that holds `folder`
    folder: str | None = None
    install: str | None = None  # what to `pip install` for the package
    license: str | None = None
    languages: tuple[str, ...] = ()
    max_tokens: int | None = None
    matryoshka_dims: tuple[int, ...] = ()
    pooling: str | None = None
    eos_token: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lock:
    path: Path
    default: str
    entries: Mapping[str, Entry]

    def entry(self, name: str) -> Entry:
        """The entry called `name`, upper or lower case; `UnknownName` with the nearest one otherwise."""
        exact = {key.lower(): entry for key, entry in self.entries.items()}
        if name.lower() not in exact:
            hint = " A checkpoint folder or org/name[@revision] works too."
            raise UnknownName("model", name, self.entries, hint)
        return exact[name.lower()]


def read_lock(path: Path | None = None) -> Lock:
    """Read models.lock: the file at `path`, or the one that came with f2gguf; `WrongUsage` where it is damaged."""
    path = path or default_path()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WrongUsage(f"{path}: no such file (--lock).") from error
    except (OSError, ValueError) as error:
        raise WrongUsage(f"{path}: does not parse as TOML: {error}") from error
    shared = content.get("shared", {})
    entries = {name: _entry(path, name, table, shared) for name, table in content.get("models", {}).items()}
    default = content.get("default", "")
    if default not in entries:
        raise WrongUsage(f"{path}: the default {default!r} is not among its models.")
    return Lock(path, default, entries)


def default_path() -> Path:
    """Where models.lock is: the root of a checkout, or the installed distribution's shared data."""
    beside = Path(__file__).resolve().parent.parent / FILE_NAME
    if beside.exists():
        return beside
    for file in importlib.metadata.files("f2gguf") or []:
        if file.name == FILE_NAME:
            return Path(str(file.locate())).resolve()
    raise F2ggufError("models.lock did not come with this installation. Install f2gguf again, or pass --lock FILE.")


def package_folder(entry: Entry) -> Path:
    """The folder of a model that lives in an installed package; `F2ggufError` says what to install."""
    if entry.package is None or entry.folder is None:
        raise WrongUsage(f"{entry.name}: models.lock gives it neither a repo nor a package with a folder.")
    spec = importlib.util.find_spec(entry.package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / entry.folder).is_dir():
            return Path(location) / entry.folder
    raise F2ggufError(
        f"{entry.name} lives in the package {entry.package}, which is not installed. Run: pip install {entry.install}"
    )


def _entry(path: Path, name: str, table: dict[str, Any], shared: dict[str, dict[str, Any]]) -> Entry:
    like = table.get("like")
    if like is not None and like not in shared:
        raise WrongUsage(f"{path}: {name} is like {like!r}, which [shared] does not have.")
    values = {**(shared[like] if like else {}), **{key: value for key, value in table.items() if key != "like"}}
    unknown = values.keys() - {f.name for f in fields(Entry)} - {"name"}
    if unknown:
        raise UnknownName(f"key of {name} in {path}", min(unknown), [f.name for f in fields(Entry)][1:])
    as_tuples: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return Entry(name=name, **as_tuples)
