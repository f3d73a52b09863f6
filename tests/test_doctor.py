"""What the doctor finds in files that other tools wrote, and says when they are opened; f2gguf's own have nothing."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import Release, Run
from f2gguf.quantize.convert.reserved import fill_in
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import F2ggufError, FileWarning, NotAnEmbeddingModel, NotGGUF
from f2gguf.runtime.gguf.case import Finding
from f2gguf.runtime.gguf.doctor import examine
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.header import read_header
from gguf import GGUFValueType
from others import BYTES, header_of, keys_of, write_file, write_other
from serving import serving_process

TEXTS = ["how do I compress a folder?", "Zürich, 8 Uhr: 列车"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581the", "ing"]  # of WordPiece, as llama.cpp's converter spells them
BERT = {
    "bert__attention__head_count": 1,
    "bert__attention__causal": False,
    "bert__pooling_type": 1,
    "tokenizer__ggml__unknown_token_id": 1,
    "tokenizer__ggml__bos_token_id": 2,
    "tokenizer__ggml__seperator_token_id": 3,
    "general__name": "MiniLM",
    "general__source__url": "https://host",
    "f2gguf__max_tokens": 128,
    "f2gguf__prompt__query": "query: ",
}
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581the"]  # of XLM-R
XLMR = {
    **{key: value for key, value in BERT.items() if "_token_id" not in key},
    "bert__pooling_type": 2,
    "tokenizer__ggml__bos_token_id": 0,
    "tokenizer__ggml__eos_token_id": 2,
    "tokenizer__ggml__unknown_token_id": 3,
    "tokenizer__ggml__add_bos_token": True,
    "tokenizer__ggml__add_eos_token": True,
    "general__name": "bge m3",
}
SPM = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581the"]
GEMMA = {
    "gemma_embedding__rope__freq_base": 1e6,
    "gemma_embedding__pooling_type": 1,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 2,
    "tokenizer__ggml__unknown_token_id": 0,
    "tokenizer__ggml__add_eos_token": True,
}
BPE = [*BYTES, "th", "the", "<|im_end|>", "<|endoftext|>"]
QWEN = {
    "qwen3__attention__head_count": 1,
    "qwen3__rope__freq_base": 1e6,
    "qwen3__pooling_type": 3,
    "tokenizer__ggml__pre": "qwen2",
    "tokenizer__ggml__merges": ["t h", "th e"],
    "tokenizer__ggml__eos_token_id": 258,
    "tokenizer__ggml__add_eos_token": True,
    "general__source__url": "https://host",
    "f2gguf__max_tokens": 128,
    "f2gguf__prompt__query": "Instruct: find\nQuery: ",
}
KINDS: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    "bert": ("bert", "bert", WORDS, BERT),
    "xlmr": ("bert", "t5", PIECES, XLMR),
    "gemma": ("gemma-embedding", "llama", SPM, GEMMA),
    "qwen": ("qwen3", "gpt2", BPE, QWEN),
}
HALVES = np.zeros((2, 32), dtype=np.float16)
DENSE = {f"dense_{n}.weight": np.zeros((32, 32), dtype=np.float16) for n in (2, 3)}


@pytest.fixture
def other(own: Path, tmp_path: Path) -> Path:
    """The same model as another tool writes it."""
    return write_other(tmp_path / "other.gguf", own)


def made_of(path: Path, kind: str, **changes: Any) -> list[Finding]:
    """What is found in a plausible file of a kind after changes of its header."""
    architecture, tokenizer, tokens, values = KINDS[kind]
    values = {key.replace("gemma_embedding", "gemma-embedding"): value for key, value in values.items()}
    tokens = changes.pop("tokens", tokens)
    tensors = changes.pop("tensors", None)
    write_file(path, header_of(architecture, tokenizer, tokens, **{**values, **changes}), tensors)
    return examine(read_header(path))


def checks(found: list[Finding], severity: str) -> set[str]:
    return {finding.check for finding in found if finding.severity == severity}


def opened(path: Path, **options: Any) -> tuple[list[str], np.ndarray]:
    """The warnings on opening, and the vectors of TEXTS."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Embedder(path, **options) as model:
            vectors = model.encode_document(TEXTS)
    assert {one.category for one in caught} <= {FileWarning}
    return [str(one.message) for one in caught], vectors


