"""`f2gguf` as a user types it: inputs, outputs, and one clear error for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import Run
from f2gguf.runtime import Embedder
from f2gguf.runtime.console import progress, progress_by_size, sizes_of
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.library import backends
from safetensors import safe_open

DOCUMENTS = ["an archiver for zip files", "a chess engine", "a database server"]


def embeddings(output: str) -> np.ndarray:
    return np.array([json.loads(line)["embedding"] for line in output.splitlines()], dtype=np.float32)


def test_arguments_become_json_lines(run: Run, nano_f16: Path) -> None:
    process = run("f2gguf", "embed", "-m", nano_f16, *DOCUMENTS, is_real=True)
    assert process.returncode == 0, process.stderr
    assert [json.loads(line)["id"] for line in process.stdout.splitlines()] == [0, 1, 2]
    with Embedder(nano_f16) as fresh:  # a used one may have kept a longer shared beginning, and rounds otherwise
        np.testing.assert_array_equal(embeddings(process.stdout), fresh.encode_document(DOCUMENTS))


def test_lines_on_stdin_with_the_query_prompt(run: Run, nano_f16: Path) -> None:
    process = run("f2gguf", "embed", "-m", nano_f16, "--query", "--dims", "64", stdin="\n".join(DOCUMENTS) + "\n")
    with Embedder(nano_f16) as fresh:
        np.testing.assert_array_equal(embeddings(process.stdout), fresh.encode_query(DOCUMENTS, truncate_dim=64))


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("x.txt", "one\n\nt\u2028wo\r\nthree", [0, 1, 2, 3]),
        ("x.jsonl", '{"id": "a", "text": "one"}\n\n{"id": "b", "text": "two"}\n', ["a", "b"]),
        ("x.jsonl", '"one"\n"two"\n', [0, 1]),
        ("x.csv", 'id,text\r\n7,"one, with\nline"\r\n8,two\r\n', ["7", "8"]),
        ("bom.csv", "\ufeffid,text\n7,one\n", ["7"]),
    ],
)
def test_input_files_keep_their_ids(
    run: Run, nano_f16: Path, tmp_path: Path, name: str, content: str, ids: list
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    process = run("f2gguf", "embed", "-m", nano_f16, "--input", tmp_path / name)
    assert process.returncode == 0, process.stderr
    assert [json.loads(line)["id"] for line in process.stdout.splitlines()] == ids


def test_outputs_hold_the_same_vectors_and_ids(run: Run, nano_f16: Path, nano: Embedder, tmp_path: Path) -> None:
    rows = [{"id": f"doc-{i}", "body": text} for i, text in enumerate(DOCUMENTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted, ids = nano.encode_document(DOCUMENTS), [row["id"] for row in rows]
    for ending in ("npy", "jsonl", "safetensors"):
        arguments = (
            "-m",
            nano_f16,
            "--input",
            tmp_path / "in.jsonl",
            "--column",
            "body",
            "-o",
            tmp_path / f"out.{ending}",
        )
        process = run("f2gguf", "embed", *arguments)
        assert process.returncode == 0, process.stderr
        assert process.stdout.splitlines()[0] == str(tmp_path / f"out.{ending}")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted)
    assert [json.loads(line) for line in (tmp_path / "out.ids.jsonl").read_text().splitlines()] == ids
    np.testing.assert_array_equal(embeddings((tmp_path / "out.jsonl").read_text()), wanted)
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("embeddings"), wanted)
        assert json.loads(file.metadata()["ids"]) == ids


def test_output_says_how_many_tokens_were_seen_and_what_was_cut(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    texts = ("word " * 50, "short")
    flags = ("-m", nano_f16, "--max-tokens", "20")
    rows = [json.loads(line) for line in run("f2gguf", "embed", *flags, *texts).stdout.splitlines()]
    assert [(row["n_tokens"], row["truncated"]) for row in rows] == [(20, True), (rows[1]["n_tokens"], False)]
    assert rows[1]["n_tokens"] < 20
    run("f2gguf", "embed", *flags, *texts, "-o", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        assert file.get_tensor("n_tokens").tolist() == [row["n_tokens"] for row in rows]
        assert file.get_tensor("truncated").tolist() == [True, False]


def test_ctrl_c_is_answered_at_once_and_leaves_nothing(nano_f16: Path, tmp_path: Path) -> None:
    source = tmp_path / "many.txt"
    source.write_text("\n".join(f"text {i} " + "word " * (i % 300) for i in range(30_000)))
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "from f2gguf.quantize.cli import f2gguf; f2gguf()"
    )
    flags = ["embed", "-m", str(nano_f16), "--input", str(source), "-o", str(tmp_path / "out.npy")]
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)  # it is embedding, and for minutes to come
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted: nothing is half written, and finished files are kept."
    assert list(tmp_path.glob("out*")) == []


def test_threads_are_the_processors_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" if sys.platform == "linux" else ""
    code += "from f2gguf.runtime.llama.threads import default_threads; print(default_threads())"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 <= int(process.stdout) <= (1 if sys.platform == "linux" else os.cpu_count() or 1)


def test_where_nothing_is_drawn_lines_say_how_long_work_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("measure", 400) as advance:
        for _ in range(400):
            now += 30
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  measure: 0% in 1 min, about 199 left"
    assert len(lines) < 40, "further apart, the longer it takes"


def test_the_time_left_follows_the_lengths_of_texts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sizes = sizes_of([*["lamp"] * 99, "lamp " * 10_000, "\ud800"], max_tokens=123)
    assert sizes == [493, *[5] * 99, 2], "longest first, and no longer than what is read of it"
    with progress_by_size("measure", sizes) as ended:
        now += 60
        ended(1)
        now += 60
        ended(99)
    assert capsys.readouterr().err.splitlines() == [
        "  measure: 50% in 1 min, about 1 left",
        "  measure: 100% in 2 min, about 0 left",
    ]


def test_search_ranks_what_fits_first(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text("\n".join(DOCUMENTS))
    process = run("f2gguf", "search", "-m", nano_f16, "--docs", tmp_path / "docs.txt", "unpack zip archives", "--json")
    hits = [json.loads(line) for line in process.stdout.splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["text"] == DOCUMENTS[0]
    assert hits[0]["score"] > hits[1]["score"] >= hits[2]["score"]


def test_inspect_speaks_to_people_and_machines(run: Run, nano_f16: Path) -> None:
    words, machine = run("f2gguf", "inspect", nano_f16), run("f2gguf", "inspect", nano_f16, "--json")
    assert re.search(r"^pooling +last$", words.stdout, re.MULTILINE)
    assert re.search(rf"^kernels +{json.loads(machine.stdout)['kernels']}$", words.stdout, re.MULTILINE)
    assert json.loads(machine.stdout)["dims"] == [32, 64, 128, 256]
    assert len(json.loads(machine.stdout)["tensors"]) == 46


def test_model_may_come_from_the_environment(run: Run, nano_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2GGUF_MODEL", str(nano_f16))
    assert run("f2gguf", "embed", "a").returncode == 0


def test_cut_texts_are_announced_once(run: Run, nano_f16: Path) -> None:
    process = run("f2gguf", "embed", "-m", nano_f16, "--max-tokens", "8", "word " * 20, "other " * 20)
    assert process.stderr.count("warning: 2 of 2 texts are longer than 8 tokens and were cut") == 1
    assert process.stderr.count("\n") == 1


BAD_CALLS = [
    (["embed", "a"], 2, "no model: pass -m MODEL"),
    (["embed", "-m", "absent.gguf", "a"], 1, "absent.gguf: no such file"),
    (["embed", "-m", "{nano}"], 2, "stdin: holds no text"),
    (["embed", "-m", "{nano}", "--query", "--prompt", "x", "a"], 2, "--query and --prompt: choose one"),
    (["embed", "-m", "{nano}", "--prompt-name", "queri", "a"], 2, "Did you mean 'query'?"),
    (["embed", "-m", "{nano}", "--dims", "100", "a"], 2, "was trained for 32, 64, 128, 256"),
    (["embed", "-m", "{nano}", "--dtype", "int4", "a"], 2, "no precision is called 'int4'"),
    (["embed", "-m", "{nano}", "--device", "cude", "a"], 2, "Did you mean 'cuda'?"),
    (["embed", "-m", "{nano}", "--max-tokens", "1", "a"], 2, "max_tokens is 1"),
    (["embed", "-m", "{nano}", "--input", "{dir}/x.docx"], 2, "no input format is called '.docx'"),
    (["embed", "-m", "{nano}", "--input", "{dir}/absent.txt"], 1, "absent.txt: cannot be read: No such file"),
    (["embed", "-m", "{nano}", "-o", "{dir}/x.parquet", "a"], 2, "no output format is called '.parquet'"),
    (["embed", "-m", "{nano}", "-o", "{dir}/there.npy", "a"], 1, "there.npy: exists already. Pass --force"),
    (["embed", "-m", "{nano}", "-o", "{dir}/there.npy/x.npy", "a"], 1, "x.npy: cannot be written"),
    (["embed", "-m", "{nano}", "--input", "{dir}/bad.jsonl"], 1, "bad.jsonl, line 2: does not parse as JSON"),
    (["embed", "-m", "{nano}", "--input", "{dir}/number.jsonl"], 1, "number.jsonl, line 1: has no text under 'text'"),
    (
        ["embed", "-m", "{nano}", "--input", "{dir}/surrogate.jsonl"],
        1,
        "surrogate.jsonl, line 1: character 1 is a lone surrogate",
    ),
    (["embed", "-m", "{nano}", "--input", "{dir}/latin1.txt"], 1, "latin1.txt, line 2: is not UTF-8"),
    (["embed", "-m", "{nano}", "--input", "{dir}/ragged.csv"], 1, "ragged.csv, line 3: has another number of fields"),
    (["embed", "-m", "{nano}", "--input", "{dir}/other.csv"], 2, "Known: id, body. Name one with --column"),
    (["embed", "-m", "{nano}", "--input", "{dir}/empty.txt"], 2, "holds no text"),
    (["search", "-m", "{nano}", "--docs", "{dir}/empty.txt", "q"], 2, "holds no documents"),
    (["inspect", "{dir}/there.npy"], 1, "there.npy: is not a GGUF file"),
    (["inspect", "{dir}/empty.txt"], 1, "empty.txt: cannot be read as GGUF"),
    (["inspect", "{dir}/cut.gguf"], 1, "cut.gguf: truncated: "),
    (["inspect", "{dir}/cut-header.gguf"], 1, "cut-header.gguf: truncated inside its header"),
    (["embed", "-m", "{dir}/imatrix.gguf", "a"], 1, "imatrix.gguf: holds no model (general.type is 'imatrix'"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, nano_f16: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {
        "there.npy": b"there",
        "bad.jsonl": b'{"text": "a"}\n{"text": \n',
        "number.jsonl": b'{"text": 5}\n',
        "surrogate.jsonl": b'{"text": "\\ud83d"}\n',
        "latin1.txt": "fine\nMünchen\n".encode("latin-1"),
        "ragged.csv": b"id,text\n1,one\n2,two,three\n",
        "other.csv": b"id,body\n1,one\n",
        "empty.txt": b"",
        "cut.gguf": nano_f16.read_bytes()[:-100_000],
        "cut-header.gguf": nano_f16.read_bytes()[:5000],
    }.items():
        (folder / name).write_bytes(content)
    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "qwen3")
    writer.add_type("imatrix")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize(("arguments", "exit_code", "message"), BAD_CALLS)
def test_mistakes_get_one_clear_error(
    run: Run, nano_f16: Path, bad_files: Path, arguments: list[str], exit_code: int, message: str
) -> None:
    before = sorted(bad_files.iterdir())
    process = run("f2gguf", *(a.replace("{nano}", str(nano_f16)).replace("{dir}", str(bad_files)) for a in arguments))
    assert message in process.stderr
    assert process.returncode == exit_code
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stderr
    assert process.stdout == ""
    assert sorted(bad_files.iterdir()) == before


@pytest.mark.skipif("CUDA" in backends(), reason="this build has CUDA")
def test_missing_device_says_how_to_reinstall(run: Run, nano_f16: Path) -> None:
    process = run("f2gguf", "embed", "-m", nano_f16, "--device", "cuda", "a")
    assert process.returncode == 1
    assert 'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall' in process.stderr


def test_nothing_is_written_where_the_work_fails(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    run("f2gguf", "embed", "-m", nano_f16, "--dims", "7", "-o", tmp_path / "x.npy", "a")
    assert list(tmp_path.iterdir()) == []


def test_stdin_is_split_only_at_line_ends(run: Run, nano_f16: Path) -> None:
    process = run("f2gguf", "embed", "-m", nano_f16, stdin="one\u2028still one\x0c\ntwo\r\n")
    assert len(process.stdout.splitlines()) == 2


def test_ids_beside_npy_are_not_overwritten(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "text": "one"}\n')
    (tmp_path / "out.ids.jsonl").write_text("mine")
    arguments = ("-m", nano_f16, "--input", tmp_path / "in.jsonl", "-o", tmp_path / "out.npy")
    process = run("f2gguf", "embed", *arguments)
    assert (process.returncode, "out.ids.jsonl: exists already" in process.stderr) == (1, True)
    assert (tmp_path / "out.ids.jsonl").read_text() == "mine"
    assert run("f2gguf", "embed", *arguments, "--force").returncode == 0


def test_a_link_keeps_pointing_and_a_device_is_refused(run: Run, nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert run("f2gguf", "embed", "-m", nano_f16, "-o", tmp_path / "link.jsonl", "--force", "a").returncode == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert "embedding" in (tmp_path / "real.jsonl").read_text()
    (tmp_path / "fifo.jsonl").mkdir()
    process = run("f2gguf", "embed", "-m", nano_f16, "-o", tmp_path / "fifo.jsonl", "--force", "a")
    assert (process.returncode, "is no regular file" in process.stderr) == (1, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen3.block_count", b"\xff\xff\xff\xff"),
        ("qwen3.attention.layer_norm_rms_epsilon", b"\x00\x00\xc0\x7f"),
        ("qwen3.attention.layer_norm_rms_epsilon", b"\x00\x00\x80\xbf"),
        ("qwen3.embedding_length", b"\x00\x00\x00\x00"),
        ("f2gguf.max_tokens", b"\x00\x00\x00\x00"),
    ],
)
def test_header_values_on_which_llama_cpp_would_die_are_refused(
    run: Run, nano_f16: Path, tmp_path: Path, key: str, value: bytes
) -> None:
    data = bytearray(nano_f16.read_bytes())
    at = read_header(nano_f16).offsets[key]
    data[at : at + 4] = value
    (tmp_path / "x.gguf").write_bytes(data)
    process = run("f2gguf", "embed", "-m", tmp_path / "x.gguf", "a")
    assert process.returncode == 1
    assert f"its header has {key}" in process.stderr
