"""`f2gguf repair-header`: a mended copy with the same tensors, which says what was changed, or nothing at all."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conftest import Run
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import FileWarning, GGUFError, NotGGUF, OutputError, UnknownDims, UnknownName, WrongUsage
from f2gguf.runtime.gguf.doctor import examine
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.golden import has_golden
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.mend import Changes, parse_dims, parse_prompts, repair_header
from gguf import GGUFReader
from others import write_other

PROMPT = "Instruct: find what answers\nQuery: "
LACKING = ("qwen3.pooling_type", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id")
MENDED = Changes(
    pooling="last",
    add_eos=True,
    eos_token="<|im_end|>",
    pre="qwen2",
    prompts={"query": PROMPT},
    max_tokens=512,
    dims=[16],
)
pytestmark = pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.FileWarning")


@pytest.fixture
def broken(own: Path, tmp_path: Path) -> Path:
    return write_other(tmp_path / "broken.gguf", own, without=LACKING, general__source__url="https://host")


def tensors_of(path: Path) -> list[tuple[str, tuple[int, ...], str, bytes]]:
    data = path.read_bytes()
    found = read_header(path).tensors
    return [(one.name, one.shape, one.type, data[one.begin : one.begin + one.size_bytes]) for one in found]


def test_copy_gives_the_right_vectors_and_passes_the_check(broken: Path, own: Path, tmp_path: Path) -> None:
    target = tmp_path / "mended.gguf"
    mended = repair_header(broken, target, MENDED)
    assert {finding.severity for finding in examine(read_header(broken))} == {"error", "warning", "note"}
    assert mended.findings == ()
    assert tensors_of(target) == tensors_of(broken)
    with Embedder(own) as right, Embedder(target) as model:
        assert model.file_warnings == ()
        np.testing.assert_array_equal(model.encode("a text"), right.encode("a text"))
        np.testing.assert_array_equal(model.encode_query("a text"), right.encode("a text", prompt=PROMPT))
        assert model.max_seq_length == 512
        assert model.header.dims == (16, 32)


def test_copy_says_what_was_changed_and_by_what(broken: Path, tmp_path: Path, run: Run) -> None:
    repair_header(broken, tmp_path / "one.gguf", MENDED)
    repair_header(tmp_path / "one.gguf", tmp_path / "two.gguf", Changes(pooling="mean", causal=False))
    lines = read_header(tmp_path / "two.gguf").values["f2gguf.mended"]
    assert lines[0] == "f2gguf 0.1.0 repair-header: qwen3.pooling_type = 3, was not stated"
    assert lines[-2:] == (
        "f2gguf 0.1.0 repair-header: qwen3.pooling_type = 1, was 3",
        "f2gguf 0.1.0 repair-header: qwen3.attention.causal = False, was not stated",
    )
    shown = run("f2gguf", "inspect", tmp_path / "two.gguf").stdout
    assert "mended          f2gguf 0.1.0 repair-header: qwen3.pooling_type = 1, was 3" in shown
    assert "made by         not f2gguf" in shown


def test_copy_is_read_by_others_and_sealed(broken: Path, tmp_path: Path) -> None:
    target = tmp_path / "mended.gguf"
    repair_header(broken, target, MENDED)
    reader = GGUFReader(target)
    assert reader.fields["qwen3.pooling_type"].contents() == 3
    assert len(reader.tensors) == len(GGUFReader(broken).tensors)
    model = llama_cpp.llama_model_load_from_file(os.fsencode(target), llama_cpp.llama_model_default_params())
    assert model, "stock llama.cpp"
    assert llama_cpp.llama_vocab_eos(llama_cpp.llama_model_get_vocab(model)) == 16383
    assert llama_cpp.llama_vocab_get_add_eos(llama_cpp.llama_model_get_vocab(model))
    llama_cpp.llama_model_free(model)
    assert is_sealed(read_header(target))
    target.write_bytes(target.read_bytes().replace(b"general.name", b"general.nome"))
    with pytest.warns(FileWarning, match="its header is not as f2gguf wrote it"):
        Embedder(target).close()


def test_alignment_is_kept(own: Path, tmp_path: Path) -> None:
    """Tensors begin where the alignment puts them, whatever the length of the header."""
    data = own.read_bytes()
    source, target = tmp_path / "aligned.gguf", tmp_path / "mended.gguf"
    header = read_header(own)
    end, tensors = header.end, data[header.tensors[0].begin :]
    entry = b"\x11" + bytes(7) + b"general.alignment" + b"\x04\0\0\0" + b"\x00\x04\0\0"  # 1024, uint32
    n_values = int.from_bytes(data[16:24], "little") + 1
    head = data[:16] + n_values.to_bytes(8, "little") + entry + data[24:end]
    infos = read_header(own).tensors
    assert all((one.begin - infos[0].begin) % 32 == 0 for one in infos)
    moved, offsets, at = bytearray(head), [], 0
    for one in infos:
        offsets.append(at)
        at += -(-one.size_bytes // 1024) * 1024
    place = len(head) - (end - header.values_end)
    for one, offset in zip(infos, offsets, strict=True):
        place += 8 + len(one.name) + 4 + 8 * len(one.shape) + 4
        moved[place : place + 8] = offset.to_bytes(8, "little")
        place += 8
    first = infos[0].begin
    chunks = (tensors[one.begin - first : one.begin - first + one.size_bytes] for one in infos)
    body = b"".join(chunk + bytes(-len(chunk) % 1024) for chunk in chunks)
    source.write_bytes(bytes(moved) + bytes(-len(moved) % 1024) + body)
    source.write_bytes(source.read_bytes().replace(b"f2gguf.header_sha256", b"f2gguf.header_sha255"))
    assert [one[3] for one in tensors_of(source)] == [one[3] for one in tensors_of(own)]
    repair_header(source, target, Changes(prompts={"query": PROMPT}))
    assert read_header(target).tensors[0].begin % 1024 == 0
    assert [one[3] for one in tensors_of(target)] == [one[3] for one in tensors_of(own)]
    with Embedder(own) as right, Embedder(target) as model:
        np.testing.assert_array_equal(model.encode("a text"), right.encode("a text"))


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        (Changes(normalize=False), True),
        (Changes(dims=[8]), True),
        (Changes(pooling="mean"), False),
        (Changes(add_eos=False), False),
        (Changes(prompts={"query": "Query: "}), False),
        (Changes(max_tokens=64), False),
    ],
)
def test_what_was_measured_with_other_vectors_is_left_out(
    changes: Changes, is_kept: bool, own: Path, tmp_path: Path
) -> None:
    mended = repair_header(own, tmp_path / "mended.gguf", changes)
    assert has_golden(read_header(tmp_path / "mended.gguf")) == is_kept
    assert bool(mended.dropped) != is_kept
    if is_kept:
        with Embedder(tmp_path / "mended.gguf", selftest=True) as model:
            assert model.encode("a").shape == (32,)


def test_measured_drift_is_left_out_with_it(tiny_release, tmp_path: Path) -> None:
    source = tiny_release.file("Q8_0")
    assert "f2gguf.drift.mean" in read_header(source).values
    mended = repair_header(source, tmp_path / "mended.gguf", Changes(pooling="mean"))
    assert not [key for key in read_header(tmp_path / "mended.gguf").values if key.startswith("f2gguf.drift.")]
    assert "f2gguf.drift.mean" in mended.dropped


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (Changes(), WrongUsage, "nothing to change. Name a flag"),
        (Changes(pooling="last", add_eos=True), WrongUsage, "All of it is stated already: qwen3.pooling_type"),
        (Changes(pooling="max"), UnknownName, "no pooling is called 'max'"),
        (Changes(eos_token="<|im_ent|>"), UnknownName, r"Did you mean '<\|im_end\|>'\?.*\(--eos-token\)"),
        (Changes(pre="qwen9"), GGUFError, "new.gguf, which was not written: llama.cpp cannot load it.*'qwen9'"),
        (Changes(max_tokens=5000), WrongUsage, r"takes 2 to 4096 \(--max-tokens\)"),
        (Changes(dims=[64]), UnknownDims, "--dims 64: tiny gives 32 dimensions"),
        (Changes(dims=[]), UnknownDims, "--dims none"),
    ],
)
def test_changes_that_cannot_be_are_refused_and_leave_nothing(
    changes: Changes, error: type[Exception], words: str, own: Path, tmp_path: Path
) -> None:
    source = write_other(tmp_path / "tiny.gguf", own, general__name="tiny")
    with pytest.raises(error, match=words):
        repair_header(source, tmp_path / "new.gguf", changes)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_file_that_stays_of_no_use_is_refused(broken: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(
        NotGGUF, match=r"new\.gguf: would still be of no use, and was not written: the header has no pool"
    ):
        repair_header(broken, tmp_path / "new.gguf", Changes(add_eos=True))
    damaged = write_other(tmp_path / "damaged.gguf", own, tokenizer__ggml__merges=["a b"] * 3, qwen3__block_count=9)
    with pytest.raises(NotGGUF, match="block_count is 9, and there are tensors of 2 blocks"):
        repair_header(damaged, tmp_path / "new.gguf", Changes(add_eos=False))
    damaged.write_bytes(own.read_bytes()[:-5000])
    with pytest.raises(NotGGUF, match="truncated"):
        repair_header(damaged, tmp_path / "new.gguf", Changes(add_eos=False))
    damaged.write_bytes(own.read_bytes().replace(b"general.name", b"general.nome"))
    with pytest.raises(NotGGUF, match="its header is not as f2gguf wrote it"):
        repair_header(damaged, tmp_path / "new.gguf", Changes(add_eos=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "damaged.gguf"]


def test_file_itself_is_never_written(own: Path, tmp_path: Path) -> None:
    source = write_other(tmp_path / "a.gguf", own)
    before = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "same.gguf")
    for target in ("a.gguf", "link.gguf", "same.gguf"):
        with pytest.raises(OutputError, match="is the file itself"):
            repair_header(source, tmp_path / target, Changes(add_eos=False), force=True)
    (tmp_path / "b.gguf").write_text("before")
    with pytest.raises(OutputError, match=r"exists already\. Pass --force"):
        repair_header(source, tmp_path / "b.gguf", Changes(add_eos=False))
    assert (source.read_bytes(), (tmp_path / "b.gguf").read_text()) == (before, "before")
    repair_header(source, tmp_path / "b.gguf", Changes(add_eos=False), force=True)
    assert tensors_of(tmp_path / "b.gguf") == tensors_of(source)


def test_prompts_and_widths_of_the_command_line() -> None:
    assert parse_prompts(["query=a=b\n", "document="]) == {"query": "a=b\n", "document": ""}
    assert parse_dims("16, 8") == [16, 8]
    assert parse_dims(None) is None
    for wrong in (["query"], ["=text"], ["a b=text"], ["query=a", "query=b"]):
        with pytest.raises(WrongUsage, match="write NAME=TEXT"):
            parse_prompts(wrong)
    for text in ("", "8,", "-8", "x"):
        with pytest.raises(WrongUsage, match="write whole numbers"):
            parse_dims(text)


def test_command_prints_the_path_last(broken: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "new.gguf"
    flags = ("--pooling", "last", "--add-eos", "--eos-token", "<|im_end|>", "--pre", "qwen2", "--no-normalize")
    process = run("f2gguf", "repair-header", broken, "-o", target, *flags, "--prompt", f"query={PROMPT}")
    assert (process.returncode, process.stdout) == (0, f"{target}\n")
    assert "qwen3.pooling_type = 3, was not stated\n" in process.stderr
    assert not read_header(target).is_normalized
    process = run("f2gguf", "repair-header", broken, "-o", tmp_path / "x.gguf", "--pooling", "max")
    assert (process.returncode, process.stdout) == (2, "")
    process = run("f2gguf", "repair-header", tmp_path / "absent.gguf", "-o", tmp_path / "x.gguf", "--pooling", "last")
    assert process.stderr.startswith(f"error: {tmp_path / 'absent.gguf'}: no such file.")
    process = run("f2gguf", "repair-header", target, "-o", tmp_path / "y.gguf", "--no-add-eos")
    assert "warning: last-token pooling, and texts are not closed" in process.stderr


def test_a_backslash_and_an_n_are_no_new_line_and_said_to_be_none(own: Path, tmp_path: Path, run: Run) -> None:
    """A shell keeps both in "...\\n..."; the vectors are then of another prompt."""
    said = "has a backslash and an n, and no new line. In bash, write $'...\\n...' for one."
    for prompt, is_said in ((PROMPT, False), (PROMPT.replace("\n", "\\n"), True)):
        copied = run(
            "f2gguf", "repair-header", own, "-o", tmp_path / "x.gguf", "--force", "--prompt", f"query={prompt}"
        )
        embedded = run("f2gguf", "embed", "-m", own, "--prompt", prompt, "a text")
        assert (copied.returncode, embedded.returncode) == (0, 0)
        assert (said in copied.stderr, said in embedded.stderr) == (is_said, is_said)