@pytest.mark.parametrize("kind", ["bert", "xlmr", "qwen"])
def test_nothing_is_found_in_a_header_that_states_all(kind: str, tmp_path: Path) -> None:
    found = made_of(tmp_path / "x.gguf", kind)
    assert {finding.check for finding in found if finding.severity != "note"} == set()


FAULTS: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("qwen", {"qwen3__pooling_type": ...}, "error", "pooling", "repair-header"),
    ("qwen", {"qwen3__pooling_type": 0}, "error", "pooling", "--pooling last"),
    ("qwen", {"qwen3__pooling_type": 4}, "error", "model", "is a reranker"),
    ("qwen", {"tokenizer__ggml__add_eos_token": ...}, "warning", "closing token", "'<|im_end|>' (eos_token_id 258)"),
    ("qwen", {"tokenizer__ggml__add_eos_token": False}, "warning", "closing token", "--add-eos"),
    ("qwen", {"general__name": "Qwen3 Embedding 0.6B"}, "warning", "closing token", "--eos-token '<|endoftext|>'"),
    ("qwen", {"tokenizer__ggml__eos_token_id": 900}, "error", "special tokens", "--eos-token TOKEN"),
    ("qwen", {"tokenizer__ggml__eos_token_id": ...}, "warning", "special tokens", "(eos_token_id 11)"),
    ("qwen", {"tokenizer__ggml__eos_token_id": 65}, "warning", "special tokens", "no known model does"),
    ("qwen", {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": 259}, "warning",
     "opening token", "--no-add-bos"),
    ("qwen", {"tokenizer__ggml__pre": ...}, "warning", "pre-tokenizer", "--pre qwen2"),
    ("qwen", {"tokenizer__ggml__pre": "default"}, "warning", "pre-tokenizer", "--pre qwen2"),
    ("qwen", {"tokenizer__ggml__pre": "gpt-4o"}, "note", "pre-tokenizer", "std::regex"),
    ("qwen", {"f2gguf__prompt__query": ...}, "warning", "prompt", "--prompt query=TEXT"),
    ("qwen", {"qwen3__pooling_type": 1}, "warning", "attention", "--no-causal"),
    ("qwen", {"qwen3__pooling_type": 2}, "warning", "attention", "which begin alike get one vector"),
    ("qwen", {"qwen3__attention__causal": False}, "warning", "attention", "--causal"),
    ("qwen", {"qwen3__rope__freq_base": 1000064.0}, "warning", "numbers", "rope.freq_base is 1000064"),
    ("qwen", {"qwen3__rope__freq_base": 1e4}, "warning", "numbers", "rope.freq_base is 10000"),
    ("qwen", {"qwen3__rope__scaling__type": "linear", "qwen3__rope__scaling__factor": 4.0}, "warning", "positions",
     "qwen3.rope.scaling.factor is 4.0"),
    ("qwen", {"qwen3__rope__scaling__factor": 4.0}, "warning", "positions", "config.json"),
    ("qwen", {"qwen3__rope__scale_linear": 4.0}, "warning", "positions", "rope.scale_linear is 4.0"),
    ("qwen", {"qwen3__rope__scaling__attn_factor": 1.2}, "warning", "positions", "rope.scaling.attn_factor is 1.2"),
    ("qwen", {"qwen3__rope__freq_base": ...}, "warning", "numbers", "takes 10,000"),
    ("qwen", {"qwen3__attention__layer_norm_rms_epsilon": 1.5e-6}, "warning", "numbers", "epsilon is 1.5e-06"),
    ("qwen", {"qwen3__rope__scaling__type": "spiral"}, "error", "shape", "end the process"),
    ("qwen", {"qwen3__rope__scaling__type": "yarn"}, "warning", "shape", "rope.scaling.factor is missing"),
    ("qwen", {"qwen3__rope__dimension_count": 48}, "error", "shape", "for heads of 32"),
    ("qwen", {"qwen3__block_count": 2}, "error", "shape", "tensors of 1 blocks"),
    ("qwen", {"qwen3__expert_used_count": 3}, "error", "shape", "3 of 0 experts"),
    ("qwen", {"f2gguf__max_tokens": ...}, "note", "longest input", "--max-tokens N"),
    ("qwen", {"general__file_type": 15}, "note", "drift", "quantize verify"),
    ("qwen", {"general__source__url": ...}, "note", "source", "which checkpoint"),
    ("qwen", {"tokens": BPE[1:]}, "warning", "vocabulary", "1 of the bytes of UTF-8 have no token"),
    ("qwen", {"tokens": [*BPE[:-1], "the"]}, "error", "vocabulary", "'the' is there twice"),
    ("qwen", {"tokens": [*BPE[:-4], "th", "thy", *BPE[-2:]]}, "warning", "vocabulary", "the merge 'th e' makes"),
    ("qwen", {"tokenizer__ggml__merges": ...}, "error", "vocabulary", "merges is missing"),
    ("qwen", {"tokenizer__ggml__merges": ["t h", "t h"]}, "warning", "vocabulary", "'t h' is there twice"),
    ("qwen", {"tokenizer__ggml__token_type": [1] * 259}, "error", "vocabulary", "259 values for 260 tokens"),
    ("qwen", {"tokenizer__ggml__token_type": ...}, "warning", "vocabulary", "token_type is missing"),
    ("qwen", {"tokenizer__ggml__token_type": [3] * 260}, "warning", "vocabulary", "is called a special token"),
    ("qwen", {"tensors": {"token_embd.weight": np.zeros((262, 32), dtype=np.float16)}}, "error", "vocabulary",
     "262 rows"),
    ("qwen", {"tokenizer__ggml__model": "none"}, "error", "vocabulary", "no such tokenizer"),
    ("qwen", {"tokenizer__ggml__tokens": ...}, "error", "vocabulary", "tokens is missing"),
    ("qwen", {"split__count": (2, GGUFValueType.UINT16), "split__no": (1, GGUFValueType.UINT16)}, "error", "model",
     "part 2 of 2"),
    ("qwen", {"general__type": "adapter"}, "error", "model", "'adapter'"),
    ("qwen", {"qwen3__embedding_length_out": 16}, "error", "model", "of another width (16)"),
    ("qwen", {"qwen3__context_length": ...}, "error", "model", "its header lacks qwen3.context_length"),
    ("bert", {"bert__pooling_type": 2}, "warning", "pooling", "models of this name have mean pooling"),
    ("bert", {"bert__pooling_type": 3}, "warning", "attention", "in an encoder"),
    ("qwen", {"qwen3__attention__head_count_kv": 2 + (1 << 26)}, "error", "shape", "kv is 67108866 for 1 "),
    ("qwen", {"qwen3__attention__key_length": 64 + (1 << 26)}, "error", "shape", "key_length or value_length"),
    ("bert", {"tensors": {"blk.0.attn_q.bias": HALVES[0]}}, "error", "shape", "blk.0.attn_q.bias is F16, not F32"),
    ("bert", {"tensors": {"token_types.weight": HALVES}}, "error", "shape", "token_types.weight is F16, not F32"),
    ("bert", {"bert__attention__head_count": 3}, "warning", "numbers", "no known encoder has such heads"),
    ("bert", {"tokenizer__ggml__normalizer__lowercase": False}, "warning", "normaliser", "--lowercase"),
    ("bert", {"tokenizer__ggml__normalizer__strip_accents": False}, "warning", "normaliser", "0 tokens have accents"),
    ("bert", {"tokens": [*WORDS, *map(chr, range(0xE0, 0xFE))]}, "warning", "normaliser", "26 tokens have accents"),
    ("bert", {"tokens": [*WORDS[:4], "the", "##ing"]}, "warning", "vocabulary", "as in vocab.txt"),
    ("bert", {"tokenizer__ggml__unknown_token_id": 4}, "warning", "special tokens", "what has no token becomes"),
    ("bert", {"general__name": "E5 base", "f2gguf__prompt__query": ...}, "warning", "prompt", "such models were"),
    ("bert", {"f2gguf__prompt__query": ...}, "note", "prompt", "many models are"),
    ("xlmr", {"tokenizer__ggml__add_bos_token": ...}, "warning", "opening token", "--add-bos"),
    ("xlmr", {"tokenizer__ggml__add_eos_token": False}, "warning", "closing token", "--add-eos"),
    ("xlmr", {"bert__pooling_type": 1}, "warning", "pooling", "models of this name have cls pooling"),
    ("gemma", {}, "warning", "dense", "dense_2.weight"),
    ("bert", {"general__name": "LaBSE"}, "warning", "dense", "take another model"),
    ("gemma", {"tokens": SPM[:200]}, "error", "vocabulary", "bytes have no token"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "severity", "check", "words"), FAULTS)
