"""models.lock: the models known by name, pinned, with what their checkpoints do not state."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import F2ggufError, UnknownName, WrongUsage
from f2gguf.runtime.files import write_text
from f2gguf.runtime.gguf.header import POOLING_IDS
from f2gguf.runtime.hub.listing import COMMIT, REPO, RemoteFile, leads_out

FILE_NAME = "models.lock"
_CHECKOUT = Path(__file__).resolve().parents[2] / FILE_NAME


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
    files: Mapping[str, RemoteFile] = field(default_factory=dict)  # of the revision, by path; empty where not locked
    unsupported: str | None = None  # why f2gguf does not convert it yet


@dataclass(frozen=True)
class Lock:
    path: Path
    default: str
    entries: Mapping[str, Entry]

    @property
    def convertible(self) -> list[str]:
        """The names that `quantize all` takes as they are."""
        return [e.name for e in self.entries.values() if not e.unsupported and (e.package or e.revision)]

    def entry(self, name: str) -> Entry:
        """The entry called `name`, upper or lower case; `UnknownName` with the nearest one otherwise."""
        exact = {key.lower(): entry for key, entry in self.entries.items()}
        if name.lower() not in exact:
            hint = " A checkpoint folder or org/name[@revision] works too."
            raise UnknownName("model", name, self.entries, hint)
        return exact[name.lower()]


def read_lock(path: Path | None = None) -> Lock:
    """Read models.lock: the file at `path`, or at `default_path`; `WrongUsage` where it is damaged."""
    path = path or default_path()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WrongUsage(f"{path}: no such file (--lock).") from error
    except (OSError, ValueError) as error:
        raise WrongUsage(f"{path}: does not parse as TOML: {error}") from error
    shared, models = (_tables(path, content, key) for key in ("shared", "models"))
    entries = {name: _entry(path, name, table, shared) for name, table in models.items()}
    default = str(content.get("default", ""))
    if default not in entries:
        raise WrongUsage(f"{path}: the default {default!r} is not among its models.")
    return Lock(path, default, entries)


def default_path() -> Path:
    """The models.lock of the current folder; else that of a checkout, or the one that came with the installation."""
    return next((path for path in (Path(FILE_NAME), _CHECKOUT) if path.exists()), None) or _shipped_path()


def path_to_write() -> Path:
    """`default_path`, but never into an installation: what came with it is copied to the current folder first."""
    path = default_path()
    if path in (Path(FILE_NAME), _CHECKOUT):
        return path
    write_text(Path(FILE_NAME), path.read_text(encoding="utf-8"))
    return Path(FILE_NAME)


def _shipped_path() -> Path:
    for file in importlib.metadata.files("f2gguf") or []:
        if file.name == FILE_NAME:
            return Path(str(file.locate())).resolve()
    raise F2ggufError("models.lock did not come with this installation. Install f2gguf again, or pass --lock FILE.")


def package_folder(entry: Entry) -> Path:
    """The folder of a model that lives in an installed package; `F2ggufError` says what to install."""
    if entry.package is None or entry.folder is None:
        raise WrongUsage(f"{entry.name}: models.lock gives it neither a repo nor a package with a folder.")
    try:
        spec = importlib.util.find_spec(entry.package)
    except ImportError:  # a parent package is missing
        spec = None
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / entry.folder).is_dir():
            return Path(location) / entry.folder
    raise F2ggufError(
        f"{entry.name} lives in the folder {entry.folder} of the package {entry.package}, which is not installed. "
        f"Run: pip install {entry.install or entry.package}"
    )


def _tables(path: Path, content: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    tables = content.get(key, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise WrongUsage(f"{path}: {key} is {tables!r}, which holds no tables such as [{key}.NAME].")
    return tables


def _entry(path: Path, name: str, table: dict[str, Any], shared: dict[str, dict[str, Any]]) -> Entry:
    like = table.get("like")
    if like is not None and str(like) not in shared:
        raise WrongUsage(f"{path}: {name} is like {like!r}, which [shared] does not have.")
    values = {**(shared[like] if like else {}), **{key: value for key, value in table.items() if key != "like"}}
    for key, value in values.items():
        if key not in KEYS:
            raise UnknownName(f"key of {name} in {path}", key, KEYS)
        if not KEYS[key](value):
            raise WrongUsage(f"{path}: {name} has {key} = {value!r}, which is no such thing.")
    if "files" in values and not COMMIT.fullmatch(values.get("revision", "")):
        raise WrongUsage(f"{path}: {name} has files, but no commit as its revision. Remove its files.")
    as_tuples: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    files = {file: RemoteFile(**stated) for file, stated in values.get("files", {}).items()}
    return Entry(name=name, **{**as_tuples, "files": files})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 1


def _is_list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_file(name: str, value: object) -> bool:
    """A path within the repository, a size, and one hash."""
    if leads_out(name):
        return False
    if not isinstance(value, dict) or len(value) != 2 or type(value.get("size_bytes")) is not int:
        return False
    digests = {key: pattern.fullmatch(str(value[key])) for key, pattern in _HASHES.items() if key in value}
    return value["size_bytes"] >= 0 and len(digests) == 1 and all(digests.values())


_HASHES = {"sha256": re.compile(r"[0-9a-f]{64}"), "blob_id": re.compile(r"[0-9a-f]{40}")}
# what an entry may state, and what each value must be
KEYS: dict[str, Callable[[Any], bool]] = {
    "repo": lambda value: _is_text(value) and REPO.fullmatch(value) is not None,
    "revision": _is_text,
    "package": lambda value: _is_text(value) and not value.startswith("."),
    "folder": _is_text,
    "install": _is_text,
    "license": _is_text,
    "languages": _is_list_of(_is_text),
    "max_tokens": _is_count,
    "matryoshka_dims": _is_list_of(_is_count),
    "pooling": lambda value: isinstance(value, str) and value in POOLING_IDS,
    "eos_token": _is_text,
    "prompts": lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "unsupported": _is_text,
    "files": lambda value: isinstance(value, dict) and bool(value) and all(map(_is_file, value, value.values())),
}
