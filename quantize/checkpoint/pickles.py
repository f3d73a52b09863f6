"""Tensors of pytorch_model.bin, without torch and without running what a pickle asks for.

torch.save writes a zip archive: its data.pkl says which tensors there are, and a file for each storage has their bytes,
not compressed. The pickle's opcodes are followed here one by one. They may build tables and tensors; the only names
that they may load are those of `_NAMES`, and none of these is called: each stands for a step of this file.
Sources: torch/_utils.py (_rebuild_tensor_v2), torch/serialization.py (persistent_load), Python's pickletools.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from f2gguf.quantize.checkpoint.json_files import FETCH_AGAIN
from f2gguf.runtime.errors import BrokenCheckpoint, UnsupportedCheckpoint

# torch's name of a storage -> the dtype as safetensors spells it, bytes of a value
_STORAGES = {
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}
_TABLE, _TENSOR = object(), object()  # what a name makes
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _TABLE,
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    **{("torch", name): storage for name, storage in _STORAGES.items()},
}
_MAX_PICKLE_BYTES = 4_000_000  # 10,000 tensors have 1.5 MB
_MAX_DIRECTORY_BYTES = 8_000_000  # of the archive's list of files
_BY_TORCH = "Save the model as safetensors, by transformers' save_pretrained, or fetch a revision that has them."


@dataclass(frozen=True)
class PickledTensor:
    """Where a tensor's values are in the archive."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    begin: int  # offset of the first value in the file
    strides: tuple[int, ...]  # steps from a value to the next one of each dimension, in values
    is_big_endian: bool


@dataclass(frozen=True)
class _Storage:
    """Values in one file of the archive."""

    dtype: str
    item_bytes: int
    file: str
    n_values: int


@dataclass(frozen=True)
class _View:
    """A tensor: some values of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickled(path: Path) -> dict[str, PickledTensor]:
    """The tensors of an archive that torch.save wrote, by name.

    Raises `UnsupportedCheckpoint` for a pickle that asks for more than plain tensors, or an older format of torch, and
    `BrokenCheckpoint` for a damaged archive: the checksum of every file that is used must be right.
    """
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\3\4"
    if not is_archive:
        raise UnsupportedCheckpoint(f"{path}: is a pickle, but no archive of torch 1.6 or later. {_BY_TORCH}")
    with _zip_errors(path):
        _require_small_directory(path)
        with zipfile.ZipFile(path) as archive:
            files = _files(path, archive)
            data = _read(path, archive, files, "data.pkl", most=_MAX_PICKLE_BYTES)
            order = _read(path, archive, files, "byteorder", most=16) if "byteorder" in files else b"little"
            if order not in (b"little", b"big"):
                _broken(path, f"its byteorder is {order!r:.40}")
            views = _Machine(path).run(data)
            used = {view.storage for view in views.values()}
            begins = {storage: _begin(path, archive, files, storage) for storage in used}
    return {
        name: PickledTensor(
            view.storage.dtype,
            view.shape,
            begins[view.storage] + view.offset * view.storage.item_bytes,
            view.strides,
            order == b"big",
        )
        for name, view in views.items()
    }


def _broken(path: Path, flaw: str) -> NoReturn:
    raise BrokenCheckpoint(f"{path}: is damaged: {flaw}. {FETCH_AGAIN}")


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turn what zipfile raises of a damaged archive into `BrokenCheckpoint`."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        struct.error,
    ) as error:
        raise BrokenCheckpoint(f"{path}: is damaged: {error}. {FETCH_AGAIN}") from error


def _require_small_directory(path: Path) -> None:
    """zipfile reads the archive's whole list of files, whatever its length: look that up first."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(max(0, size_bytes - 98))
        end = file.read()
    directory_bytes = struct.unpack_from("<I", end[-22:], 12)[0]
    if end[-42:-38] == b"PK\6\7":  # then its 64-bit form is before: 56 bytes, and 20 that say where those are
        directory_bytes = struct.unpack_from("<Q", end, 40)[0]
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0" or directory_bytes > _MAX_DIRECTORY_BYTES:
        _broken(path, "its list of files is cut off, or longer than any that torch writes")


