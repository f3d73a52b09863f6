"""A corpus becomes Parquet shards: the same bytes after any stop and by any number of processes; bad rows go aside."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from f2gguf.runtime import Embedder
from f2gguf.runtime.corpus import job, pools
from f2gguf.runtime.corpus.inputs import find_inputs
from f2gguf.runtime.corpus.job import embed_corpus, require_complete
from f2gguf.runtime.corpus.shards import read_rows
from f2gguf.runtime.errors import ExtraMissing, F2ggufError, InputError, OutputError, WrongUsage

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
SHARD_ROWS = 7
STOP = """
import os, f2gguf.runtime.corpus.job as job
def write_shard(folder, shard, *rest, write=job.write_shard, **options):
    facts = write(folder, shard, *rest, **options)
    if shard.number == {last}:
        os.kill(os.getpid(), 9)
    return facts
job.write_shard = write_shard
"""


@pytest.fixture(scope="module")
def model(own: Path) -> Iterator[Embedder]:
    with Embedder(own, n_threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 rows in three files, of which two are bad."""
    folder = tmp_path_factory.mktemp("docs")
    rows = [json.dumps({"id": f"a{i}", "text": "text " * (1 + i % 5) + str(i)}) for i in range(20)]
    rows[8] = "no json"
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    (folder / "b.csv").write_text("id,text\n" + "".join(f"b{i},row {i}\n" for i in range(11)))
    texts = [None if i == 3 else f"cell {i}" for i in range(10)]
    parquet.write_table(pyarrow.table({"id": [f"c{i}" for i in range(10)], "text": texts}), folder / "c.parquet")
    return folder


