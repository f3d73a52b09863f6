"""Files of texts: what is read of them, and one clear error for what cannot be read. Nothing is dropped in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from f2gguf.runtime.errors import ExtraMissing, F2ggufError, InputError, UnknownName
from f2gguf.runtime.tables import texts as tables
from f2gguf.runtime.tables.texts import Row, Texts, iter_rows, read_texts

TEXTS = ("one, two", "zwei\nZeilen", "三; |")
CSV = 'id{0}text\r\n7{0}"one, two"\r\n8{0}"zwei\nZeilen"\r\n9{0}"三; |"\r\n'


def read(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> Texts:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(data)
    return read_texts(str(tmp_path / name), **options)


def refusal(tmp_path: Path, name: str, content: str | bytes, **options: Any) -> str:
    with pytest.raises(F2ggufError) as raised:
        read(tmp_path, name, content, **options)
    assert type(raised.value) in (InputError, UnknownName)
    assert len(str(raised.value)) < 500
    return str(raised.value).replace(f"{tmp_path}/", "")


def parquet(path: Path, columns: dict[str, Any]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    __import__("pyarrow.parquet").parquet.write_table(pyarrow.table(columns), path)
    return str(path)


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_say_the_encoding(tmp_path: Path, encoding: str) -> None:
    assert read(tmp_path, "x.txt", "München\n三\n".encode(encoding)).texts == ("München", "三")
    assert read(tmp_path, "x.csv", CSV.format(";").encode(encoding)).texts == TEXTS
    assert read(tmp_path, "x.jsonl", '{"text": "三"}\n'.encode(encoding)).texts == ("三",)


def test_both_byte_orders_are_read(tmp_path: Path) -> None:
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff")):
        assert read(tmp_path, "x.txt", mark + "a\n三".encode(encoding)).texts == ("a", "三")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv", "x.tsv"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("fine\nalso\n".encode("utf-16-le"), "line 1: holds NUL characters, .* iconv -f UTF-16LE -t UTF-8"),
        ("fine\nalso\n".encode("utf-16-be"), "line 1: holds NUL characters, .* iconv -f UTF-16BE -t UTF-8"),
        ("fine\nalso\n".encode("utf-32-le"), "line 1: holds NUL characters, .* iconv -f UTF-32LE -t UTF-8"),
        ("fine\nalso\n".encode("utf-32-be"), "line 1: holds NUL characters, .* iconv -f UTF-32BE -t UTF-8"),
        ("fine\nMünchen\n".encode("utf-16-le"), "line 2: is not UTF-8 .* iconv -f UTF-16LE -t UTF-8"),
        ("fine\nMünchen\n".encode("latin-1"), r"line 2: is not UTF-8 \(invalid .* iconv -f ISO-8859-1 -t UTF-8"),
        (b"\xff\xfea\0\n\0b", r"line 2: is not UTF-16LE \(truncated data\)"),
        (b"\xef\xbb\xbfa\n\xff", "line 2: is not UTF-8 "),
        (b"fine\n\x7fELF\0\0\0\n", "line 2: holds NUL characters, .* or what is no text"),
        (b"one\0two\0", "line 1: holds NUL characters"),
        (b"\x1f\x8b\x08\0...", "is no text, but packed as .gz files are. Unpack it first .gunzip --keep."),
        (b"PK\x03\x04...", "is no text, but packed as .zip files are"),
        (b"\x28\xb5\x2f\xfd...", "is no text, but packed as .zst files are"),
    ],
)
def test_other_bytes_are_refused_with_the_line_and_a_command(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    message = refusal(tmp_path, name, content)
    assert message.startswith(f"{name}")
    assert re.search(words, message), message


def test_escaped_nuls_are_characters(tmp_path: Path) -> None:
    assert read(tmp_path, "x.jsonl", '{"text": "a\\u0000b"}').texts == ("a\0b",)


def test_packed_files_are_told_by_their_names_as_well(tmp_path: Path) -> None:
    assert refusal(tmp_path, "x.jsonl.zip", b"") == "x.jsonl.zip: is compressed. Unpack it first: unzip x.jsonl.zip"


class Zstd:
    """As pyarrow packs."""

    @staticmethod
    def compress(data: bytes) -> bytes:
        return bytes(pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(("ending", "library"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma), (".zst", Zstd)])
def test_packed_files_are_unpacked_as_they_are_read(tmp_path: Path, ending: str, library: Any) -> None:
    content = "text,id\na,1\nb,2\n"
    packed = library.compress(content.encode())
    assert read(tmp_path, "x.csv" + ending, packed) == read(tmp_path, "x.csv", content)
    changed = [packed[:10] + b"\0\0\0" + packed[13:]] * (ending != ".zst")  # whose checksum may be left out
    for damaged in (packed[:-9], b"text\na\n", *changed):
        assert refusal(tmp_path, "x.csv" + ending, damaged).startswith(f"x.csv{ending}: cannot be read: ")
    assert "no input format is called '.gz'" in refusal(tmp_path, "x.parquet.gz", b"")


# Ids


def test_positions_are_the_ids_of_a_file_without_ids(tmp_path: Path) -> None:
    rows = read(tmp_path, "x.jsonl", '"a"\n\n{"text": "b", "id": null}\n{"text": "c", "id": ""}\n')
    assert (rows.ids, rows.has_ids) == ((0, 1, 2), False)


def test_a_row_without_an_id_has_null_and_nobody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(tmp_path, "x.jsonl", '{"id": 0, "text": "a"}\n{"text": "b"}\n{"id": "", "text": "c"}\n')
    assert (rows.ids, rows.has_ids) == ((0, None, None), True)
    assert capsys.readouterr().err == f"{tmp_path}/x.jsonl: 2 of 3 rows have no id; it is null in the output\n"
    assert rows.without([0]).ids == (None, None)


def test_ids_of_several_rows_are_said_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(tmp_path, "x.csv", "id,text\na,1\na,2\nb,3\n").ids == ("a", "a", "b")
    assert capsys.readouterr().err == f"{tmp_path}/x.csv: 1 ids belong to several rows, 'a' for one\n"


@pytest.mark.parametrize(
    ("row_id", "words"),
    [
        ("1.5", "its id is 1.5 of type float"),
        ("NaN", "its id is nan of type float"),
        ("true", "its id is True of type bool"),
        ("[1]", "its id is [1] of type list"),
        ('"\\ud800"', "character 1 is a lone surrogate"),
    ],
)
def test_other_ids_are_refused(tmp_path: Path, row_id: str, words: str) -> None:
    assert words in refusal(tmp_path, "x.jsonl", f'{{"id": "a", "text": "a"}}\n{{"id": {row_id}, "text": "b"}}')


def test_corpora_of_beir_are_read_as_beir_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = [
        {"_id": "d1", "title": "Gzip", "text": "packs files ", "metadata": {"url": "x"}},
        {"_id": "d2", "title": "", "text": " as it is"},
        {"_id": "d3", "title": None, "text": "text"},
        {"_id": "d4", "title": "Empty", "text": ""},
    ]
    content = "".join(json.dumps(row) + "\n" for row in corpus)
    rows = read(tmp_path, "corpus.jsonl", content)
    assert rows.ids == ("d1", "d2", "d3", "d4")
    assert rows.texts == ("Gzip packs files", " as it is", "text", "Empty")
    words = "2 of 4 rows have a title, which is put before the text (with --column text it is not)"
    assert capsys.readouterr().err == f"{tmp_path}/corpus.jsonl: {words}\n"
    assert read(tmp_path, "corpus.jsonl", content, column="text").texts[0] == "packs files "
    assert read(tmp_path, "corpus.jsonl", content.replace("null", '"x"'), column="title").texts[2] == "x"
    assert capsys.readouterr().err == ""
    assert "has no text under 'title', but 5 of type int" in refusal(tmp_path, "x.jsonl", '{"title": 5, "text": "a"}')


def test_id_goes_before_beirs_id(tmp_path: Path) -> None:
    assert read(
        tmp_path, "x.jsonl", '{"_id": "b", "id": "a", "text": ""}\n{"_id": "c", "id": null, "text": ""}'
    ).ids == ("a", "c")


# JSON


@pytest.mark.parametrize("value", ["null", "NaN", "5", '["a"]', '{"a": 1}', "true"])
def test_what_is_no_text_is_named_with_line_and_type(tmp_path: Path, value: str) -> None:
    message = refusal(tmp_path, "x.jsonl", f'{{"text": "a"}}\n\n{{"id": 1, "text": {value}}}\n')
    assert message.startswith("x.jsonl, line 3: has no text under 'text', but ")
    assert message.endswith("Name the key of the text with --column.")
    assert " of type " in message


def test_a_missing_key_is_told_the_keys_that_are_there(tmp_path: Path) -> None:
    message = refusal(tmp_path, "x.jsonl", '{"id": 1, "body": "a"}')
    assert "line 1: has no text under 'text', only id, body. Name the key" in message
    assert read(tmp_path, "x.jsonl", '{"id": 1, "body": "a"}', column="body").texts == ("a",)
    assert "has no text under 'text', but is 5 of type int" in refusal(tmp_path, "x.jsonl", "5")


def test_a_json_list_is_read(tmp_path: Path) -> None:
    rows = read(tmp_path, "x.json", '[{"id": "a", "text": "one"},\n {"id": "b", "text": "two"}]')
    assert (rows.ids, rows.texts) == (("a", "b"), ("one", "two"))
    assert read(tmp_path, "x.json", '["one", "two"]').texts == ("one", "two")
    assert read(tmp_path, "x.ndjson", '"one"\n"two"').texts == ("one", "two")
    assert "item 2: has no text under 'text', but None of type NoneType" in refusal(
        tmp_path, "x.json", '["a", {"text": null}]'
    )
    assert "x.json: holds {'text': {'0': 'a'}} of type dict, and no list" in refusal(
        tmp_path, "x.json", '{"text": {"0": "a"}}'
    )
    assert "If each line is an object, call the file .jsonl" in refusal(
        tmp_path, "x.json", '{"text": "a"}\n{"text": "b"}'
    )


# CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_the_one_of_the_header_row(tmp_path: Path, delimiter: str) -> None:
    rows = read(tmp_path, "x.csv", CSV.format(delimiter))
    assert (rows.ids, rows.texts) == (("7", "8", "9"), TEXTS)


def test_a_single_column_needs_no_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path, "x.csv", 'text\n"a; b"\n\n"c, d"\n').texts == ("a; b", "c, d")
    assert read(tmp_path, "x.csv", "text\na; b\nc|d\n").texts == ("a; b", "c|d")


def test_a_header_is_never_taken_for_one_name(tmp_path: Path) -> None:
    """`--column 'id;text'` would embed "1;hello"."""
    for column in ("id;text", "body"):
        message = refusal(tmp_path, "x.csv", "id;text\n1;hello\n", column=column)
        assert f"no column of x.csv is called {column!r}" in message
        assert "Known: id, text. Name one with --column. (The first row names the columns.)" in message


def test_a_file_without_a_header_is_told_that_the_first_row_names_the_columns(tmp_path: Path) -> None:
    message = refusal(tmp_path, "x.tsv", f"1\t{'hello ' * 50}\n2\tworld\n")
    assert "Known: 1, hello hello hello hello hello hello h.... Name one" in message
    assert "(The first row names the columns.)" in message


def test_names_may_have_spaces_and_quotes_around_them(tmp_path: Path) -> None:
    assert read(tmp_path, "x.csv", '\n"id", text\n1,a\n').texts == ("a",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "id,text\n1,a\n2,b,c\n", "line 3: has another number of fields than the header row: 3 instead of 2"),
        ("x.csv", "id;text\n1;a\n2\n", "line 3: has another number of fields than the header row: 1 instead of 2"),
        ("x.csv", "text\na, b\n", "2 instead of 1. A text that holds ',' must stand in quotes"),
        ("x.csv", 'id,text\n1,"a\n2,b\n', "line 2: does not parse as CSV: unexpected end of data"),
        ("x.csv", 'id,text\n1,"say "hi""\n', "line 2: does not parse as CSV: ',' expected after '\"'"),
        ("x.csv", "text,id,text\na,1,b\n", "2 columns are called 'text'. Rename all but one"),
        ("x.tsv", "id;text\n1;a\n", "no column of x.tsv is called 'text'"),
        ("x.tsv", 'id\ttext\n1\t"a\n2\tb\n3\tc"\n', "line 2: a quote makes one row of this line and the 2 below it"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    assert words in refusal(tmp_path, name, content)


def test_quoted_line_ends_of_a_tsv_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, "x.tsv", CSV.format("\t")).texts == TEXTS
    assert read(tmp_path, "x.tsv", 'text\n"a\nb"\n').texts == ("a\nb",)


def test_huge_fields_are_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, "x.csv", f"id,text\n1,{'a' * 300_000}\n").texts[0]) == 300_000


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv", "x.tsv"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_holds_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    assert read(tmp_path, name, content).texts == ()


# Parquet


def test_parquet_is_read(tmp_path: Path) -> None:
    columns = {"_id": ["a", "b"], "title": ["T", None], "text": ["one", "zwei\n"], "n": [1, 2], "kind": ["query", None]}
    rows = read_texts(parquet(tmp_path / "x.parquet", columns))
    assert (rows.ids, rows.texts, rows.kinds) == (("a", "b"), ("T one", "zwei\n"), ("query", ""))
    assert read_texts(parquet(tmp_path / "y.parquet", {"id": [3, 4], "body": ["a", "b"]}), column="body").ids == (3, 4)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a", None]}, "row 2: has no text under 'text', but None of type NoneType"),
        ({"text": [1.5, float("nan")]}, "row 1: has no text under 'text', but 1.5 of type float"),
        ({"text": [b"a"]}, "row 1: has no text under 'text', but b'a' of type bytes"),
        ({"text": ["a"], "id": [1.5]}, "row 1: its id is 1.5 of type float"),
        ({"body": ["a"]}, "no column of x.parquet is called 'text'. Did you mean"),
    ],
)
def test_what_parquet_lacks_is_named(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    path = parquet(tmp_path / "x.parquet", columns)
    assert words.removesuffix(". Did you mean") in refusal(tmp_path, "x.parquet", Path(path).read_bytes())


def test_parquet_values_that_python_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets = pyarrow.array([0, 2, 4, 5], pyarrow.int32()).buffers()[1]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"ok\xff\xfex")])
    rows = [row for _, row in iter_rows(parquet(tmp_path / "x.parquet", {"text": texts}))]
    assert [isinstance(row, InputError) for row in rows] == [False, True, False]
    assert "x.parquet, row 2: has a value that cannot be read: 'utf-8' codec" in str(rows[1])
    late = pyarrow.array([2**53], pyarrow.timestamp("ms"))  # after the year 9999
    path = Path(parquet(tmp_path / "y.parquet", {"text": ["a"], "id": late}))
    assert "row 1: has a value that cannot be read: " in refusal(tmp_path, "y.parquet", path.read_bytes())


def test_other_bytes_are_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert "x.parquet: cannot be read as Parquet: " in refusal(tmp_path, "x.parquet", b"text\none\n")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda _: None)
    with pytest.raises(ExtraMissing, match=r"pip install 'f2gguf\[parquet\]'"):
        read(tmp_path, "x.parquet", b"")


# The commands


@pytest.mark.parametrize("name", ["x.md", "x", "x.docx", "x.pdf"])
def test_other_endings_are_refused_with_those_that_are_read(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, name, b"text")
    assert "Known: .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet." in message


def test_outputs_say_null_for_a_missing_id(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": 1, "text": "a"}\n{"text": "b"}\n')
    arguments = ("f2gguf", "embed", "-m", nano_f16, "--input", tmp_path / "x.jsonl")
    assert [json.loads(line)["id"] for line in run(*arguments).stdout.splitlines()] == [1, None]
    process = run(*arguments, "-o", tmp_path / "x.npy")
    assert process.stderr == f"{tmp_path}/x.jsonl: 1 of 2 rows have no id; it is null in the output\n"
    assert (tmp_path / "x.ids.jsonl").read_text() == "1\nnull\n"
    process = run("f2gguf", "search", "-m", nano_f16, "--docs", tmp_path / "x.jsonl", "b")
    assert sorted(line.split()[2] for line in process.stdout.splitlines()) == ["-", "1"]


def test_ids_of_vectors_that_are_overwritten_go_with_them(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a", "text": "a"}\n')
    for source in (["--input", tmp_path / "x.jsonl"], ["a", "b"]):
        run("f2gguf", "embed", "-m", nano_f16, *source, "-o", tmp_path / "x.npy", "--force")
    assert np.load(tmp_path / "x.npy").shape == (2, 256)
    assert not (tmp_path / "x.ids.jsonl").exists()


@pytest.mark.slow
def test_every_command_reads_the_same_files(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"_id": "a", "title": "Cats", "text": "purr"}\n{"_id": "b", "text": null}\n')
    for command in (
        ["f2gguf", "embed", "-m", nano_f16, "--input"],
        ["f2gguf", "search", "-m", nano_f16, "query", "--docs"],
        ["f2gguf", "bench", "-m", nano_f16, "--input"],
        ["quantize", "verify", nano_f16, "--against", nano_f16, "--corpus"],
        ["quantize", "imatrix", nano_f16, "--calibration"],
    ):
        process = run(*command, tmp_path / "x.jsonl")
        assert (process.returncode, process.stdout) == (1, "")
        assert "x.jsonl, line 2: has no text under 'text', but None of type NoneType" in process.stderr


def test_texts_that_are_left_have_the_numbers_of_their_rows() -> None:
    """Else nobody could tell which rows of a matrix are of which texts."""
    left = Texts.of([Row(text) for text in "abc"]).without([1])
    assert (left.texts, left.ids, left.has_ids) == (("a", "c"), (0, 2), True)