def _files(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of the archive by their names in its one folder."""
    folders = {info.filename.partition("/")[0] for info in archive.infolist()}
    files = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if len(folders) != 1 or len(files) < len(archive.infolist()) or "data.pkl" not in files:
        _broken(path, "it is no archive of torch, or has a file twice")
    for name, info in files.items():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            _broken(path, f"its {name:.40} is compressed, which torch never does")
    return files


def _read(path: Path, archive: zipfile.ZipFile, files: dict[str, zipfile.ZipInfo], name: str, *, most: int) -> bytes:
    if files[name].file_size > most:
        _broken(path, f"its {name} has {files[name].file_size:,} bytes, and no more than {most:,} are read")
    return archive.read(files[name])


def _begin(path: Path, archive: zipfile.ZipFile, files: dict[str, zipfile.ZipInfo], storage: _Storage) -> int:
    """Where a storage's first value is in the file. Its length and its checksum are compared."""
    info = files.get(f"data/{storage.file}")
    if info is None or info.file_size != storage.n_values * storage.item_bytes:
        there = "is missing" if info is None else f"has {info.file_size:,} bytes"
        stated = f"{storage.n_values:,} values of {storage.dtype}"
        _broken(path, f"its data/{storage.file:.40} {there}, and data.pkl says {stated}")
    with archive.open(info) as values:
        while values.read(1 << 20):  # which compares the checksum at the end
            pass
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return int(info.header_offset + 30 + name_bytes + extra_bytes)


class _Machine:
    """Follows the opcodes of a pickle that may make nothing but tables of tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> dict[str, _View]:
        """The tensors of the table that the pickle makes."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd escapes in a kind of text that is refused anyhow
                self._follow(data)
            table = self._stack.pop()
        except (IndexError, KeyError, TypeError, ValueError) as error:
            flaw = "its data.pkl does not hold together"
            raise BrokenCheckpoint(f"{self._path}: is damaged: {flaw}. {FETCH_AGAIN}") from error
        if type(table) is not dict or not all(type(value) is _View for value in table.values()):
            self._refuse("holds other things than a table of tensors")
        return table

    def _follow(self, data: bytes) -> None:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                self._refuse(f"uses {opcode.name}")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedCheckpoint(
            f"{self._path}: its pickle {what}, and f2gguf reads plain tensors only, because others could run code. "
            f"{_BY_TORCH}"
        )

    def _since(self, at: int) -> list[Any]:
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _since_mark(self) -> list[Any]:
        return self._since(self._marks.pop())

    def _last(self, n: int) -> list[Any]:
        if len(self._stack) < n:
            raise ValueError("the stack is empty")
        return self._since(len(self._stack) - n)

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def new_table(self, _: Any) -> None:
        self._stack.append({})

    def new_list(self, _: Any) -> None:
        self._stack.append([])

    def tuple_since_mark(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def tuple_of(self, n: int) -> None:
        self._stack.append(tuple(self._last(n)))

    def put(self, key: int | None) -> None:
        self._memo[len(self._memo) if key is None else key] = self._stack[-1]

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def set_items(self, items: list[Any]) -> None:
        table = self._stack[-1]
        if type(table) is not dict or len(items) % 2 or not all(type(key) is str for key in items[::2]):
            raise ValueError("no table, or keys that are no texts")
        table.update(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        self.set_items(self._last(2))

    def set_items_since_mark(self, _: Any) -> None:
        self.set_items(self._since_mark())

    def append(self, _: Any) -> None:
        item = self._stack.pop()
        self._extend([item])

    def append_since_mark(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("no list")
        self._stack[-1].extend(items)

    def build(self, _: Any) -> None:
        """What is set besides the items of a table: a state_dict's `_metadata`, which no tensor depends on."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise ValueError("no table")

    def name(self, stated: str) -> None:
        module, _, name = stated.partition(" ")
        self._load(module, name)

    def name_of_stack(self, _: Any) -> None:
        self._load(*self._last(2))

    def _load(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("no name")
        if (module, name) not in _NAMES:
            self._refuse(f"asks for {module:.60}.{name:.60}")
        self._stack.append(_NAMES[module, name])

    def storage(self, _: Any) -> None:
        stated = self._stack.pop()
        if type(stated) is not tuple:
            raise ValueError("no storage")
        what, kind, file, _place, n_values = stated
        if what != "storage" or kind not in _STORAGES.values() or type(file) is not str or not _is_count(n_values):
            raise ValueError("no storage")
        self._stack.append(_Storage(kind[0], kind[1], file, n_values))

    def reduce(self, _: Any) -> None:
        what, arguments = self._last(2)
        if what is _TABLE and arguments == ():
            self._stack.append({})
        elif what is _TENSOR:
            self._stack.append(_view(*arguments))
        else:
            raise ValueError("a call of what is no function")


def _view(
    storage: Any, offset: Any, shape: Any, strides: Any, _requires_grad: Any, hooks: Any, metadata: Any = None
) -> _View:
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple or hooks or metadata:
        raise ValueError("no plain tensor")
    if len(shape) != len(strides) or len(shape) > 8 or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError("no shape")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if prod(shape) > storage.n_values or (prod(shape) and last >= storage.n_values):
        raise ValueError("a tensor of more values than its storage has")
    return _View(storage, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINBYTES", "BINBYTES"),
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "EMPTY_DICT": _Machine.new_table,
    "EMPTY_LIST": _Machine.new_list,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items_since_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_since_mark,
    "BUILD": _Machine.build,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_of_stack,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.reduce,
}