def test_every_fault_is_found_and_says_what_mends_it(
    kind: str, changes: dict[str, Any], severity: str, check: str, words: str, tmp_path: Path
) -> None:
    found = made_of(tmp_path / "x.gguf", kind, **changes)
    said = [str(finding) for finding in found if (finding.severity, finding.check) == (severity, check)]
    assert any(words.lower() in line.lower() for line in said), found
    assert all("\n" not in line and line.endswith((".", "`")) for line in said)


@pytest.mark.parametrize(
    "scaling", [{"type": "none", "factor": 4.0}, {"type": "linear", "factor": 1.0}, {"factor": 0.0}]
)
def test_positions_that_llama_cpp_does_not_scale_are_no_fault(scaling: dict[str, Any], tmp_path: Path) -> None:
    changes = {f"qwen3__rope__scaling__{key}": value for key, value in scaling.items()}
    assert not checks(made_of(tmp_path / "x.gguf", "qwen", **changes), "warning")


def test_dense_modules_that_are_there_are_not_missed(tmp_path: Path) -> None:
    rows = np.zeros((len(SPM), 32), dtype=np.float16)
    tensors = {"token_embd.weight": rows, "blk.0.attn_norm.weight": rows[0], **DENSE}
    assert "dense" not in checks(made_of(tmp_path / "x.gguf", "gemma", tensors=tensors), "warning")


