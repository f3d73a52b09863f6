"""`quantize verify` against stored vectors, endpoints and checkpoints, on texts of one's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import NANO, copy_of
from click.testing import CliRunner, Result
from conftest import facts_of
from endpoint import KEY, Api
from f2gguf.evals.texts import load_texts, prompted
from f2gguf.quantize.cli import f2gguf, quantize
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from others import edit_tensor
from safetensors.numpy import save_file

TEXTS = [text for text in load_texts() if text.kind in ("query", "document")][:40]


@pytest.fixture(scope="module")
def drifted(made: Path) -> Path:
    """nano with noise on one tensor, a file that drifts from nano's F16."""
    folder = copy_of(NANO, made / "drifted")
    noise = torch.Generator().manual_seed(0)
    _edit(folder, "layers.1.mlp.down_proj.weight", lambda w: w + 4 * w.std() * torch.randn(w.shape, generator=noise))
    convert(facts_of(folder), made / "drifted.gguf")
    return made / "drifted.gguf"


def _edit(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a weight by what `edit` makes of it, in float32."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, name: edit(tensors[name].float())}, path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": text.id, "kind": text.kind, "text": text.text} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def reference(nano: Embedder) -> np.ndarray:
    return nano.encode([prompted(text, nano.prompts) for text in TEXTS])


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(quantize, ["verify", *map(str, arguments)])


def figures(*arguments: object) -> dict[str, Any]:
    result = verify(*arguments, "--json")
    assert result.exit_code in (0, 3), result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_every_kind_of_baseline_gives_the_same_drift(
    drifted: Path, nano_f16: Path, corpus: Path, reference: np.ndarray, api: Api, tmp_path: Path
) -> None:
    np.save(tmp_path / "vectors.npy", reference)
    save_file({"embeddings": reference.astype(np.float16)}, tmp_path / "vectors.safetensors")
    baselines = (nano_f16, "f2llm-nano", tmp_path / "vectors.npy", tmp_path / "vectors.safetensors", api.url)
    seen = [figures(drifted, "--corpus", corpus, "--against", against) for against in baselines]
    assert (seen[0]["n"], seen[0]["n_queries"]) == (40, 20)
    assert seen[0]["mean"] > 0.001
    for other in seen[1:]:
        assert other["mean"] == pytest.approx(seen[0]["mean"], rel=0.01)
        assert other["worst_text"] == seen[0]["worst_text"]


def test_over_the_bound_is_exit_3_and_the_worst_text_is_named(drifted: Path, nano_f16: Path, corpus: Path) -> None:
    result = verify(drifted, "--against", nano_f16, "--corpus", corpus, "--max-drift", "0.0001", "--threshold", "0.5")
    assert result.exit_code == 3
    assert "over the bound of 0.01%: upper end of the mean" in result.stderr
    assert "OVER 0.01%" in result.stdout
    assert any(f"({text.id})" in result.stdout for text in TEXTS)
    assert "0.5000" in result.stdout.splitlines()[-1]
    assert verify(nano_f16, "--against", nano_f16, "--corpus", corpus).exit_code == 0


