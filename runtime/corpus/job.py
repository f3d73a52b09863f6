"""A corpus becomes a folder of shards. Stopped at any point, the same call goes on, and ends in the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from f2gguf.runtime.console import Advance, progress
from f2gguf.runtime.corpus.cut import Shard, cut
from f2gguf.runtime.corpus.inputs import InputFile, find_inputs, glance, is_inside, stat_inputs
from f2gguf.runtime.corpus.pools import Pool, choose_processes, own_process, processes, ray_cluster, require_processes
from f2gguf.runtime.corpus.shards import ShardFacts, count_repeated_ids, finished_shards, require_order, write_shard
from f2gguf.runtime.corpus.work import Embedded, Options
from f2gguf.runtime.embedder import Embedder
from f2gguf.runtime.errors import InputError, OutputError, WrongUsage, parsing
from f2gguf.runtime.files import PART_SUFFIX, locked, sha256_text, write_text
from f2gguf.runtime.precision import require_precision
from f2gguf.runtime.tables.texts import require_pyarrow

MANIFEST = "_manifest.json"  # readers of Parquet folders leave out what begins so
FORMAT = 1
# Rows of a shard, by the size of the model's file: a minute's work or a few minutes', which a stop costs at most
_SHARD_ROWS = ((100_000_000, 16_384), (1_000_000_000, 2_048), (float("inf"), 512))


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on. A folder holds the shards of one of them."""

    model: str
    prompt: str
    width: int
    fingerprint: str
    precision: str
    normalize: bool | None
    max_tokens: int
    deterministic: bool
    column: str | None
    ids: str  # 'position', 'int64' or 'string'
    keep_text: bool
    shard_rows: int
    inputs: tuple[InputFile, ...]

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"inputs": [file.as_dict() for file in self.inputs]}

    @property
    def hash(self) -> str:
        return _hash(self.as_dict())


@dataclass(frozen=True)
class Totals:
    """What a folder holds once it is complete."""

    n_shards: int
    n_texts: int
    n_tokens: int
    n_truncated: int
    n_rejects: int
    n_repeated_ids: int  # rows with an id that an earlier row has
    broken: tuple[str, ...]  # files that could not be read to their end

    @classmethod
    def of(cls, shards: Sequence[ShardFacts], *, n_repeated_ids: int) -> Totals:
        names = ("n_texts", "n_tokens", "n_truncated", "n_rejects")
        sums = {name: sum(getattr(it, name) for it in shards) for name in names}
        broken = tuple(name for it in shards for name in it.broken)
        return cls(len(shards), **sums, n_repeated_ids=n_repeated_ids, broken=broken)


def embed_corpus(
    names: Sequence[str],
    folder: Path,
    model: Embedder,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    truncate_dim: int | None = None,
    precision: str = "float32",
    normalize: bool | None = None,
    column: str | None = None,
    keep_text: bool = False,
    shard_rows: int | None = None,
    n_processes: int | None = 1,
    ray: str | None = None,
    force: bool = False,
) -> Totals:
    """Embed the rows of files, globs and folders into Parquet shards in `folder`, beside a manifest.

    Prompt, width and precision are those of `Embedder.embed`. Rows that cannot be embedded are written to files of
    rejects. `model` is closed where other processes compute: `n_processes` of this machine, of which None starts
    several where they are quicker, or those of a Ray cluster. Of a file that is damaged from some row on, the rest is
    one reject, and `broken` of the totals names it. Raises `OutputError` for a folder of another job, and `InputError`
    for a file that cannot be read at all.
    """
    require_pyarrow(folder, "writes Parquet")
    if n_processes:
        require_processes(n_processes, model.encoder.settings.n_threads)
    files = find_inputs(names, apart_from=folder)
    prompt = model.prompt_of(prompt_name, prompt)
    width = model.header.require_width(model.truncate_dim if truncate_dim is None else truncate_dim)
    is_normalized = model.header.is_normalized if normalize is None else normalize
    require_precision(precision, model.header, width, is_normalized=is_normalized)
    options = Options(model.opening, model.fingerprint(width), prompt, width, precision, normalize)
    size_bytes = model.header.path.stat().st_size
    settings = Settings(
        model.header.path.name,
        prompt,
        width,
        options.fingerprint,
        precision,
        normalize,
        model.max_seq_length,
        model.encoder.settings.deterministic,
        column,
        glance(files, column),
        keep_text,
        shard_rows or next(n_rows for most_bytes, n_rows in _SHARD_ROWS if size_bytes < most_bytes),
        stat_inputs(files),
    )
    with locked(folder):
        _require_folder(folder, settings, force=force)
        done = finished_shards(folder, settings.hash)
        require_order(folder, done, whole=False)
        totals = read_manifest(folder)["totals"]
        if totals is None or totals["n_shards"] != len(done):
            shards = cut(
                settings.inputs,
                column=column,
                ids=settings.ids,
                shard_rows=settings.shard_rows,
                done={number: facts.end for number, facts in done.items()},
            )
            if n_processes is None:
                n_processes = choose_processes(model, sum(file.size_bytes for file in settings.inputs))
            with _open_pool(model, options, size_bytes, n_processes=n_processes, ray=ray) as pool:
                done.update(_write_all(folder, settings, pool, shards))
        require_order(folder, done, whole=True)
        if totals is None:
            finished = [done[number] for number in sorted(done)]
            n_ids = 0 if settings.ids == "position" else sum(it.n_texts for it in finished)
            totals = vars(Totals.of(finished, n_repeated_ids=count_repeated_ids(folder, n_ids) if n_ids else 0))
            _write_manifest(folder, settings, totals)
    return Totals(**totals | {"broken": tuple(totals["broken"])})


