"""models.lock: the models known by name, each with its commit and the facts that its checkpoint does not state."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from f2gguf.runtime.errors import F2ggufError, UnknownName, WrongUsage
from f2gguf.runtime.files import write_text
from f2gguf.runtime.hub.listing import COMMIT, REPO, RemoteFile, leads_out
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

FILE_NAME = "models.lock"
_CHECKOUT = Path(__file__).resolve().parents[2] / FILE_NAME
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _require_inside(name: str) -> str:
    if leads_out(name):
        raise ValueError("this path leads out of the repository")
    return name


def _require_one_hash(file: RemoteFile) -> RemoteFile:
    hashes = [(file.sha256, _SHA256), (file.blob_id, COMMIT)]
    stated = [pattern.fullmatch(text) for text, pattern in hashes if text is not None]
    if file.size_bytes < 0 or len(stated) != 1 or not stated[0]:
        raise ValueError("a file has a size_bytes, and either a sha256 of 64 or a blob_id of 40 digits")
    return file


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=1)]
Files = Mapping[
    Annotated[str, AfterValidator(_require_inside)], Annotated[RemoteFile, AfterValidator(_require_one_hash)]
]


@dataclass(frozen=True)
class Entry:
    """One model of the lock, or one that the user named by folder or repository (then nearly empty)."""

    name: str
    repo: Annotated[str, Field(pattern=f"^(?-u:{REPO.pattern})$")] | None = None
    revision: Text | None = None
    package: Annotated[str, Field(pattern=r"^[^.]")] | None = None  # importable package that holds `folder`
    folder: Text | None = None
    install: Text | None = None  # what to `pip install` for the package
    license: Text | None = None
    languages: tuple[Text, ...] = ()
    max_tokens: Count | None = None
    matryoshka_dims: tuple[Count, ...] = ()
    pooling: Literal["last", "mean", "cls"] | None = None
    eos_token: Text | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    # of the revision, by path; empty where the model is not locked
    files: Annotated[Files, Field(min_length=1)] = field(default_factory=dict)
    unsupported: Text | None = None  # why f2gguf does not convert the model yet


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
        for key, entry in self.entries.items():
            if key.lower() == name.lower():
                return entry
        raise UnknownName("model", name, self.entries, " A checkpoint folder or org/name[@revision] works too.")


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
    entries = _entries(path, {name: _stated(path, name, table, shared) for name, table in models.items()})
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
    with contextlib.suppress(ImportError):  # a parent package is missing
        spec = importlib.util.find_spec(entry.package)
        for location in (spec and spec.submodule_search_locations) or []:
            if (folder := Path(location, entry.folder)).is_dir():
                return folder
    raise F2ggufError(
        f"{entry.name} lives in the folder {entry.folder} of the package {entry.package}, which is not installed. "
        f"Run: pip install {entry.install or entry.package}"
    )


def _tables(path: Path, content: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    tables = content.get(key, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise WrongUsage(f"{path}: {key} is {tables!r}, which holds no tables such as [{key}.NAME].")
    return tables


def _stated(path: Path, name: str, table: dict[str, Any], shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What an entry states, after what [shared] states for all entries that are `like` it."""
    like = table.pop("like", None)
    if like is not None and str(like) not in shared:
        raise WrongUsage(f"{path}: {name} is like {like!r}, which [shared] does not have.")
    return {**shared.get(str(like), {}), **table, "name": name}


def _entries(path: Path, stated: dict[str, dict[str, Any]]) -> Mapping[str, Entry]:
    # JSON, because pydantic's strict mode takes the lists of JSON for tuples, and those of Python not
    adapter = TypeAdapter(Mapping[str, Entry], config=ConfigDict(strict=True, extra="forbid"))
    try:
        entries = adapter.validate_json(json.dumps(stated, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        name, key, *place = map(str, first["loc"])
        keys = [item.name for item in fields(Entry)]
        if key not in keys:
            raise UnknownName(f"key of {name} in {path}", key, keys) from error
        where = ".".join([key, *place])
        raise WrongUsage(f"{path}: {name} has {where} = {first['input']!r}: {first['msg']}.") from error
    for name, entry in entries.items():
        if entry.files and not COMMIT.fullmatch(entry.revision or ""):
            raise WrongUsage(f"{path}: {name} has files, but no commit as its revision. Remove its files.")
    return entries
