"""A vector depends on its text alone: not on company, order, duplicates, a shared prompt, passes, or threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import NANO, copy_of, edit_json
from conftest import Release, facts_of
from f2gguf.evals.drift import drift
from f2gguf.evals.texts import load_texts
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import Closed
from f2gguf.runtime.llama import context
from f2gguf.runtime.llama.context import N_UBATCH, LastTokenContext
from f2gguf.runtime.llama.model import MIN_FLASH
from f2gguf.runtime.llama.packing import pack, shared_length, unique
from f2gguf.runtime.llama.worker import Worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ALL = [text.text for text in load_texts()]
TEXTS = [*(text.text for text in load_texts()[::12] if text.kind != "long"), "", "a", "a b", "word " * 60]
EXACT = 1e-6  # cosine 0.999999: what the same weights owe the same text


@pytest.fixture(scope="module", params=["f16", "bf16", "f32"])
def full_precision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    path = tmp_path_factory.mktemp("exact") / f"nano-{request.param}.gguf"
    convert(facts_of(NANO), path, dtype=request.param)
    with Embedder(path) as model:
        yield model


@pytest.fixture(scope="module")
def alone(full_precision: Embedder) -> dict[str, np.ndarray]:
    """Vectors of single calls: as documents, and (longer than any company) as queries with the prompt in front."""
    documents = np.stack([full_precision.encode(text) for text in TEXTS])
    return {"document": documents, "query": np.stack([full_precision.encode_query(text) for text in TEXTS])}


@given(
    chosen=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=80),
    kind=st.sampled_from(["query", "document"]),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_in_any_order_gives_the_vectors_of_single_texts(
    full_precision: Embedder, alone: dict[str, np.ndarray], chosen: list[int], kind: str
) -> None:
    encode = full_precision.encode_query if kind == "query" else full_precision.encode_document
    assert drift(encode([TEXTS[i] for i in chosen]), alone[kind][chosen]).max() < EXACT


def test_a_shared_prompt_changes_nothing(full_precision: Embedder) -> None:
    with Embedder(full_precision.header.path, deterministic=True) as unshared:
        assert drift(full_precision.encode_query(TEXTS), unshared.encode_query(TEXTS)).max() < EXACT


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.TruncationWarning")
@pytest.mark.parametrize(
    "n_tokens", [MIN_FLASH - 1, MIN_FLASH, LastTokenContext.cpu_tokens + 1, N_UBATCH, N_UBATCH + 1, 1900]
)
def test_texts_of_several_passes_equal_transformers(nano: Embedder, n_tokens: int) -> None:
    from f2gguf.evals.full_precision import transformers_vectors

    text = " ".join(ALL)
    with Embedder(nano.header.path, max_tokens=n_tokens) as model:
        result = model.embed([text, "short"])
        wanted = transformers_vectors(NANO, [model.tokenize(text)], pooling="last")
    assert result.n_tokens[0] == n_tokens
    assert result.truncated.tolist() == [True, False]
    assert drift(result.vectors[:1], wanted).max() < 2e-5


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.TruncationWarning")
def test_mean_pooling_of_a_causal_model_sees_all_of_a_long_text(tmp_path: Path) -> None:
    """llama.cpp pools each pass by itself: the text must fit one."""
    from f2gguf.evals.full_precision import transformers_vectors

    folder = copy_of(NANO, tmp_path / "mean")
    edit_json(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=True, pooling_mode_lasttoken=False)
    convert(facts_of(folder), tmp_path / "mean.gguf")
    with Embedder(tmp_path / "mean.gguf", max_tokens=900) as model:
        vectors = model.encode([" ".join(ALL)])
        wanted = transformers_vectors(folder, [model.tokenize(" ".join(ALL))], pooling="mean")
    assert drift(vectors, wanted).max() < 2e-5


@pytest.mark.slow
def test_a_graph_without_the_tensor_falls_back_to_stock_pooling_and_says_so(
    nano: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(context.LastTokenContext, "tapped", "not in this graph")
    # Batches are packed before the first one, a long text, fails: those behind it count on a prompt that they share
    texts = ["word " * 240, *(f"n{i}" for i in range(60)), *TEXTS]
    with Embedder(nano.header.path) as model:
        assert "last-token path" in model.description
        vectors = model.encode_query(texts)
        assert "llama.cpp's last pooling" in model.description
    assert "llama.cpp's own pooling is used" in caplog.text
    assert drift(vectors, nano.encode_query(texts)).max() < 1e-5  # stock pooling sums short texts up in F16


@pytest.mark.parametrize("variant", ["Q8_0", "Q4_K_M", "Q4_0"])
def test_quantised_files_depend_little_on_the_company(nano_release: Release, variant: str) -> None:
    with Embedder(nano_release.file(variant)) as model:
        together = model.encode_query(TEXTS)
        single = np.stack([model.encode_query(text) for text in TEXTS])
    assert drift(together, single).max() < 1e-4  # measured: 4e-6, 2e-5 and 3e-5 on 2 cores with AVX-512


def test_deterministic_vectors_are_equal_to_the_byte(nano_release: Release) -> None:
    with Embedder(nano_release.file("Q4_K_M"), deterministic=True) as model:
        forward = model.encode_query(TEXTS)
        backward = model.encode_query(TEXTS[::-1])
        single = model.encode_query(TEXTS[7])
    assert np.array_equal(forward, backward[::-1])
    assert np.array_equal(forward[7], single)


@pytest.mark.slow
def test_many_threads_may_share_one_embedder(nano: Embedder) -> None:
    wanted = nano.encode_query(TEXTS)
    results: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        results[i] = nano.encode_query(TEXTS[i::4]) if i % 2 else nano.encode_query(TEXTS)[i::4]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert drift(results[i], wanted[i::4]).max() < EXACT


@pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.TruncationWarning")
def test_close_during_another_threads_work_ends_it_with_an_error(nano: Embedder) -> None:
    model = Embedder(nano.header.path)
    outcome: list[BaseException | None] = []
    started = threading.Event()

    def work() -> None:
        try:
            model.encode(ALL, on_progress=lambda _: started.set())
            outcome.append(None)
        except Closed as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    model.close()
    thread.join()
    assert isinstance(outcome[0], Closed)
    with pytest.raises(Closed, match="open the file again"):
        model.encode("text")
    model.close()  # twice is once


def test_a_thread_with_the_number_of_an_ended_worker_is_not_taken_for_it() -> None:
    """Systems give the number of an ended thread to the next one, which then computed with contexts that were freed."""
    worker, outcomes = Worker(), []
    number = worker(threading.get_ident)
    worker.close(lambda: None, wait=True)

    def work() -> None:
        with pytest.raises(Closed):
            worker(lambda: None)
        outcomes.append(threading.get_ident())

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(outcomes) == 20
    if number not in outcomes:
        pytest.skip("this system gives no number twice")


def test_an_embedder_that_nobody_holds_ends_its_thread(nano: Embedder) -> None:
    before = set(threading.enumerate())
    model = Embedder(nano.header.path)
    model.encode("text")
    threads = set(threading.enumerate()) - before  # the worker, and maybe one that is about to end
    assert threads
    del model
    for thread in threads:
        thread.join(timeout=10)
    assert not [t.name for t in threads if t.is_alive()]


def test_equal_texts_are_computed_once_and_counted_each(nano: Embedder) -> None:
    advanced: list[int] = []
    vectors = nano.encode(["same"] * 50 + ["other"], on_progress=advanced.append)
    assert sum(advanced) == 51
    assert len(advanced) == 1
    assert np.array_equal(vectors[0], vectors[49])


def test_packing_keeps_every_text_once_and_the_limits() -> None:
    lengths = [5, 300, 7, 7, 120, 1, 256, 3] * 9
    batches = list(pack(lengths, n_tokens=256, n_texts=10))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 10
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= 256


def test_shared_length_leaves_every_text_a_token_of_its_own() -> None:
    a, b = np.arange(10, dtype=np.int32), np.arange(6, dtype=np.int32)
    assert shared_length([a, b]) == 5
    assert shared_length([a, a + 1]) == 0
    assert shared_length([a[:4], a]) == 0, "three shared tokens are too few"
    assert shared_length([a]) == 0


def test_unique_gives_back_every_text() -> None:
    texts = [np.array(ids, dtype=np.int32) for ids in ([1, 2], [3], [1, 2], [2, 1])]
    different, index = unique(texts)
    assert len(different) == 3
    assert all(np.array_equal(different[i], ids) for i, ids in zip(index, texts, strict=True))