def test_vectors_that_embed_wrote_are_taken_and_their_ids_compared(
    drifted: Path, nano_f16: Path, corpus: Path, tmp_path: Path
) -> None:
    corpus.write_text("\n".join(line for line in corpus.read_text().split("\n") if '"document"' in line))
    wanted = figures(drifted, "--against", nano_f16, "--corpus", corpus)
    for name in ("vectors.npy", "vectors.safetensors"):
        embed = ["embed", "-m", nano_f16, "--input", corpus, "-o", tmp_path / name]
        assert CliRunner().invoke(f2gguf, list(map(str, embed))).exit_code == 0
        assert figures(drifted, "--against", tmp_path / name, "--corpus", corpus) == wanted
    lines = corpus.read_text().strip().split("\n")
    corpus.write_text("\n".join(lines[::-1]))
    for name in ("vectors.npy", "vectors.safetensors"):
        result = verify(drifted, "--against", tmp_path / name, "--corpus", corpus)
        assert f"row 1 is of {json.loads(lines[0])['id']!r}, but text 1 is " in result.stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda vectors: vectors[:-1], "holds 39 vectors, and 40 texts are judged"),
        (lambda vectors: vectors[0], "holds float32 of shape (256,), not floats (n_texts, n_embd)"),
        (lambda vectors: vectors.astype(np.int32), "holds int32"),
        (lambda vectors: vectors[:, :128], "gives vectors of width 128, and "),
        (lambda vectors: np.where(np.eye(40, 256) > 0, np.nan, vectors), "40 of 40 texts have no finite vector"),
        (
            lambda vectors: vectors * (np.arange(40) != 3)[:, None],
            f"1 of 40 texts have no finite vector: {TEXTS[3].id}",
        ),
    ],
)
def test_stored_vectors_that_are_no_baseline_are_refused(
    spoil: Callable[[np.ndarray], np.ndarray], said: str, nano_f16: Path, corpus: Path, reference: np.ndarray
) -> None:
    path = corpus.with_name("vectors.npy")
    np.save(path, spoil(reference))
    result = verify(nano_f16, "--against", path, "--corpus", corpus)
    assert (result.exit_code in (1, 2), said in result.stderr) == (True, True), result.stderr
    assert "vectors.npy: " in result.stderr


def test_files_that_hold_no_vectors_are_refused(nano_f16: Path, corpus: Path, tmp_path: Path) -> None:
    for name, content in {
        "empty.npy": b"",
        "pickle.npy": b"\x80\x04N.",
        "text.safetensors": b"hello, world",
        "cut.npy": _cut(tmp_path),
    }.items():
        (tmp_path / name).write_bytes(content)
        result = verify(nano_f16, "--against", tmp_path / name, "--corpus", corpus)
        assert (result.exit_code, f"{name}: " in result.stderr) == (1, True), result.output
    save_file({"vectors": np.ones((2, 256))}, tmp_path / "x.safetensors")
    assert "embeddings" in verify(nano_f16, "--against", tmp_path / "x.safetensors", "--corpus", corpus).stderr


def _cut(folder: Path) -> bytes:
    np.save(folder / "whole.npy", np.ones((40, 256), np.float32))
    return (folder / "whole.npy").read_bytes()[:-100]