@pytest.fixture(scope="module")
def whole(model: Embedder, docs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one run makes of `docs`."""
    folder = tmp_path_factory.mktemp("whole")
    embed_corpus([str(docs)], folder, model, shard_rows=SHARD_ROWS)
    return files_in(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def table_of(folder: Path) -> Any:
    return parquet.read_table(folder)


def test_shards_hold_what_embed_gives(model: Embedder, docs: Path, tmp_path: Path) -> None:
    totals = embed_corpus([str(docs)], tmp_path / "out", model, shard_rows=SHARD_ROWS, keep_text=True)
    table = table_of(tmp_path / "out")
    assert (totals.n_texts, totals.n_rejects, totals.n_shards, totals.n_repeated_ids) == (39, 2, 6, 0)
    assert table["id"].to_pylist()[:9] == [*(f"a{i}" for i in range(8)), "a9"]
    expected = model.embed(table["text"].to_pylist(), prompt=model.header.document_prompt)
    vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
    assert (vectors * expected.vectors).sum(axis=1).min() > 0.99999
    assert table["n_tokens"].to_pylist() == expected.n_tokens.tolist()
    assert sum(expected.n_tokens) == totals.n_tokens
    assert table.schema.field("vector").type == pyarrow.list_(pyarrow.float32(), model.header.n_embd)


def test_bad_rows_are_put_aside_with_line_and_reason(docs: Path, whole: dict[str, bytes]) -> None:
    rejects = [json.loads(line) for name in whole if "rejects" in name for line in whole[name].splitlines()]
    assert [row["where"] for row in rejects] == [f"{docs}/a.jsonl.gz, line 9", f"{docs}/c.parquet, row 4"]
    assert rejects[0]["reason"].startswith("does not parse as JSON: ")
    assert rejects[1]["reason"].startswith("has no text under 'text', but None")


@pytest.mark.parametrize("last", [0, 2, 5])
def test_killed_runs_go_on_and_end_in_the_same_bytes(
    run: Run, own: Path, docs: Path, whole: dict[str, bytes], tmp_path: Path, last: int
) -> None:
    command = ("f2gguf", "embed", "-m", own, "--threads", "1", "--input", docs, "-o", tmp_path / "out")
    command += ("--shard-rows", str(SHARD_ROWS))
    assert run(*command, prelude=STOP.format(last=last)).returncode != 0
    assert len(list((tmp_path / "out").glob("part-*"))) == last + 1
    if last < 5:
        (tmp_path / f"out/part-{last + 1:06}.parquet.part").write_bytes(b"half")
    process = run(*command)
    assert (process.returncode, process.stdout) == (0, f"{tmp_path}/out\n")
    assert files_in(tmp_path / "out") == whole


def test_shards_that_are_lost_or_cut_are_made_again(
    model: Embedder, docs: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "part-000001.parquet").unlink()
    (tmp_path / "part-000004.parquet").write_bytes(whole["part-000004.parquet"][:-100])
    embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS)
    assert files_in(tmp_path) == whole
    assert "part-000004.parquet: is damaged, and is made again" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "lost"), [(3, None), (3, 4), (9, None)])
def test_a_shard_under_another_name_is_refused(
    model: Embedder, docs: Path, whole: dict[str, bytes], tmp_path: Path, target: int, lost: int | None
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    copy = tmp_path / f"part-{target:06}.parquet"
    copy.write_bytes(whole["part-000000.parquet"])
    if lost is not None:
        (tmp_path / f"part-{lost:06}.parquet").unlink()
    with pytest.raises(OutputError, match=f"{copy.name}: does not follow the shard before it.* Move it away"):
        embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS)
    with pytest.raises(InputError if target == 9 or lost else OutputError):
        require_complete(tmp_path)
    copy.unlink()
    embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS)
    assert files_in(tmp_path) == whole


def test_what_an_earlier_text_needed_changes_no_later_shard(
    model: Embedder, docs: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    model.encode(["word " * 300])
    model.encoder.engine._runners[0]._needs_f32 = True
    embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS)
    assert files_in(tmp_path) == whole


@pytest.mark.slow
def test_several_processes_make_the_same_bytes(own: Path, docs: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with Embedder(own, n_threads=2) as model:
        embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS, n_processes=2)
    assert files_in(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_goes_on_where_one_machine_stopped_and_survives_a_lost_node(
    own: Path, docs: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    written = job.write_shard
    from ray.cluster_utils import Cluster

    for name in ("_manifest.json", "part-000002.parquet", "_rejects-000001.jsonl"):
        (tmp_path / name).write_bytes(whole[name])
    begun = json.loads(whole["_manifest.json"]) | {"totals": None}
    (tmp_path / "_manifest.json").write_text(json.dumps(begun, indent=2, ensure_ascii=False) + "\n")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=2)]

        def write_shard(*arguments: Any, **options: Any) -> Any:
            if nodes:  # others of its tasks are at work
                cluster.remove_node(nodes.pop(), allow_graceful=False)
            return written(*arguments, **options)

        monkeypatch.setattr(job, "write_shard", write_shard)
        with Embedder(own, n_threads=1) as model:
            embed_corpus([str(docs)], tmp_path, model, shard_rows=SHARD_ROWS, ray=cluster.address)
    finally:
        cluster.shutdown()
    assert files_in(tmp_path) == whole


def test_ids_are_positions_integers_or_texts(model: Embedder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "int.jsonl").write_text('{"id": 7, "text": "a"}\n{"text": "b"}\n' + '{"id": 1, "text": "c"}\n' * 20)
    with (tmp_path / "int.jsonl").open("a") as file:
        file.write('{"id": "x", "text": "d"}\n')
    (tmp_path / "mixed.jsonl").write_text('{"id": 7, "text": "a"}\n{"id": "x", "text": "b"}\n')
    ids = {}
    for name in ("*.txt", "int.jsonl", "mixed.jsonl"):
        totals = embed_corpus([str(tmp_path / name)], tmp_path / f"out{name[0]}", model)
        ids[name] = table_of(tmp_path / f"out{name[0]}")["id"].to_pylist(), totals.n_rejects, totals.n_repeated_ids
    assert ids["*.txt"] == ([0, 1, 2], 0, 0)
    assert ids["int.jsonl"] == ([7, None, *[1] * 20], 1, 19)
    assert ids["mixed.jsonl"] == (["7", "x"], 0, 0)


def test_a_file_that_breaks_off_is_named_and_the_others_go_on(run: Run, own: Path, tmp_path: Path) -> None:
    data = gzip.compress("".join(f"line {i * 7919 % 1000}\n" for i in range(600)).encode())
    (tmp_path / "a.txt.gz").write_bytes(data[:-300])
    (tmp_path / "b.txt").write_text("the last\n")
    arguments = ("f2gguf", "embed", "-m", own, "--input", tmp_path, "-o", tmp_path / "out", "--keep-text")
    process = run(*arguments, prelude="import f2gguf.runtime.tables.decode as it; it._BLOCK_BYTES = 500\n")
    assert process.returncode == 1
    assert f"error: {tmp_path}/a.txt.gz: could not be read to the end." in process.stderr
    assert table_of(tmp_path / "out")["text"].to_pylist()[-1] == "the last"
    assert "cannot be read" in (tmp_path / "out/_rejects-000000.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "query: "}, "prompt is '' there, and 'query: ' here"),
        ({"precision": "float16"}, "precision is 'float32' there, and 'float16' here"),
        ({"shard_rows": 8}, "shard_rows is 7 there, and 8 here"),
        ({"keep_text": True}, "keep_text is False there, and True here"),
    ],
)
def test_a_folder_of_other_settings_is_refused_untouched(
    model: Embedder, docs: Path, whole: dict[str, bytes], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(OutputError, match=words):
        embed_corpus([str(docs)], tmp_path, model, **{"shard_rows": SHARD_ROWS, **options})
    assert files_in(tmp_path) == whole


def test_force_removes_nothing_of_others(model: Embedder, docs: Path, tmp_path: Path) -> None:
    for name in ("part-00000.snappy.parquet", "_SUCCESS"):
        (tmp_path / name).write_text("of another program")
    with pytest.raises(OutputError, match="holds other files"):
        embed_corpus([str(docs)], tmp_path, model, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"part-00000.snappy.parquet", "_SUCCESS"}


def test_an_input_where_the_vectors_go_is_refused(model: Embedder, docs: Path, tmp_path: Path) -> None:
    embed_corpus([str(docs)], tmp_path, model, keep_text=True)
    part = next(tmp_path.glob("part-*.parquet"))
    with pytest.raises(WrongUsage, match=r"lies in .*, which --force empties"):
        embed_corpus([str(part)], tmp_path, model, force=True)
    assert part.exists()


def test_a_shard_of_rejects_alone_is_read(model: Embedder, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n" * 3 + '{"id": "a", "text": "good"}\n')
    embed_corpus([str(tmp_path / "bad.jsonl")], tmp_path / "out", model, keep_text=True, shard_rows=3)
    assert [row.id for row, _ in read_rows(tmp_path / "out")] == ["a"]


def test_a_folder_of_other_inputs_model_or_makers_is_refused(
    model: Embedder, docs: Path, whole: dict[str, bytes], tmp_path: Path, minilm_f16: Path
) -> None:
    (tmp_path / "x.txt").write_text("another")
    (out := tmp_path / "out").mkdir()
    for name, data in whole.items():
        (out / name).write_bytes(data)
    with pytest.raises(OutputError, match="the input files are not those"):
        embed_corpus([str(docs), str(tmp_path / "x.txt")], out, model, shard_rows=SHARD_ROWS)
    with pytest.raises(OutputError, match=r"its vectors are of another file|width is"), Embedder(minilm_f16) as other:
        embed_corpus([str(docs)], out, other, shard_rows=SHARD_ROWS, prompt="")
    parquet.write_table(pyarrow.table({"a": [1]}), out / "part-000001.parquet")
    with pytest.raises(OutputError, match=r"part-000001.parquet: is no shard of f2gguf"):
        embed_corpus([str(docs)], out, model, shard_rows=SHARD_ROWS)
    with pytest.raises(OutputError, match=r"holds other files \(out\), and no manifest"):
        embed_corpus([str(docs)], tmp_path, model)
    embed_corpus([str(docs)], out, model, shard_rows=SHARD_ROWS, force=True)
    assert files_in(out) == whole


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.jsonl": '{"body": "x"}\n' * 3}, r"line 1: has no text under 'text', only body.* None of the first 3 rows"),
        ({"a.csv": "id,text\n1,a\n", "b.csv": "id,body\n1,a\n"}, "no column of .*b.csv is called 'text'"),
        ({"a.txt": ""}, "a.txt: no text is in there"),
        ({"a.md": "x"}, "there is no file that can be read"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_before_the_work(
    model: Embedder, tmp_path: Path, content: dict[str, str], words: str
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(F2ggufError, match=words):
        embed_corpus([str(tmp_path)], tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


def test_more_processes_than_threads_are_refused_before_the_work(own: Path, docs: Path, tmp_path: Path) -> None:
    with Embedder(own, n_threads=2) as model, pytest.raises(WrongUsage, match="--processes 3: there are 2 threads"):
        embed_corpus([str(docs)], tmp_path / "out", model, n_processes=3)
    assert not (tmp_path / "out").exists()


def test_linked_folders_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("one")
    (tmp_path / "docs" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert find_inputs([str(tmp_path / "docs")]) == [str(tmp_path / "docs" / "a.txt")]
    assert "1 linked folder is left out. Name what is wanted" in capsys.readouterr().err


def test_files_globs_and_folders_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl.gz", "a.csv", ".hidden.txt", "b/.git/x.txt", "out/part.parquet", "x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    out = tmp_path / "out"
    names = [str(Path(it).relative_to(tmp_path)) for it in find_inputs([str(tmp_path)], apart_from=out)]
    assert names == ["a.csv", "b/1.jsonl.gz", "b/2.txt"]
    names = [str(Path(it).relative_to(tmp_path)) for it in find_inputs([f"{tmp_path}/*/*.txt", f"{tmp_path}/b/2.txt"])]
    assert names == ["b/2.txt"]
    with pytest.raises(WrongUsage, match="stdin cannot be read again"):
        find_inputs(["-"])
    with pytest.raises(InputError, match="there is no file that can be read"):
        find_inputs([f"{tmp_path}/*.parquet"])


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one")
    listed = Path.iterdir

    def forbidden(path: Path) -> Any:
        if path.name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(InputError, match="b: cannot be read: Permission denied"):
        find_inputs([str(tmp_path)])


def test_flags_of_a_folder_need_one(run: Run, own: Path, docs: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["--input", docs], "several files become a folder of Parquet shards. Name it: -o FOLDER/."),
        (["a text", "--keep-text"], "--keep-text: is for a folder of Parquet shards."),
        (["a text", "-o", tmp_path / "out"], "a folder takes the texts of files. Name them with --input."),
    ):
        process = run("f2gguf", "embed", "-m", own, *arguments)
        assert (process.returncode, process.stdout) == (2, "")
        assert words in process.stderr


def test_ray_that_is_missing_is_named(
    model: Embedder, own: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "find_spec", lambda _: None)
    with pytest.raises(ExtraMissing, match=r"pip install 'f2gguf\[ray\]'"), Embedder(own) as other:
        embed_corpus([str(docs)], tmp_path / "out", other, ray="auto")
    assert job.read_manifest(tmp_path / "out")["totals"] is None
