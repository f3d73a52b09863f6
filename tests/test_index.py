"""An index gives what exact search gives, is brought up to date by what changed, and refuses other vectors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from f2gguf.runtime import Embedder
from f2gguf.runtime.corpus.job import embed_corpus
from f2gguf.runtime.corpus.shards import read_rows
from f2gguf.runtime.errors import ExtraMissing, F2ggufError, InputError, OutputError, WrongUsage
from f2gguf.runtime.index import faiss as faiss_kind
from f2gguf.runtime.index import kinds
from f2gguf.runtime.index.exact import nearest
from f2gguf.runtime.index.kinds import KINDS, cover, measure_search, searcher
from f2gguf.runtime.index.search import search_index
from f2gguf.runtime.index.store import Document, Store
from f2gguf.runtime.index.update import Changes, update_index
from f2gguf.runtime.llama.encoder import normalized
from f2gguf.runtime.tables.texts import Row

FACTS = {
    "fingerprint": "f",
    "model": "m",
    "prompt": "",
    "width": 16,
    "max_tokens": 9,
    "pooling": "last",
    "add_eos": False,
}
N = 300


@pytest.fixture(scope="module")
def model(own: Path) -> Iterator[Embedder]:
    with Embedder(own, n_threads=1) as model:
        yield model


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """N documents of random unit vectors, of which a tenth was removed again."""
    tmp_path.joinpath("index").mkdir()
    with contextlib.closing(Store(tmp_path / "index", facts=FACTS)) as store:
        store.put([Document.of(Row(f"text {i}", i)) for i in range(N)], unit_vectors(N))
        with store.transaction():
            store.remove([f"id:{i}" for i in range(0, N, 10)])
        yield store


def unit_vectors(n: int, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).standard_normal((n, 16)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def require(ending: str) -> None:
    pytest.importorskip(KINDS[ending].package)
    if ending == ".db" and not hasattr(__import__("sqlite3").Connection, "enable_load_extension"):
        pytest.importorskip("pysqlite3")


def write_docs(path: Path, rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in rows.items()))
    return str(path)


def test_exact_search_is_the_sorted_product() -> None:
    vectors, queries = unit_vectors(50), unit_vectors(3, seed=1)
    expected = queries @ vectors.T
    expected[:, [4, 7]] = -1
    scores, keys = nearest(vectors, queries, 10, without=np.array([104, 107]), first=100)
    np.testing.assert_array_equal(keys - 100, np.argsort(-expected, axis=1)[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :10], rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_finds_what_exact_search_finds(store: Store, ending: str) -> None:
    require(ending)
    cover(store, KINDS[ending])
    queries = unit_vectors(20, seed=1)
    expected, found = searcher(store, None)(queries, 10), searcher(store, KINDS[ending])(queries, 10)
    np.testing.assert_array_equal(found[1], expected[1])  # graphs of 270 vectors miss none
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert measure_search(store, KINDS[ending]).startswith("recall@10 against exact search: 100.0%, ")

    store.put([Document.of(Row(f"later {i}", i)) for i in range(5, 25)], unit_vectors(20, seed=1))
    later = searcher(store, KINDS[ending])(queries, 1)[1]  # not covered yet: found by exact search
    assert later[:, 0].tolist() == list(range(N, N + 20))
    cover(store, KINDS[ending])
    assert store.facts["n_covered"] == N + 20
    expected, found = searcher(store, None)(queries, 10), searcher(store, KINDS[ending])(queries, 10)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize(("most_flat", "most_hnsw", "type_"), [(N, N, "flat"), (9, N, "HNSW"), (9, 9, "IVF")])
def test_faiss_is_chosen_by_size(
    store: Store, monkeypatch: pytest.MonkeyPatch, most_flat: int, most_hnsw: int, type_: str
) -> None:
    require(".faiss")
    monkeypatch.setattr(faiss_kind, "MOST_FLAT", most_flat)
    monkeypatch.setattr(faiss_kind, "MOST_HNSW", most_hnsw)
    assert f"faiss {type_}, 270 documents" in cover(store, KINDS[".faiss"])
    _, keys = searcher(store, KINDS[".faiss"])(unit_vectors(20, seed=1), 10)
    assert not np.isin(keys, store.removed()).any()
    recall = measure_search(store, KINDS[".faiss"])
    assert float(recall.split(": ")[1].split("%")[0]) > (60 if type_ == "IVF" else 95)


@pytest.mark.parametrize("ending", [".faiss", ".usearch"])
def test_damaged_and_outdated_files_are_said_and_searched_exactly(
    store: Store, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    require(ending)
    kind, queries = KINDS[ending], unit_vectors(4, seed=1)
    cover(store, kind)
    expected = searcher(store, None)(queries, 5)[1]
    path = kind.path(store)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    np.testing.assert_array_equal(searcher(store, kind)(queries, 5)[1], expected)
    assert "is behind: all is searched exactly. Run f2gguf index again" in capsys.readouterr().err
    path.write_bytes(whole)
    with store.transaction():
        store.state(n_held=store.facts["n_held"] - 1)  # as after a stop between file and note
    assert kind.load(store) is None
    cover(store, kind)
    np.testing.assert_array_equal(searcher(store, kind)(queries, 5)[1], expected)


def test_a_stop_before_the_first_document_is_begun_again(model: Embedder, tmp_path: Path) -> None:
    out = tmp_path / "index"
    out.mkdir()
    (out / "documents.sqlite").touch()
    with contextlib.closing(Store(out, facts=FACTS)) as store:
        assert store.n_documents == 0
    docs = write_docs(tmp_path / "docs.jsonl", {"a": "one"})
    assert update_index([docs], out, model) == Changes(1, 0, 0, 0)  # of another model than the one that was stopped


def test_what_a_stop_left_behind_is_not_seen(store: Store) -> None:
    store._write_vectors(N, unit_vectors(9, seed=2))  # and the documents were not written
    assert store.vectors().shape == (N, 16)
    store.put([Document.of(Row("new", "new"))], unit_vectors(1, seed=3))
    np.testing.assert_array_equal(store.vectors()[N], unit_vectors(1, seed=3)[0])
    with pytest.raises(RuntimeError), store.transaction():
        store.remove(["id:1"])
        raise RuntimeError
    assert store.n_documents == N - 30 + 1


def test_removed_documents_leave_the_disk_once_they_are_many(store: Store) -> None:
    store.compact()
    assert store.n_keys == N
    expected = searcher(store, None)(unit_vectors(3, seed=1), 5)[0]
    with store.transaction():
        store.remove([f"id:{i}" for i in range(1, N, 5)])
    texts = {text for _, text in store.documents_of(range(N)).values()}
    expected = searcher(store, None)(unit_vectors(3, seed=1), 5)[0]
    store.compact()
    assert (store.n_keys, len(store.removed()), store.facts["n_covered"]) == (210, 0, 0)
    assert {text for _, text in store.documents_of(range(N)).values()} == texts
    np.testing.assert_array_equal(searcher(store, None)(unit_vectors(3, seed=1), 5)[0], expected)
    assert [path.name for path in sorted(store.folder.iterdir())] == ["documents.sqlite", "vectors-1.f32"]


def test_only_what_changed_is_embedded(model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[str] = []

    def embed(texts: list[str], **options: Any) -> Any:
        embedded.extend(texts)
        return Embedder.embed(model, texts, **options)

    monkeypatch.setattr(model, "embed", embed)
    rows = {f"d{i}": f"document {i}" for i in range(12)}
    docs, out = tmp_path / "docs.jsonl", tmp_path / "index"
    assert update_index([write_docs(docs, rows)], out, model) == Changes(12, 0, 0, 0)
    assert embedded == list(rows.values())
    embedded.clear()
    rows["d3"], rows["new"] = "another text", "a new one"
    del rows["d5"]
    assert update_index([write_docs(docs, rows)], out, model) == Changes(1, 1, 10, 1)
    assert sorted(embedded) == ["a new one", "another text"]
    with contextlib.closing(Store(out)) as store:
        assert store.n_documents == 13
        hits = search_index(store, model, ["another text", "document 5"], top=13)
        assert sorted(hit[1] for hit in hits[0]) == sorted([*rows, "d5"])  # type: ignore[type-var]
        assert "document 3" not in {hit[2] for hit in hits[0]}
    assert update_index([str(docs)], out, model, prune=True) == Changes(0, 0, 12, 1)
    with contextlib.closing(Store(out)) as store:
        assert store.n_documents == 12
        alone = model.similarity(model.encode_query(["a"]), model.encode_document(list(rows.values())))[0]
        scores = [hit[0] for hit in search_index(store, model, ["a"], top=12)[0]]
        np.testing.assert_allclose(scores, -np.sort(-alone), atol=1e-5)


def test_texts_without_ids_are_told_apart_by_themselves(model: Embedder, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\none\n")
    assert update_index([str(tmp_path / "x.txt")], tmp_path / "index", model) == Changes(2, 0, 0, 0)
    (tmp_path / "x.txt").write_text("zero\none\ntwo\n")
    assert update_index([str(tmp_path / "x.txt")], tmp_path / "index", model) == Changes(1, 0, 2, 0)


def test_an_index_of_other_vectors_is_refused(
    model: Embedder, nano_f16: Path, minilm_f16: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, out = write_docs(tmp_path / "x.jsonl", {"a": "one", "b": "two"}), tmp_path / "index"
    monkeypatch.setenv("F2GGUF_MODEL", str(nano_f16))  # which an index needs no more than -m
    update_index([docs], out, model)
    with Embedder(nano_f16) as other:
        with pytest.raises(InputError, match=r"its vectors have .* dimensions, and these 256|was made with"):
            update_index([docs], out, other)
        with pytest.raises(InputError, match=r"was made with .*own-tiny.gguf, and .* gives other vectors"):
            search_index(Store(out), other, ["a"], top=1)
    with pytest.raises(InputError, match="tokens at most"), Embedder(model.header.path, max_tokens=10) as other:
        update_index([docs], out, other)
    process = run("f2gguf", "search", "--index", out, "one", "--json", "--top", "1")
    assert json.loads(process.stdout)["text"] in ("one", "two")
    for other_path in (nano_f16, minilm_f16):  # which has vectors of that width, and none
        process = run("f2gguf", "search", "--index", out, "one", "-m", other_path)
        assert (process.returncode, process.stdout) == (1, "")
        assert "gives other vectors" in process.stderr
        assert "warning" not in process.stderr


def test_shards_are_indexed_with_the_vectors_that_they_have(
    model: Embedder, nano_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {f"d{i}": f"document {i}" for i in range(30)}
    docs = write_docs(tmp_path / "docs.jsonl", rows)
    for name, options in {
        "float32": {},
        "float16": {"precision": "float16"},
        "binary": {"precision": "binary"},
    }.items():
        embed_corpus([docs], tmp_path / name, model, keep_text=True, shard_rows=7, **options)
    embed_corpus([docs], tmp_path / "bare", model)
    embed_corpus([docs], tmp_path / "asked", model, keep_text=True, prompt="of other texts: ")
    (tmp_path / "list.txt").write_text("one\ntwo\none\n")
    embed_corpus([str(tmp_path / "list.txt")], tmp_path / "unnamed", model, keep_text=True)
    update_index([docs], tmp_path / "from-texts", model)
    monkeypatch.setattr(model, "embed", None)  # nothing is embedded again
    for name in ("float32", "float16"):
        out = tmp_path / f"from-{name}"
        assert update_index([str(tmp_path / name)], out, model) == Changes(30, 0, 0, 0)
        assert update_index([str(tmp_path / name)], out, model) == Changes(0, 0, 30, 0)
        with contextlib.closing(Store(out)) as made, contextlib.closing(Store(tmp_path / "from-texts")) as expected:
            vectors = np.stack([vector for _, vector in read_rows(tmp_path / name)]).astype(np.float32)
            np.testing.assert_allclose(made.vectors(), normalized(vectors), atol=1e-6)
            assert made.documents_of(range(30)) == expected.documents_of(range(30))
    assert update_index([docs], tmp_path / "from-float32", model) == Changes(0, 0, 30, 0)
    assert update_index([str(tmp_path / "unnamed")], tmp_path / "texts", model) == Changes(2, 0, 0, 0)

    out = tmp_path / "refused"
    for name, words in (
        ("binary", "its vectors are binary, and an index is made of float32"),
        ("bare", "vectors without texts.* Pass --keep-text"),
        ("asked", "stand behind the prompt 'of other texts: ', and documents of the model behind ''"),
    ):
        with pytest.raises(InputError, match=words):
            update_index([str(tmp_path / name)], out, model)
    with pytest.raises(WrongUsage, match="takes it alone, without other documents"):
        update_index([str(tmp_path / "float32"), docs], out, model)
    with pytest.raises(InputError, match=r"dimensions, and not 8 \(--dims\)"):
        update_index([str(tmp_path / "float32")], out, model, truncate_dim=8)
    with (
        pytest.raises(InputError, match=r"was embedded with own-tiny.gguf, and .* gives other vectors"),
        Embedder(nano_f16) as other,
    ):
        update_index([str(tmp_path / "float32")], out, other)
    shard = tmp_path / "float32" / "part-000002.parquet"
    content = shard.read_bytes()
    for damaged, words in (
        (content[:-40], "is not complete. Run its `f2gguf embed` again"),
        (content[:200] + bytes(400) + content[600:], r"part-000002.parquet: cannot be read: .* Remove it, and run"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=words):
            update_index([str(tmp_path / "float32")], out, model)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("index", '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "two texts have the id:1"),
        ("index", '{"id": 1, "text": "a"}\n{"id": 2, "text": null}\n', "line 2: has no text under 'text'"),
        ("index.hnsw", '{"text": "a"}', "no kind of index is called '.hnsw'"),
        ("", '{"text": "a"}', "holds other files, and no index"),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    model: Embedder, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(F2ggufError, match=words):
        update_index([str(tmp_path / "x.jsonl")], tmp_path / name, model)
    assert not name or not (tmp_path / name).exists()


def test_a_missing_package_and_a_folder_without_an_index_are_named(
    model: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "find_spec", lambda _: None)
    for ending, kind in KINDS.items():
        with pytest.raises(ExtraMissing, match=rf"pip install 'f2gguf\[{kind.extra}\]'"):
            update_index([write_docs(tmp_path / "x.jsonl", {"a": "b"})], tmp_path / f"index{ending}", model)
    with pytest.raises(InputError, match=r"is no index of f2gguf \(--index\). Make one: f2gguf index DOCS -o"):
        Store(tmp_path)
    (tmp_path / "documents.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises((InputError, OutputError), match="cannot be read: file is not a database"):
        Store(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", KINDS)
def test_every_kind_takes_odd_ids_and_says_what_it_cannot_write(
    store: Store, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(ending)
    kind, ids = KINDS[ending], [11, "11", 2**70, "a\0b", "id:11"]  # 11 is there already, as a number
    store.put([Document.of(Row(f"odd {row_id}", row_id)) for row_id in ids], unit_vectors(5, seed=4))
    cover(store, kind)
    keys = searcher(store, kind)(unit_vectors(5, seed=4), 1)[1][:, 0].tolist()
    assert [store.documents_of([key])[key][0] for key in keys] == ids
    assert searcher(store, kind)(unit_vectors(1), 40_000)[1].shape == (1, store.n_keys)
    assert len(store.documents_of(range(40_000))) == store.n_documents  # more than SQLite takes as values

    def full(*_: Any) -> None:
        raise kind._class.errors()[0]("the disk is full\nat line 9")

    monkeypatch.setattr(kind._class, "save", full)
    store.put([Document.of(Row("changed", 11))], unit_vectors(1, seed=5))
    with pytest.raises(OutputError, match=r"cannot be written: the disk is full\. .* run the same command again"):
        cover(store, kind)
    assert searcher(store, kind)(unit_vectors(1, seed=5), 1)[1][0, 0] == store.n_keys - 1


def test_a_moved_model_is_asked_for_and_noted(own: Path, run: Run, tmp_path: Path) -> None:
    docs, out, moved = write_docs(tmp_path / "x.jsonl", {"a": "b"}), tmp_path / "index", tmp_path / "moved.gguf"
    shutil.copyfile(own, tmp_path / "own.gguf")
    run("f2gguf", "index", docs, "-m", tmp_path / "own.gguf", "-o", out)
    (tmp_path / "own.gguf").rename(moved)
    assert "is not there any more. Name it with -m" in run("f2gguf", "search", "--index", out, "b").stderr
    run("f2gguf", "index", docs, "-m", moved, "-o", out)
    assert run("f2gguf", "search", "--index", out, "b").returncode == 0
