"""Shards on the disk: Parquet files that are whole or absent, each beside a file of the rows that it lacks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from f2gguf.runtime.console import say
from f2gguf.runtime.corpus.cut import Position, Shard
from f2gguf.runtime.corpus.work import Embedded
from f2gguf.runtime.errors import InputError, OutputError
from f2gguf.runtime.files import write_text, writing
from f2gguf.runtime.tables.texts import Row
from numpy.typing import NDArray

_KEY = b"f2gguf"  # of what a Parquet file's own metadata say of its shard
_IDS_A_PASS = 10_000_000
_ID_TYPES = {"position": "int64", "int64": "int64", "string": "string"}


@dataclass(frozen=True)
class ShardFacts:
    """What a finished shard says of itself."""

    job: str  # hash of the settings that it was made with
    end: Position
    n_texts: int
    n_tokens: int
    n_truncated: int
    n_rejects: int
    broken: tuple[str, ...]  # files whose rest could not be read

    @property
    def n_rows_before(self) -> int:
        """Rows of the corpus before it: each of its own has a vector or is a reject."""
        return self.end.n_rows - self.n_texts - self.n_rejects

    @classmethod
    def of(cls, values: dict[str, Any]) -> ShardFacts:
        return cls(**values | {"end": Position(*values["end"]), "broken": tuple(values["broken"])})


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.parquet"


def rejects_path(folder: Path, number: int) -> Path:
    return folder / f"_rejects-{number:06}.jsonl"


def write_shard(folder: Path, shard: Shard, embedded: Embedded, *, job: str, ids: str, keep_text: bool) -> ShardFacts:
    """Write the rows that have no vector, then the shard. Columns: id, vector, n_tokens, truncated, and text if kept.

    A shard that is there is complete. Raises `OutputError` where the disk is full.
    """
    for i, reason in embedded.flaws.items():
        shard.reject(shard.places[i], reason)
    rejects = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shard.rejects)
    if rejects:
        write_text(rejects_path(folder, shard.number), rejects)
    rows = embedded.embeddings
    facts = ShardFacts(
        job,
        shard.end,
        len(rows.vectors),
        int(rows.n_tokens.sum()),
        int(rows.truncated.sum()),
        len(shard.rejects),
        tuple(shard.broken),
    )
    with writing(shard_path(folder, shard.number)) as part:
        part.write_bytes(_as_parquet(shard, embedded, facts, ids=ids, keep_text=keep_text))
    return facts


def _as_parquet(shard: Shard, embedded: Embedded, facts: ShardFacts, *, ids: str, keep_text: bool) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    vectors = embedded.embeddings.vectors
    kept = [i for i in range(len(shard.texts)) if i not in embedded.flaws]
    flat = pa.array(vectors.reshape(-1))
    columns = {
        "id": pa.array([shard.ids[i] for i in kept], type=_ID_TYPES[ids]),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        "n_tokens": pa.array(embedded.embeddings.n_tokens, type="int32"),
        "truncated": pa.array(embedded.embeddings.truncated),
    }
    if keep_text:
        columns["text"] = pa.array([shard.texts[i] for i in kept], type="string")
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(vars(facts))})
    sink = pa.BufferOutputStream()
    packed = {name: "NONE" if name == "vector" else "ZSTD" for name in columns}  # vectors do not get smaller
    packed["vector.list.element"] = packed.pop("vector")
    parquet.write_table(table, sink, compression=packed, use_dictionary=False, write_page_checksum=True)
    return bytes(sink.getvalue())


def finished_shards(folder: Path, job: str) -> dict[int, ShardFacts]:
    """What the shards in `folder` say of themselves, by their numbers. A damaged one is said, and left out.

    Raises `OutputError` for one that was made with other settings, or is not ours.
    """
    found = {}
    for path in sorted(folder.glob("part-*.parquet")):
        facts = read_facts(path)
        if facts is None:
            say(f"{path}: is damaged, and is made again")
        elif facts.job != job:
            raise OutputError(f"{path}: was made with other settings than this folder. Move it away.")
        else:
            found[int(path.stem.removeprefix("part-"))] = facts
    return found


def require_order(folder: Path, shards: Mapping[int, ShardFacts], *, whole: bool) -> None:
    """Raise `OutputError` for a shard that does not begin where the one before it ends, as one that was renamed.

    Unless they are the `whole` folder, a shard may lack the one before it.
    """
    for number, facts in shards.items():
        before = shards.get(number - 1)
        is_first = number == 0
        if not before and not is_first and not whole:
            continue
        if (not before and not is_first) or facts.n_rows_before != (before.end.n_rows if before else 0):
            raise OutputError(
                f"{shard_path(folder, number)}: does not follow the shard before it, as a copy of another one. "
                "Move it away, and run the `f2gguf embed` of this folder again."
            )


def read_facts(path: Path) -> ShardFacts | None:
    """What a shard says of itself; None where the file is damaged. Raises `OutputError` for somebody else's file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        metadata = read_metadata(path).metadata or {}
    except (ArrowException, OSError):
        return None
    if _KEY not in metadata or not path.stem.removeprefix("part-").isdigit():
        raise OutputError(f"{path}: is no shard of f2gguf. Move it away, or choose another -o.")
    return ShardFacts.of(json.loads(metadata[_KEY]))


def read_rows(folder: Path) -> Iterator[tuple[Row, NDArray[Any]]]:
    """Every row of the shards in `folder`, whose texts were kept, and its vector, in the order of the corpus.

    Raises `InputError` for a shard that cannot be read.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for path in sorted(folder.glob("part-*.parquet")):
        try:
            with ParquetFile(path, page_checksum_verification=True) as table:
                columns = table.read(["id", "text", "vector"])
        except (ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"{path}: cannot be read: {reason}. Remove it, and run the `f2gguf embed` of its folder again."
            ) from error
        vectors = columns["vector"].combine_chunks()
        values = vectors.flatten().to_numpy().reshape(len(vectors), vectors.type.list_size)
        for row_id, text, vector in zip(columns["id"].to_pylist(), columns["text"].to_pylist(), values, strict=True):
            yield Row(text, row_id), vector


def count_repeated_ids(folder: Path, n_texts: int) -> int:
    """How many rows have an id that an earlier row has, by 64 bits of each. Memory does not grow with the corpus."""
    n_passes, n_repeated = 1 + n_texts // _IDS_A_PASS, 0
    for number in range(n_passes):
        found = [np.zeros(0, np.int64)]
        for path in sorted(folder.glob("part-*.parquet")):
            keys = _id_keys(path)
            found.append(keys[keys % n_passes == number])
        keys = np.concatenate(found)
        n_repeated += len(keys) - len(np.unique(keys))
    return n_repeated


def _id_keys(path: Path) -> NDArray[np.int64]:
    from pyarrow import parquet

    ids = parquet.read_table(path, columns=["id"])["id"].drop_null()
    if ids.type == "int64":
        return np.asarray(ids.to_numpy())
    return np.fromiter(map(hash, ids.to_pylist()), dtype=np.int64, count=len(ids))
