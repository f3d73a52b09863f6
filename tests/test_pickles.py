"""pytorch_model.bin: its tensors are those that torch reads, nothing in it runs, and no damage goes unnoticed."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_tiny
from conftest import facts_of
from f2gguf.evals.full_precision import transformers_vectors
from f2gguf.evals.texts import embed_texts, load_texts
from f2gguf.quantize.checkpoint.pickles import read_pickled
from f2gguf.quantize.checkpoint.transforms import interleave_halves, take_rows
from f2gguf.quantize.checkpoint.weights import StoredTensor, as_float32, read_tensors
from f2gguf.quantize.convert.readback import reference_ids
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import BrokenCheckpoint, F2ggufError, UnsupportedCheckpoint
from safetensors.torch import load_file

N_DAMAGES = 400
TABLE = torch.arange(60, dtype=torch.float32).reshape(10, 6)
TENSORS = {
    "plain": TABLE,
    "half": TABLE.half() / 7,
    "bfloat": TABLE.bfloat16() / 3,
    "turned": TABLE.T,
    "part": TABLE[2:9:3, 1::2],
    "shared": TABLE[4:],
    "number": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "positions": torch.arange(9),
}


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def values(tensor: StoredTensor) -> np.ndarray:
    chunks = [as_float32(tensor.dtype, chunk) for chunk in tensor.chunks()]
    return np.concatenate([np.empty(0, np.float32), *chunks]).reshape(tensor.shape)


def read(folder: Path) -> dict[str, StoredTensor]:
    return read_tensors(folder, {})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch(protocol: int, tmp_path: Path) -> None:
    state = collections.OrderedDict(TENSORS)
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    save(tmp_path / "pytorch_model.bin", state, pickle_protocol=protocol)
    found = read(tmp_path)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].shape == tuple(tensor.shape)
        if tensor.is_floating_point():
            np.testing.assert_array_equal(values(found[name]), tensor.float().numpy())
    assert found["positions"].dtype == "I64"


def test_transforms_follow_strides(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", {"turned": TABLE.T, "plain": TABLE.T.contiguous()})
    turned, plain = (read(tmp_path)[name] for name in ("turned", "plain"))
    for transform in (take_rows(2, 5), interleave_halves(1)):
        np.testing.assert_array_equal(values(transform(turned)), values(transform(plain)))


def test_other_byte_order(tmp_path: Path) -> None:
    path = save(tmp_path / "pytorch_model.bin", {"a": TABLE, "b": TABLE.T})

    def swap(name: str, data: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        return np.frombuffer(data, "<f4").astype(">f4").tobytes() if name.startswith("data/") else data

    repack(path, swap)
    np.testing.assert_array_equal(values(read(tmp_path)["a"]), TABLE.numpy())
    np.testing.assert_array_equal(values(read(tmp_path)["b"]), TABLE.T.numpy())


def test_shards_by_their_index(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model-00001-of-00002.bin", {"a": TABLE})
    save(tmp_path / "pytorch_model-00002-of-00002.bin", {"b": TABLE + 1})
    files = '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(files)
    assert values(read(tmp_path)["b"]).max() == 60


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A Qwen3 checkpoint with pytorch_model.bin in the place of safetensors."""
    folder = write_tiny(tmp_path / "tiny")
    save(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    return folder


def test_file_is_that_of_the_safetensors(pickled: Path, tmp_path: Path) -> None:
    written = []
    for _ in range(2):  # safetensors go first, as in transformers
        convert(facts := facts_of(pickled), tmp_path / "x.gguf")
        written.append((facts.checkpoint.sha256, tensors_of(facts)))
        (pickled / "model.safetensors").unlink(missing_ok=True)
    assert written[0][1] == written[1][1]
    assert written[0][0] != written[1][0]


def tensors_of(facts: Facts) -> dict[str, bytes]:
    return {name: values(tensor).tobytes() for name, tensor in facts.tensors.items()}


def test_transformers_runs_it_as_the_baseline(pickled: Path, tmp_path: Path) -> None:
    (pickled / "model.safetensors").unlink()
    facts = facts_of(pickled)
    convert(facts, tmp_path / "x.gguf", dtype="f32")
    texts = load_texts()[:2]
    with Embedder(tmp_path / "x.gguf") as model:
        ours = embed_texts(model, texts)
    theirs = transformers_vectors(pickled, reference_ids(facts, texts), pooling="last")
    assert (ours * theirs).sum(axis=1).min() > 0.99999


class Runs:
    """A pickle of it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda path: {"a": TABLE, "b": Runs(path)},
            r"its pickle asks for posix.mkdir, and f2gguf reads plain tensors",
        ),
        (lambda path: torch.nn.Linear(2, 2), r"asks for torch.nn.modules.linear.Linear"),
        (lambda path: {"a": torch.nn.Parameter(TABLE)}, r"asks for torch._utils._rebuild_parameter"),
        (lambda path: {"a": TABLE, "epoch": 3}, "holds other things than a table of tensors"),
        (lambda path: [TABLE], "holds other things than a table of tensors"),
        (lambda path: {"a": {1, 2}}, "asks for __builtin__.set"),
        (lambda path: {"state_dict": {"a": TABLE}}, "holds other things"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused_and_never_run(
    content: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "pytorch_model.bin", content(tmp_path / "made"))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        read(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"a": 1}), "is a pickle, but no archive of torch 1.6 or later. Save the model as safetensors"),
        (b"", "is a pickle, but no archive"),
        (b"PK\3\4", "is damaged"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(F2ggufError, match=message):
        read(tmp_path)


def test_format_before_1_6_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", {"a": TABLE}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"no archive of torch 1\.6"):
        read(tmp_path)


def repack(path: Path, change: Callable[[str, bytes], bytes], *, method: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again, with right checksums, after a change of its files."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, change(name.partition("/")[2], data))


def in_pickle(change: Callable[[bytes], bytes]) -> Callable[[str, bytes], bytes]:
    return lambda name, data: change(data) if name == "data.pkl" else data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_pickle(lambda data: data[:-30]), "its data.pkl does not hold together"),
        (in_pickle(lambda data: b"\x80\x02" + b"}" * 5_000_000), r"its data.pkl has 5,000,00\d bytes"),
        (in_pickle(lambda data: data.replace(b"K\x0aK\x06", b"K\x0bK\x06")), "does not hold together"),  # 11 rows of 10
        (in_pickle(lambda data: data.replace(b"FloatStorage", b"LongStorage")), "data.pkl says 60 values of I64"),
        (lambda name, data: data[:-4] if name == "data/0" else data, "its data/0 has 236 bytes, and data.pkl says 60"),
        (lambda name, data: b"middle" if name == "byteorder" else data, "its byteorder is b'middle'"),
    ],
)
def test_archive_that_contradicts_itself_is_named(
    change: Callable[[str, bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "pytorch_model.bin", {"a": TABLE})
    repack(path, change)
    with pytest.raises(BrokenCheckpoint, match=message):
        read(tmp_path)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "pytorch_model.bin", {"a": torch.zeros(100_000)})
    repack(path, lambda _, data: data, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(BrokenCheckpoint, match="is compressed, which torch never does"):
        read(tmp_path)


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed, at = bytearray(data), rng.randrange(len(data))
    way = rng.randrange(5)
    if way == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        changed[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
    elif way == 2:
        del changed[at:]
    elif way == 3:
        changed[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, bytes(range(8))])
    else:
        source = rng.randrange(len(data))
        changed[at : at + 30] = data[source : source + 30]
    return bytes(changed)


def test_no_damage_goes_unnoticed_or_ends_otherwise_than_in_an_error(tmp_path: Path) -> None:
    """Of the whole archive, where every checksum is at hand; and of its pickle behind a right checksum."""
    path = save(tmp_path / "pytorch_model.bin", collections.OrderedDict(TENSORS))
    whole, right = path.read_bytes(), {name: values(tensor) for name, tensor in read_floats(tmp_path).items()}
    rng, n_refused = random.Random(14), 0
    tracemalloc.start()
    for i in range(N_DAMAGES):
        path.write_bytes(damaged(whole, rng) if i % 2 else whole)
        if i % 2 == 0:
            repack(path, in_pickle(lambda data: damaged(data, rng)))
        try:
            found = {name: values(tensor) for name, tensor in read_floats(tmp_path).items()}
        except F2ggufError:
            n_refused += 1
            continue
        if i % 2:
            assert found.keys() == right.keys(), f"damage {i}"
            assert all(np.array_equal(found[name], right[name]) for name in right), f"damage {i}"
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert N_DAMAGES / 2 < n_refused < N_DAMAGES


def read_floats(folder: Path) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in read(folder).items() if tensor.dtype in ("F32", "F16", "BF16")}


def test_pickle_that_grows_without_end_is_small_in_memory(tmp_path: Path) -> None:
    """Tuples of tuples of tuples, doubled 60 times: to look at them all would take for ever."""
    path = save(tmp_path / "pytorch_model.bin", {"a": TABLE})
    stream = io.BytesIO()
    stream.write(b"\x80\x02)")
    stream.write(b"q\x00h\x00h\x00\x86" * 60 + b".")
    repack(path, in_pickle(lambda _: stream.getvalue()))
    with pytest.raises(UnsupportedCheckpoint, match="holds other things"):
        read_pickled(path)
    shutil.rmtree(tmp_path)