@pytest.mark.parametrize(
    "against",
    [
        "x.npy",
        "x.gguf",
        "f2llm-nan",
        "./x",
        "http://127.0.0.1:9/v1",
        "http://",
        "http://[::1",
        "http://:x",
        "http://a b",
        "a:9/v1",
    ],
)
def test_a_bad_baseline_is_said_before_anything_is_embedded(
    against: str, nano_f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("f2gguf.evals.against.embed_texts", None)  # first, so that this module is imported unpatched
    monkeypatch.setattr("f2gguf.evals.texts.embed_texts", None)  # would be called with a TypeError
    result = verify(nano_f16, "--against", against)
    assert result.exit_code in (1, 2)
    assert (result.stderr.startswith("error: "), "Traceback" in result.output) == (True, False)
    assert against.removeprefix("./") in result.stderr


def test_a_file_of_another_width_is_refused(nano_f16: Path, minilm_f16: Path, corpus: Path) -> None:
    result = verify(nano_f16, "--against", minilm_f16, "--corpus", corpus)
    assert (result.exit_code, "gives vectors of width 384" in result.stderr) == (2, True)


def test_a_threshold_needs_a_corpus_and_is_a_number(nano_f16: Path, corpus: Path) -> None:
    assert "--corpus" in verify(nano_f16, "--against", nano_f16, "--threshold", "0.5").stderr
    assert verify(nano_f16, "--against", nano_f16, "--corpus", corpus, "--threshold", "nan").exit_code == 2


def test_a_text_without_a_vector_is_named_by_its_id(nano_f16: Path, corpus: Path, tmp_path: Path) -> None:
    with Embedder(nano_f16) as model:
        used = [set(model.tokenize(prompted(text, model.prompts)).tolist()) for text in TEXTS]
    only_here = next(i for i, ids in enumerate(used) if ids - set.union(*used[:i], *used[i + 1 :]))
    token = min(used[only_here] - set.union(*used[:only_here], *used[only_here + 1 :]))
    broken = Path(shutil.copy(nano_f16, tmp_path / "broken.gguf"))
    edit_tensor(broken, "token_embd.weight", lambda table: table.__setitem__(token, np.inf))
    result = verify(broken, "--against", nano_f16, "--corpus", corpus)
    assert (result.exit_code, f"By id: {TEXTS[only_here].id}." in result.stderr) == (1, True), result.stderr


def test_a_checkpoint_that_states_no_pooling_takes_it_from_the_flag(
    nano_f16: Path, corpus: Path, tmp_path: Path
) -> None:
    (copy_of(NANO, tmp_path / "model") / "modules.json").unlink()
    arguments = (nano_f16, "--against", tmp_path / "model", "--corpus", corpus)
    assert "State it with --pooling" in verify(*arguments).stderr
    assert figures(*arguments, "--pooling", "last")["worst"] < 1e-4


@pytest.mark.filterwarnings("always::f2gguf.runtime.errors.TruncationWarning")
def test_texts_of_a_corpus_that_are_cut_are_said(nano_f16: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("short\n" + 3000 * "long " + "\n")
    result = verify(nano_f16, "--against", nano_f16, "--corpus", tmp_path / "x.txt")
    assert (result.exit_code, "warning: 1 of 2 texts are longer than" in result.stderr) == (0, True), result.stderr


def test_an_endpoint_gets_prompts_key_and_model_and_its_order_is_by_index(
    api: Api, nano_f16: Path, corpus: Path
) -> None:
    arguments = ("--against", f"{api.url}/embeddings/", "--corpus", corpus, "--endpoint-model", "nano")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTHER_KEY", KEY)
        assert figures(nano_f16, *arguments, "--api-key-env", "OTHER_KEY")["worst"] < 1e-6
    assert [len(request["input"]) for request in api.requests] == [1, 32, 8]
    for request in api.requests:
        assert (request["path"], request["key"], request["model"]) == ("/v1/embeddings", f"Bearer {KEY}", "nano")
    with Embedder(nano_f16) as model:
        sent = [text for request in api.requests[1:] for text in request["input"]]
        assert sent == [prompted(text, model.prompts) for text in TEXTS]


def _set(answer: dict[str, Any], value: Any) -> dict[str, Any]:
    if len(answer["data"]) > 1:  # not the first request, of a single text
        answer["data"][0]["embedding"][0] = value
    return answer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: b"<html>hello</html>", "Give the base URL of an API"),
        (lambda answer: [], "is damaged, or not what it should be"),
        (lambda answer: {"data": answer["data"][1:]}, "texts were sent and"),
        (lambda answer: {"data": answer["data"] * 2}, "texts were sent and"),
        (lambda answer: {"data": [{"index": 5, "embedding": [1.0] * 256}]}, "with indices [5]"),
        (lambda answer: {"data": [{**row, "embedding": row["embedding"][:64]} for row in answer["data"]]}, "width 64"),
        (lambda answer: _set(answer, None), f"no finite vector: {TEXTS[31].id}"),
        (lambda answer: {"data": [{"index": 0, "embedding": [None] * 256}]}, f"no finite vector: {TEXTS[0].id}"),
        (lambda answer: _set(answer, float("nan")), f"no finite vector: {TEXTS[31].id}"),
        (lambda answer: _set(answer, "x"), "could not convert string to float"),
        (lambda answer: {"data": [{**row, "embedding": "!"} for row in answer["data"]]}, "is damaged"),
    ],
)
def test_a_wrong_answer_is_one_clear_error(
    change: Callable[[dict[str, Any]], Any], said: str, api: Api, nano_f16: Path, corpus: Path
) -> None:
    api.change = change
    result = verify(nano_f16, "--against", api.url, "--corpus", corpus)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith(f"error: {api.url}/embeddings: ")
    assert said in result.stderr
