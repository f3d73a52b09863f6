"""The checkpoint run layer by layer gives the vectors of the whole one, in the memory of one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import NANO, edit_json, save_tensors, tiny_tensors
from conftest import facts_of
from f2gguf.evals import full_precision
from f2gguf.evals.conversion import check_conversion
from f2gguf.evals.full_precision import LAYER_BY_LAYER, choose_run, streamed_vectors, transformers_vectors
from f2gguf.evals.texts import load_texts
from f2gguf.runtime.errors import MemoryMissing

SYNTHETIC = Path(__file__).resolve().parent.parent / "scripts" / "synthetic"
LENGTHS = (40, 300, 2, 40, 1)
IDS = [np.random.default_rng(i).integers(0, 16384, n).astype(np.int32) for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_layers_in_turn_give_the_vectors_of_the_whole_model(pooling: str) -> None:
    done: list[int] = []
    streamed = streamed_vectors(NANO, IDS, pooling=pooling, on_progress=done.append)
    np.testing.assert_allclose(streamed, transformers_vectors(NANO, IDS, pooling=pooling), atol=1e-6)
    assert sum(done) == len(IDS)


def test_a_batch_of_texts_gives_the_vectors_of_each() -> None:
    together = transformers_vectors(NANO, IDS, pooling="last")
    np.testing.assert_allclose(
        together, np.concatenate([transformers_vectors(NANO, [ids], pooling="last") for ids in IDS]), atol=1e-6
    )


def test_shards_and_the_prefix_of_causal_models_are_read(tiny: Path) -> None:
    edit_json(tiny / "config.json", layer_types=["full_attention"] * 28)  # as F2LLM-v2-80M states them
    whole = transformers_vectors(tiny, IDS, pooling="last")
    save_tensors(tiny, {f"model.{name}": tensor for name, tensor in tiny_tensors().items()}, n_shards=3)
    np.testing.assert_allclose(streamed_vectors(tiny, IDS, pooling="last"), whole, atol=1e-6)


def test_little_memory_means_rounds_of_few_texts_and_the_same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transformers_vectors(NANO, IDS, pooling="last")
    monkeypatch.setattr(full_precision, "available_memory_bytes", lambda: 2 * 4 * 256 * 45)  # states of 45 tokens
    run, name = choose_run(NANO, 8_000_000)
    assert (run, name) == (streamed_vectors, LAYER_BY_LAYER)
    batches = full_precision._batches(IDS)
    assert batches == [[4], [2], [0, 3], [1]]
    assert [len(some) for some in full_precision._rounds(batches, IDS, max_tokens=45)] == [2, 1, 1]
    np.testing.assert_allclose(run(NANO, IDS, pooling="last"), whole, atol=1e-6)


def test_gate_1_runs_layer_by_layer_where_the_weights_do_not_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, texts = facts_of(tiny), load_texts()[:4]
    whole = transformers_vectors(tiny, IDS, pooling="last")
    monkeypatch.setattr(full_precision, "available_memory_bytes", lambda: 1_000_000)
    check = check_conversion(
        whole,
        texts,
        folder=tiny,
        checkpoint_sha256="0",
        n_parameters=facts.checkpoint.n_parameters,
        token_ids=lambda: IDS,
        pooling="last",
    )
    assert (check.reference, check.holds, check.n) == ("transformers float32, layer by layer", True, 4)


def test_a_model_that_is_not_run_in_layers_is_refused_with_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.setattr(full_precision, "available_memory_bytes", lambda: 10**9)
    with pytest.raises(MemoryMissing, match=r"need 1\.7 GB of memory, 1\.0 GB are free, and a bert model is not run"):
        choose_run(tmp_path, 335_000_000)


def test_layers_in_turn_need_less_memory_by_the_weights(tmp_path: Path) -> None:
    """80M in float32 takes 320 MB; one of its 8 layers 13 MB. Each in a process of its own, its peak measured."""
    subprocess.run([sys.executable, SYNTHETIC, "80M", tmp_path], check=True, capture_output=True)
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from f2gguf.evals import full_precision; from f2gguf.evals.bench.sides import peak_rss_bytes\n"
        "ids = [np.arange(n, dtype=np.int32) for n in (8, 64)]\n"
        "getattr(full_precision, sys.argv[1])(Path(sys.argv[2]), ids, pooling='last')\n"
        "print(peak_rss_bytes())"
    )
    whole, streamed = (
        int(subprocess.run([sys.executable, "-c", code, way, tmp_path], check=True, capture_output=True).stdout)
        for way in ("transformers_vectors", "streamed_vectors")
    )
    assert whole - streamed > 250_000_000