def test_encoder_sees_both_ways_whatever_its_header_says(minilm_f16: Path, tmp_path: Path) -> None:
    """llama.cpp runs it without memory, and then nothing is hidden from a token."""
    _, right = opened(write_other(tmp_path / "x.gguf", minilm_f16))
    for changes in ({"without": ("bert.attention.causal",)}, {"bert__attention__causal": True}):
        lines, vectors = opened(write_other(tmp_path / "x.gguf", minilm_f16, **changes))
        assert lines == []
        np.testing.assert_array_equal(vectors, right)


def test_closing_token_matters_to_last_token_pooling_only(tmp_path: Path) -> None:
    changes = {"tokenizer__ggml__add_eos_token": False, "qwen3__pooling_type": 1, "qwen3__attention__causal": False}
    assert made_of(tmp_path / "x.gguf", "qwen", **changes) == []


def test_f2ggufs_own_files_have_nothing(nano_release: Release, minilm_release: Release) -> None:
    for release in (nano_release, minilm_release):
        for variant in ("F16", "Q8_0", "Q4_K_M", "Q4_0"):
            header = read_header(release.file(variant))
            assert is_sealed(header)
            assert examine(header) == []


def test_own_file_of_before_the_seal_is_not_warned_of(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(own.read_bytes().replace(b"f2gguf.header_sha256", b"f2gguf.header_sha255"))
    assert is_sealed(read_header(path)) is None
    assert opened(path)[0] == []


def test_any_change_of_an_own_header_is_warned_of(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(own.read_bytes().replace(b"general.name", b"general.nome"))
    (line,), _ = opened(path)
    assert line.startswith(f"{path}: its header is not as f2gguf wrote it.")
    assert "f2gguf selftest" in line
    fill_in(path, {"f2gguf.source.sha256": "1" * 64})
    assert is_sealed(read_header(path)), "what f2gguf itself fills in, it seals"


def test_file_without_a_closing_token_is_warned_of_and_closed_on_demand(own: Path, other: Path, tmp_path: Path) -> None:
    """Stands for files of Qwen3-Embedding without tokenizer.ggml.add_eos_token."""
    _, right = opened(own)
    path = write_other(tmp_path / "open.gguf", own, without=("tokenizer.ggml.add_eos_token",))
    lines, wrong = opened(path)
    (line,) = [line for line in lines if "texts are not closed" in line]
    assert line.startswith(f"{path}: last-token pooling, and texts are not closed")
    assert "--add-eos, which closes with '<|im_end|>' (eos_token_id 16383)" in line
    lines, closed = opened(path, add_eos=True)
    assert not [line for line in lines if "closed" in line]
    np.testing.assert_array_equal(closed, right)
    assert (wrong * right).sum(axis=1).max() < 0.99
    with pytest.warns(FileWarning, match="states no prompt"), Embedder(path, add_eos=True) as model:
        assert model.tokenize("a")[-1] == 16383
        assert model.adds_eos


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.FileWarning")
def test_closing_token_that_is_there_is_not_doubled(own: Path, nano_f16: Path, minilm_f16: Path) -> None:
    for path in (own, nano_f16, minilm_f16):
        with Embedder(path) as plain, Embedder(path, add_eos=True) as closing:
            assert plain.tokenize("a text").tolist() == closing.tokenize("a text").tolist()
            assert not closing.adds_eos or path == minilm_f16


def test_commands_say_it_and_take_the_flag(own: Path, tmp_path: Path, run: Run) -> None:
    path = write_other(tmp_path / "open.gguf", own, without=("tokenizer.ggml.add_eos_token",))
    (tmp_path / "docs.txt").write_text("an archiver\na chess engine\n")
    for arguments in (("embed", "-m", path, "a text"), ("search", "-m", path, "--docs", tmp_path / "docs.txt", "zip")):
        process = run("f2gguf", *arguments)
        assert process.returncode == 0, process.stderr
        assert f"warning: {path}: last-token pooling, and texts are not closed" in process.stderr
        assert "not closed" not in run("f2gguf", *arguments, "--add-eos").stderr
    right = run("f2gguf", "embed", "-m", own, "a text").stdout
    assert run("f2gguf", "embed", "-m", path, "a text", "--add-eos").stdout == right
    assert "closing token   none stated" in run("f2gguf", "inspect", path).stdout
    assert "closing token   added" in run("f2gguf", "inspect", path, "--add-eos").stdout


def test_inspect_check_exits_with_1_for_anything_worse_than_a_note(own: Path, tmp_path: Path, run: Run) -> None:
    process = run("f2gguf", "inspect", own, "--check")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"{own}: nothing is missing or suspicious\n"
    path = write_other(tmp_path / "x.gguf", own, without=("qwen3.pooling_type",))
    process = run("f2gguf", "inspect", path, "--check")
    assert process.returncode == 1
    assert [line.split(":")[0].split() for line in process.stdout.splitlines()][:2] == [
        ["error", "pooling"],
        ["warning", "prompt"],
    ]
    outcome = json.loads(run("f2gguf", "inspect", path, "--check", "--json").stdout)
    assert (outcome["path"], outcome["holds"]) == (str(path), False)
    assert set(outcome["findings"][0]) == {"severity", "check", "what", "why", "mend"}
    process = run("f2gguf", "inspect", path, "--check", "--pooling", "last", "--json")
    assert "pooling" not in [one["check"] for one in json.loads(process.stdout)["findings"]]
    noted = write_other(tmp_path / "y.gguf", own, f2gguf__prompt__query="Query: ")
    assert run("f2gguf", "inspect", noted, "--check").returncode == 0


def test_parts_of_a_split_model_are_refused_with_the_first_ones_name(own: Path, tmp_path: Path) -> None:
    """Two of them could have one fingerprint: a model's parts behind the first one would not count."""
    short = GGUFValueType.UINT16
    for number in (0, 1):
        path = tmp_path / f"x-{number + 1:05d}-of-00002.gguf"
        write_other(path, own, split__count=(2, short), split__no=(number, short))
        with pytest.raises(NotAnEmbeddingModel, match=rf"x-0000{number + 1}-of-00002\.gguf: is part {number + 1} of 2"):
            Embedder(path)
        with pytest.raises(NotAnEmbeddingModel, match=r"`llama-gguf-split --merge x-00001-of-00002\.gguf NEW\.gguf`"):
            Embedder(path)
    write_file(
        tmp_path / "e-00001-of-00002.gguf", {"general.architecture": "qwen3", "split.count": 2, "split.no": 0}, {}
    )
    with pytest.raises(NotAnEmbeddingModel, match="part 1 of 2"):
        Embedder(tmp_path / "e-00001-of-00002.gguf", pooling="last")


def test_split_into_one_part_is_whole(own: Path, tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00001.gguf"
    write_other(path, own, split__count=(1, GGUFValueType.UINT16), split__no=(0, GGUFValueType.UINT16))
    np.testing.assert_array_equal(opened(path)[1], opened(own)[1])


def test_what_llama_cpp_would_end_the_process_for_is_refused_on_opening(own: Path, tmp_path: Path) -> None:
    tokens = read_tokens(own)
    path = write_other(tmp_path / "x.gguf", own, tokenizer__ggml__tokens=[*tokens[:-1], tokens[5]])
    with pytest.raises(NotGGUF, match=r"x\.gguf: .* is there twice\. Llama\.cpp would end the process"):
        Embedder(path)


def read_tokens(path: Path) -> list[str]:
    from f2gguf.runtime.gguf.vocabulary import Vocabulary

    return [token.decode() for token in Vocabulary(read_header(path)).tokens or []]


def same(vectors: np.ndarray, others: np.ndarray) -> bool:
    return bool((vectors * others).sum(axis=1).min() > 0.999999)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["own", "minilm_f16"])
def test_no_key_of_anothers_file_is_missing_without_a_word(
    fixture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every key of a file that gguf-py wrote is removed: an error of one line, a new warning, or the same vectors."""
    source: Path = request.getfixturevalue(fixture)
    whole = write_other(tmp_path / "whole.gguf", source)
    known, right = opened(whole)
    silent = []
    for key in keys_of(source)[1:]:
        path = write_other(tmp_path / "whole.gguf", source, without=(key,))
        try:
            lines, vectors = opened(path)
        except F2ggufError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
            continue
        if set(lines) <= set(known) and not same(vectors, right):
            silent.append(key)
    assert silent == []


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda data: data.replace(b"general.type", b"general.name", 1),
    lambda data: data.replace(struct.pack("<Q", 12) + b"general.type", bytes(8), 1),
    lambda data: data[:4] + struct.pack("<I", 9) + data[8:],
    lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:],
    lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:],
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line_with_the_next_step(
    damage: Callable[[bytes], bytes], own: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.gguf"
    data = own.read_bytes()
    path.write_bytes(damage(data))
    assert path.read_bytes() != data
    with pytest.raises(NotGGUF, match=r"^.*x\.gguf: [^\n]*(Download|Make|make) [^\n]*$"):
        read_header(path)


def test_server_logs_it_and_tells_its_clients(own: Path, tmp_path: Path) -> None:
    path = write_other(tmp_path / "open.gguf", own, without=("tokenizer.ggml.add_eos_token",))
    with serving_process("-m", path, "-m", f"own={own}") as served:
        models = {model["id"]: model for model in httpx.get(f"{served.url}/v1/models").json()["data"]}
        logged = [record["message"] for record in map(json.loads, filter(is_json, served.lines))]
    assert models["own"]["warnings"] == []
    said = [line for line in models["open"]["warnings"] if "texts are not closed" in line]
    assert len(said) == 1
    assert said[0].startswith("open.gguf: last-token pooling")
    assert not [line for line in models["open"]["warnings"] if str(tmp_path) in line], "a client need not know the path"
    assert [line for line in logged if line.startswith(f"{path}: last-token pooling, and texts are not closed")]
    with serving_process("-m", path, "--add-eos") as served:
        (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert not [line for line in model["warnings"] if "closed" in line]
    assert model["fingerprint"] != models["open"]["fingerprint"], "these are other vectors"


def is_json(line: str) -> bool:
    return line.startswith("{")