def _open_pool(
    model: Embedder, options: Options, size_bytes: int, *, n_processes: int, ray: str | None
) -> AbstractContextManager[Pool]:
    if ray is None and n_processes == 1:
        return own_process(model, options)
    model.close()  # its memory is for the others
    return ray_cluster(ray, options, size_bytes) if ray else processes(n_processes, options)


def _write_all(
    folder: Path, settings: Settings, pool: Pool, shards: Iterator[Shard]
) -> Iterator[tuple[int, ShardFacts]]:
    """Number and facts of every shard once it is written. One more than can be computed at once is read ahead."""
    first = next(shards, None)
    if first is None:
        return
    n_bytes = sum(file.size_bytes for file in settings.inputs) - first.n_bytes_before
    waiting: dict[Future[Embedded], Shard] = {}
    with progress("embed", max(1, n_bytes)) as advance:
        pace = _Pace(advance)
        for shard in chain([first], shards):
            waiting[pool.submit(shard.texts)] = shard
            if len(waiting) > pool.n_slots():
                yield from _write_finished(folder, settings, pool, waiting, pace)
        while waiting:
            yield from _write_finished(folder, settings, pool, waiting, pace)


def _write_finished(
    folder: Path, settings: Settings, pool: Pool, waiting: dict[Future[Embedded], Shard], pace: _Pace
) -> Iterator[tuple[int, ShardFacts]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        shard, embedded = waiting.pop(future), pool.result(future)
        hash_, ids, keep_text = settings.hash, settings.ids, settings.keep_text
        facts = write_shard(folder, shard, embedded, job=hash_, ids=ids, keep_text=keep_text)
        pace.tell(shard, facts)
        yield shard.number, facts


class _Pace:
    """Says how far a job is by the bytes of its input, and how fast it has been since this run began."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._begin = time.monotonic()
        self._n_texts = self._n_tokens = 0

    def tell(self, shard: Shard, facts: ShardFacts) -> None:
        self._n_texts += facts.n_texts
        self._n_tokens += facts.n_tokens
        seconds = time.monotonic() - self._begin
        note = f"{self._n_texts / seconds:,.0f} texts/s, {self._n_tokens / seconds:,.0f} tokens/s"
        self._advance(max(0, shard.n_bytes - shard.n_bytes_before), note)


def _require_folder(folder: Path, settings: Settings, *, force: bool) -> None:
    """Begin a manifest, or find that the folder's is of this job. Raises `OutputError` for any other folder."""
    path = folder / MANIFEST
    if force and path.exists():  # which says that the others are f2gguf's; it goes last, for a run that is stopped
        if inside := [it.name for it in settings.inputs if is_inside(Path(it.name), folder)]:
            raise WrongUsage(f"--input {inside[0]}: lies in {folder}, which --force empties. Choose another -o.")
        for old in [*folder.glob("part-*.parquet"), *folder.glob("_rejects-*.jsonl"), path]:
            old.unlink()
    if not path.exists():
        if others := sorted(it.name for it in folder.iterdir() if it.suffix != PART_SUFFIX):
            raise OutputError(f"{folder}: holds other files ({others[0]}), and no manifest. Choose another -o.")
        _write_manifest(folder, settings, None)
        return
    stated = read_manifest(folder)["settings"]
    model, there, ours = stated["model"], _compared(stated), _compared(settings.as_dict())
    for name, value in ours.items():
        if (found := there.get(name)) != value:
            what = f"{name} is {_short(found)} there, and {_short(value)} here"
            if name == "inputs":
                what = "the input files are not those that it was begun with, or have changed"
            if name == "fingerprint":
                what = f"its vectors are of another file or pooling ({model} there, {settings.model} here)"
            raise OutputError(f"{folder}: {what}. Use the same, or another -o. With --force, it begins again.")


def _hash(settings: dict[str, Any]) -> str:
    return sha256_text(json.dumps(_compared(settings)))[:16]


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the names of files, which another machine may have elsewhere; the bytes of the files count."""
    files = [[file["size_bytes"], file["sha256"]] for file in settings["inputs"]]
    return {name: value for name, value in settings.items() if name != "model"} | {"inputs": files}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_manifest(
    folder: Path, *, next_step: str = "Choose another -o, or pass --force to begin again."
) -> dict[str, Any]:
    """What `embed_corpus` wrote about a folder: settings, and once it is complete, totals; else None for these.

    Raises `OutputError` for a manifest that is damaged or of something else.
    """
    path = folder / MANIFEST
    with parsing(path, OutputError, next_step):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["settings"]["inputs"], list):
            raise ValueError("an unknown format")
        return {"settings": manifest["settings"], "totals": manifest["totals"]}


def require_complete(folder: Path) -> dict[str, Any]:
    """The settings of a folder whose shards are all there. Raises `InputError` for any other folder of shards."""
    manifest = read_manifest(folder, next_step="Embed the corpus again.")
    settings, totals = manifest["settings"], manifest["totals"]
    shards = finished_shards(folder, _hash(settings))
    if totals is None or totals["n_shards"] != len(shards):
        raise InputError(f"{folder}: is not complete. Run its `f2gguf embed` again, which goes on.")
    require_order(folder, shards, whole=True)
    return dict(settings)


def _write_manifest(folder: Path, settings: Settings, totals: dict[str, Any] | None) -> None:
    values = {"format": FORMAT, "settings": settings.as_dict(), "totals": totals}
    write_text(folder / MANIFEST, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
