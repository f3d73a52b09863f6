"""The importance matrix: what is summed up, the file, resuming, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import FEW_TEXTS, Run
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import EvalText, load_texts
from f2gguf.quantize.repair import imatrix as module
from f2gguf.quantize.repair.calibration import MAX_TOKENS, PATH
from f2gguf.quantize.repair.imatrix import Activations, collect, read_imatrix, write_imatrix
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import NonFiniteActivations, WrongImatrix
from gguf import GGUFReader

TEXTS = load_texts(PATH)[:40]


@pytest.fixture(scope="module")
def collected(nano_f16: Path) -> tuple[Activations, np.ndarray]:
    return collect(nano_f16, TEXTS, device="auto")


def mean_squares(activations: Activations, name: str) -> np.ndarray:
    entry = activations.readers[name]
    return activations.sums[entry] / activations.counts[entry]


def test_first_matrix_reads_the_normalised_token_table(
    collected: tuple[Activations, np.ndarray], nano_f16: Path
) -> None:
    """The one input that can be worked out by hand: x / rms(x) * weight of every token's row."""
    weights = Weights(nano_f16)
    with Embedder(nano_f16, max_tokens=MAX_TOKENS) as model:
        prompts = [model.prompts["query"] if text.kind == "query" else "" for text in TEXTS]
        ids = np.concatenate([model.tokenize(p + text.text) for p, text in zip(prompts, TEXTS, strict=True)])
    rows = weights.rows("token_embd.weight")[ids].astype(np.float64)
    inputs = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + 1e-6) * weights.rows("blk.0.attn_norm.weight")
    activations, _ = collected
    assert activations.counts["blk.0.attn_q.weight"] == len(ids)
    assert np.allclose(mean_squares(activations, "blk.0.attn_v.weight"), np.square(inputs).mean(axis=0), rtol=1e-4)


def test_vectors_on_the_way_are_the_models_own(collected: tuple[Activations, np.ndarray], nano_f16: Path) -> None:
    with Embedder(nano_f16, max_tokens=MAX_TOKENS) as model:
        wanted = model.encode_query([text.text for text in TEXTS if text.kind == "query"])
    is_query = [text.kind == "query" for text in TEXTS]
    assert drift(collected[1][is_query], wanted).max() < 1e-6


def test_last_layer_sees_only_what_pooling_takes(collected: tuple[Activations, np.ndarray]) -> None:
    activations, _ = collected
    assert activations.counts[activations.readers["blk.3.ffn_down.weight"]] == len(TEXTS)
    assert activations.counts[activations.readers["blk.2.ffn_down.weight"]] > 10 * len(TEXTS)


def test_mean_pooling_model_sees_every_token_in_every_layer(minilm_f16: Path) -> None:
    activations, _ = collect(minilm_f16, TEXTS, device="auto")
    assert len(set(activations.counts.values())) == 1
    assert len(activations.readers) == 36


def test_samples_are_few_and_spread_over_all_texts(collected: tuple[Activations, np.ndarray]) -> None:
    activations, _ = collected
    for name, samples in activations.samples.items():
        assert 32 <= len(samples) <= 512
        assert samples.shape[1] == len(activations.sums[name])
        assert len(samples) == -(-activations.counts[name] // activations.strides[name])


def test_file_is_a_standard_imatrix_and_reads_back(
    collected: tuple[Activations, np.ndarray], nano_f16: Path, tmp_path: Path
) -> None:
    weights, path = Weights(nano_f16), tmp_path / "x.imatrix.gguf"
    write_imatrix(path, collected[0], weights.header, TEXTS)
    reader = GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == len(TEXTS)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, 256)
    assert tensors["blk.3.ffn_down.weight.counts"].tolist() == [[len(TEXTS)]]
    found = read_imatrix(path, weights)
    assert set(found) == {name for name in weights.infos if name.startswith("blk.") and "norm" not in name}
    assert np.allclose(found["blk.0.attn_k.weight"], mean_squares(collected[0], "blk.0.attn_k.weight"), rtol=1e-6)


def test_interrupted_pass_goes_on_and_ends_in_the_same_numbers(
    nano_f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collected: tuple[Activations, np.ndarray]
) -> None:
    monkeypatch.setattr(module, "_SAVE_EVERY_S", 0.0)
    state_path = tmp_path / "state.npz"
    done: list[int] = []

    def stop(n: int) -> None:
        done.append(n)
        if sum(done) >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(nano_f16, TEXTS, device="auto", state_path=state_path, on_progress=stop)
    resumed: list[int] = []
    activations, vectors = collect(nano_f16, TEXTS, device="auto", state_path=state_path, on_progress=resumed.append)
    assert resumed[0] >= 20, "what was done is not done again"
    assert sum(resumed) == len(TEXTS)
    assert np.array_equal(vectors, collected[1])
    assert all(np.array_equal(values, collected[0].sums[name]) for name, values in activations.sums.items())
    assert all(np.array_equal(rows, collected[0].samples[name]) for name, rows in activations.samples.items())


def test_state_of_other_texts_is_not_taken(nano_f16: Path, tmp_path: Path) -> None:
    collect(nano_f16, TEXTS[:4], device="auto", state_path=tmp_path / "state.npz")
    _, vectors = collect(nano_f16, TEXTS[4:8], device="auto", state_path=tmp_path / "state.npz")
    assert np.array_equal(vectors, collect(nano_f16, TEXTS[4:8], device="auto")[1])


def test_overflow_names_tensor_and_text(nano_f16: Path, tmp_path: Path) -> None:
    """A row of the token table is infinite: only the text with that token is at fault."""
    path = tmp_path / "poisoned.gguf"
    shutil.copy(nano_f16, path)
    with Embedder(nano_f16) as model:
        others = {int(i) for text in TEXTS for i in model.tokenize(model.prompts["query"] + text.text)}
        token = next(int(i) for i in model.tokenize("zebra xylophone") if int(i) not in others)
    with path.open("rb+") as file:
        file.seek(Weights(path).infos["token_embd.weight"].begin + token * 512)
        file.write(np.full(256, np.inf, dtype=np.float16).tobytes())
    texts = [*TEXTS[:5], EvalText("bad-one", "document", "en", "zebra xylophone"), *TEXTS[5:]]
    with pytest.raises(NonFiniteActivations, match=r"blk\.0\.attn_q\.weight meets .* calibration text bad-one"):
        collect(path, texts, device="auto")


@pytest.fixture
def other_imatrix(collected: tuple[Activations, np.ndarray], nano_f16: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "nano.imatrix.gguf"
    write_imatrix(path, collected[0], Weights(nano_f16).header, TEXTS)
    yield path


def test_imatrix_of_another_model_is_refused(other_imatrix: Path, minilm_f16: Path, nano_f16: Path) -> None:
    with pytest.raises(WrongImatrix, match="made for another model"):
        read_imatrix(other_imatrix, Weights(minilm_f16))
    with pytest.raises(WrongImatrix, match="is no importance matrix"):
        read_imatrix(nano_f16, Weights(nano_f16))


def test_command_writes_the_file_and_no_more(nano_f16: Path, tmp_path: Path, run: Run) -> None:
    source = tmp_path / "my-F16.gguf"
    shutil.copy(nano_f16, source)
    made = run("quantize", "imatrix", source, prelude=FEW_TEXTS)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{tmp_path / 'my.imatrix.gguf'}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"my-F16.gguf", "my.imatrix.gguf"}
    again = run("quantize", "imatrix", source)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
