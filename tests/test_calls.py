"""An Embedder where a SentenceTransformer stands: the same arguments and shapes, and a word for all that differs."""

from __future__ import annotations

import inspect
import multiprocessing
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MINILM, NANO, copy_of
from conftest import facts_of
from f2gguf.evals.drift import drift
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import (
    ExtraMissing,
    FileWarning,
    InputError,
    PoolBroken,
    TextError,
    UnknownDims,
    UnknownName,
    WrongUsage,
)
from f2gguf.runtime.pool import Pool

TEXTS = ["a cat on the mat", "ein Hund", ""]


def sentence_transformer(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sentence_transformer(NANO)


def pandas() -> Any:
    import pandas

    return pandas


def polars() -> Any:
    import polars

    return polars


def tensor(rows: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(rows)


@pytest.mark.slow
def test_encode_takes_the_same_arguments_in_the_same_order_with_the_same_defaults(theirs: Any) -> None:
    def arguments(encode: Callable[..., Any]) -> list[tuple[str, Any]]:
        parameters = inspect.signature(encode).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    ours, wanted = arguments(Embedder.encode), arguments(type(theirs).encode)
    assert ours[1][0] == wanted[1][0] == "inputs"
    assert ours[2:] == wanted[2:]


@pytest.mark.parametrize("method", ["encode", "encode_query", "encode_document"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": False, "convert_to_tensor": True},
        {"batch_size": 1, "show_progress_bar": False, "device": "cpu", "normalize_embeddings": True},
        {"prompt": "find: ", "truncate_dim": 64, "normalize_embeddings": True},
        {"prompt": None, "prompt_name": None},
        {"prompt_name": "query", "precision": "float32", "pool": None, "chunk_size": None},
    ],
)
@pytest.mark.slow
def test_results_have_the_types_shapes_and_values_of_sentence_transformers(
    nano: Embedder, theirs: Any, method: str, options: dict[str, Any]
) -> None:
    for inputs in (TEXTS, tuple(TEXTS), TEXTS[0], np.array(TEXTS), np.array(TEXTS, dtype=object)):
        ours, wanted = (getattr(model, method)(inputs, **options) for model in (nano, theirs))
        assert type(ours) is type(wanted)
        assert [np.asarray(row).dtype for row in ours] == [np.asarray(row).dtype for row in wanted]
        ours, wanted = (np.array([np.asarray(row) for row in rows]) for rows in (ours, wanted))
        assert ours.shape == wanted.shape
        assert drift(np.atleast_2d(ours), np.atleast_2d(wanted)).max() < 2e-5
        np.testing.assert_allclose(ours, wanted, atol=2e-3)


def test_arguments_may_stand_without_their_names(nano: Embedder) -> None:
    wanted = nano.encode(TEXTS, prompt_name="query")
    np.testing.assert_array_equal(nano.encode(TEXTS, "query"), wanted)
    np.testing.assert_array_equal(nano.encode_document(TEXTS, "query", None, 8, False), wanted)
    np.testing.assert_array_equal(nano.encode_query(TEXTS, None, None, 8), nano.encode_query(TEXTS))
    np.testing.assert_array_equal(nano.encode(sentences=TEXTS), nano.encode(TEXTS))
    np.testing.assert_array_equal(nano.encode_query(sentences=TEXTS), nano.encode_query(TEXTS))


def test_unknown_arguments_are_named_as_python_does(nano: Embedder) -> None:
    for encode in (nano.encode, nano.encode_query, nano.encode_document):
        with pytest.raises(TypeError, match=r"encode\(\) got an unexpected keyword argument 'batchsize'"):
            encode(TEXTS, batchsize=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, WrongUsage, "batch_size is 0: it must be positive"),
        ({"batch_size": None}, WrongUsage, "batch_size is None: it must be positive"),
        ({"output_value": "token_embeddings"}, WrongUsage, "'token_embeddings': f2gguf gives one vector for each text"),
        ({"output_value": None}, WrongUsage, "output_value is None"),
        ({"precision": "int8"}, WrongUsage, "int8: .* states no ranges for it"),
        ({"pool": {"input": None}}, WrongUsage, "pool is .*: an Embedder has pools of its own. Start one"),
        ({"chunk_size": 0}, WrongUsage, "chunk_size is 0: it is a number of texts, and must be positive"),
        ({"chunk_size": "10"}, WrongUsage, "chunk_size is '10'"),
        ({"device": "cuda"}, WrongUsage, "device is 'cuda': this Embedder computes on 'cpu', and stays there"),
        ({"device": "cuda:1"}, WrongUsage, "device is 'cuda:1'"),
        ({"device": ["cpu", "cuda:1"]}, WrongUsage, "computes on 'cpu'"),
        ({"device": []}, WrongUsage, "device is an empty list"),
        ({"prompt_name": "passage"}, UnknownName, "no prompt of .* is called 'passage'"),
        (
            {"prompt_name": ["query"]},
            TextError,
            r"a prompt and its name are texts, and this is \['query'\] of type list",
        ),
        ({"prompt": 5}, TextError, "a prompt and its name are texts, and this is 5 of type int"),
        ({"precision": ["float32"]}, UnknownName, "no precision is called"),
    ],
)
def test_what_an_embedder_cannot_do_is_said(
    nano: Embedder, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    for encode in (nano.encode, nano.encode_query):
        with pytest.raises(error, match=words):
            encode(TEXTS, **options)


@pytest.mark.slow
def test_the_device_in_use_may_be_named(nano: Embedder, theirs: Any) -> None:
    assert nano.device == theirs.device.type == "cpu"
    for device in (None, "cpu", "auto", "cpu:0", theirs.device):
        assert nano.encode("a", device=device).shape == (256,)


@pytest.mark.slow
@pytest.mark.parametrize("has_normalize", [True, False])
def test_false_leaves_the_length_to_the_models_modules(tmp_path: Path, has_normalize: bool) -> None:
    """Libraries pass normalize_embeddings=False, which is the default; a Normalize module normalises all the same."""
    folder = copy_of(MINILM, tmp_path / "model")
    if not has_normalize:
        modules = [
            m for m in __import__("json").loads((folder / "modules.json").read_text()) if "Normalize" not in m["type"]
        ]
        (folder / "modules.json").write_text(__import__("json").dumps(modules))
    convert(facts_of(folder), tmp_path / "model.gguf")
    theirs = sentence_transformer(folder)
    with Embedder(tmp_path / "model.gguf") as ours:
        for options in ({}, {"normalize_embeddings": False}, {"normalize_embeddings": True}):
            found, wanted = (np.linalg.norm(model.encode(TEXTS, **options), axis=1) for model in (ours, theirs))
            np.testing.assert_allclose(found, wanted, rtol=1e-3)
        raw = np.linalg.norm(ours.embed(TEXTS, normalize=False).vectors, axis=1)
        assert (raw > 1.5).all()
        np.testing.assert_allclose(np.linalg.norm(ours.embed(TEXTS, normalize=True).vectors, axis=1), 1, rtol=1e-6)


# Texts


@pytest.mark.parametrize(
    "column",
    [
        tuple,
        iter,
        deque,
        lambda texts: dict.fromkeys(texts).keys(),
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: pandas().Series(texts, index=[5, 6, 7]),
        lambda texts: pandas().Series(texts, dtype="string"),
        lambda texts: polars().Series(texts),
    ],
)
def test_texts_come_in_anything_that_has_an_order(nano: Embedder, column: Any) -> None:
    np.testing.assert_array_equal(nano.encode(column(TEXTS)), nano.encode(TEXTS))


def test_a_string_of_numpy_is_a_single_text(nano: Embedder) -> None:
    np.testing.assert_array_equal(nano.encode(np.str_("a")), nano.encode("a"))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "no list of texts, but None of type NoneType"),
        (float("nan"), "but nan of type float"),
        (5, "but 5 of type int"),
        (b"text", "but b'text' of type bytes"),
        ({"text": "a"}, r"but \{'text': 'a'\} of type dict"),
        ({"a", "b"}, "of type set"),
        (lambda: pandas().DataFrame({"text": TEXTS}), "of type DataFrame"),
        (np.array([["a", "b"]]), "of type ndarray"),
        (np.array("a"), "of type ndarray"),
        (lambda: polars().DataFrame({"text": TEXTS}), "text 1 of 1: is no text, but .* of type Series"),
        ([["a", "b"], ["c", "d"]], r"text 1 of 2: is no text, but \['a', 'b'\] of type list"),
        (
            lambda: pandas().Series(["a", None]),
            "text 2 of 2: is no text, but (nan of type float|None of type NoneType)",
        ),
        (lambda: pandas().Series(["a", pandas().NA], dtype="string"), "text 2 of 2: is no text, but .*NA.* of type"),
        (["x" * 5, list(range(10**6))], "of type list. Pass strings"),
    ],
)
def test_what_is_no_text_is_named_at_every_door(nano: Embedder, inputs: Any, words: str) -> None:
    for call in (nano.encode, nano.embed, nano.encode_query, nano.encode_document):
        with pytest.raises(TextError, match=words) as raised:
            call(inputs() if callable(inputs) else inputs)
        assert len(str(raised.value)) < 250
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, float("nan"), ["a"], b"a"])
def test_tokenize_takes_one_text(nano: Embedder, value: Any) -> None:
    with pytest.raises(TextError, match=f"tokenize takes one text, and this is .* of type {type(value).__name__}"):
        nano.tokenize(value)


def test_prompt_goes_before_prompt_name_with_a_warning(nano: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    np.testing.assert_array_equal(nano.encode("a", prompt="x: ", prompt_name="query"), nano.encode("a", prompt="x: "))
    assert "prompt_name ('query') is ignored" in caplog.text


def test_default_prompt_name_is_for_encode_alone(minilm_f16: Path) -> None:
    with Embedder(minilm_f16) as model:
        assert model.default_prompt_name is None
        model.prompts["mine"] = "mine: "
        plain, prompted = model.encode("a"), model.encode("a", prompt="mine: ")
        model.default_prompt_name = "mine"
        np.testing.assert_array_equal(model.encode("a"), prompted)
        np.testing.assert_array_equal(model.encode("a", prompt=""), plain)
        for encode in (model.encode_query, model.encode_document):
            np.testing.assert_array_equal(encode("a"), plain)


# What is asked of it


def test_progress_is_drawn_on_stderr_when_asked(nano: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[int] = []
    for shown in (None, False):
        nano.encode(TEXTS, show_progress_bar=shown)
    assert capsys.readouterr() == ("", "")
    nano.encode((text for text in TEXTS), show_progress_bar=True, on_progress=told.append)
    out, err = capsys.readouterr()
    assert (out, sum(told)) == ("", 3)
    assert "3/3" in err


def test_tensors_without_torch_name_the_package(nano: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("f2gguf.runtime.calls.find_spec", lambda _: None)
    with pytest.raises(ExtraMissing, match=r"torch is not installed.* Run: pip install torch"):
        nano.encode("a", convert_to_tensor=True)


@pytest.mark.slow
def test_longest_input_can_be_set(nano_f16: Path, theirs: Any) -> None:
    with Embedder(nano_f16) as model:
        assert model.max_seq_length == model.get_max_seq_length() == theirs.max_seq_length == 2048
        model.max_seq_length = 16
        with pytest.warns(UserWarning, match="longer than 16 tokens"):
            result = model.embed(["word " * 100])
        assert result.n_tokens.tolist() == [16]
        assert len(model.tokenize("word " * 100)) == 16
        with pytest.raises(WrongUsage, match="max_tokens is 5000: f2llm-nano takes 2 to 4096"):
            model.max_seq_length = 5000
        model.max_seq_length = None
        assert model.max_seq_length == 2048


def test_widths_are_told_by_both_names(nano_f16: Path) -> None:
    with Embedder(nano_f16, truncate_dim=64) as model:
        assert model.get_embedding_dimension() == model.get_sentence_embedding_dimension() == 64
        model.truncate_dim = None
        assert model.get_embedding_dimension() == model.encode("a").shape[0] == 256


@pytest.mark.slow
def test_functions_of_sentence_transformers_take_it(minilm: Embedder) -> None:
    from sentence_transformers import util

    documents = minilm.encode(["a car", "a kitten"], convert_to_tensor=True)
    (hits,) = util.semantic_search(minilm.encode("a cat", convert_to_tensor=True), documents)
    assert hits[0]["corpus_id"] == 1
    ((_, first, second), *_) = util.paraphrase_mining(minilm, ["a cat", "a car", "a kitten"])
    assert {first, second} == {0, 2}


# Several processes


@pytest.fixture(scope="module")
def pool(nano: Embedder) -> Iterator[Pool]:
    pool = nano.start_multi_process_pool(["cpu"])
    yield pool
    nano.stop_multi_process_pool(pool)


@pytest.mark.slow
def test_a_pool_gives_what_the_embedder_gives_in_the_order_of_the_texts(nano: Embedder, pool: Pool) -> None:
    told: list[int] = []
    for options in ({}, {"truncate_dim": 64, "prompt_name": "query", "chunk_size": 3}, {"normalize_embeddings": True}):
        found = nano.encode(TEXTS * 4, pool=pool, on_progress=told.append, **options)  # type: ignore[arg-type]
        options.pop("chunk_size", None)
        np.testing.assert_allclose(found, nano.encode(TEXTS * 4, **options), atol=2e-5)  # type: ignore[arg-type]
    assert sum(told) == 36
    assert nano.encode("a", pool=pool).shape == (256,)
    assert nano.encode([], pool=pool).shape == (0, 256)


@pytest.mark.slow
def test_errors_of_a_pool_name_the_text_and_leave_it_at_work(nano: Embedder, pool: Pool) -> None:
    with pytest.raises(TextError, match="behind the first 8 texts, text 1 of 1: character 1 is a lone surrogate"):
        nano.encode([*"abcdefgh", "\ud800"], pool=pool, chunk_size=1)
    with (
        pytest.warns(FileWarning, match="mean"),
        Embedder(nano.header.path, pooling="mean") as other,
        pytest.raises(WrongUsage, match="another"),
    ):
        other.encode("a", pool=pool)
    with pytest.raises(UnknownName, match=r"no prompt of .* is called 'x'"):
        nano.encode("a", pool=pool, prompt_name="x")
    assert nano.encode("a", pool=pool).shape == (256,)


@pytest.mark.slow
def test_what_waits_of_an_abandoned_call_is_not_computed(
    nano: Embedder, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def abandon(_: int) -> None:
        raise KeyboardInterrupt

    futures: list[Future[Any]] = []
    submit = pool._submit
    monkeypatch.setattr(pool, "_submit", lambda *chunk: futures.append(submit(*chunk)) or futures[-1])
    with pytest.raises(KeyboardInterrupt):
        nano.encode(TEXTS * 20, pool=pool, chunk_size=1, on_progress=abandon)
    assert sum(future.cancelled() for future in futures) > len(futures) / 2
    assert nano.encode("a", pool=pool).shape == (256,)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_of_a_pool_end_with_their_parent(nano: Embedder) -> None:
    code = "import multiprocessing, os, signal, sys\nfrom f2gguf import Embedder\nmodel = Embedder(sys.argv[1])\n"
    code += "pool = model.start_multi_process_pool(['cpu'])\nmodel.encode('a', pool=pool)\n"
    code += "print(multiprocessing.active_children()[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    parent = subprocess.run([sys.executable, "-c", code, nano.header.path], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    stat, begin = Path("/proc", parent.stdout.strip(), "stat"), time.monotonic()
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":  # which nobody waits for
        assert time.monotonic() < begin + 30, "it waits for work for ever"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_list_of_devices_is_a_pool_for_one_call(nano: Embedder) -> None:
    np.testing.assert_allclose(nano.encode_query(TEXTS, device=["cpu"]), nano.encode_query(TEXTS), atol=2e-5)


@pytest.mark.slow
def test_a_pool_whose_process_was_killed_or_that_was_closed_says_so(nano: Embedder) -> None:
    others = multiprocessing.active_children()
    pool = nano.start_multi_process_pool(["cpu"])
    nano.encode("a", pool=pool)
    (process,) = set(multiprocessing.active_children()) - set(others)
    process.kill()
    with pytest.raises(PoolBroken, match="a process of the pool ended before its work was done"):
        nano.encode(TEXTS, pool=pool)
    nano.stop_multi_process_pool(pool)
    closed = nano.start_multi_process_pool(["cpu"])
    for _ in range(2):
        nano.stop_multi_process_pool(closed)
    with pytest.raises(PoolBroken, match="the pool takes no texts"):
        nano.encode(TEXTS, pool=closed)


@pytest.mark.slow
def test_the_checkpoints_tokenizer_is_at_hand(nano: Embedder) -> None:
    opening, closing = nano.encoder.special_ids
    ids = nano.tokenizer.encode("a cat on the mat", add_special_tokens=False).ids
    assert [*opening, *ids, *closing] == nano.tokenize("a cat on the mat").tolist()


def test_width_may_change_for_a_block(nano: Embedder) -> None:
    with nano.truncate_embeddings(64):
        assert nano.encode("a").shape == (64,)
    assert nano.encode("a").shape == (256,)
    with pytest.raises(UnknownDims, match="65 dimensions"), nano.truncate_embeddings(65):
        pass
    assert nano.truncate_dim is None


# Similarity


def rows_of(vectors: Any) -> np.ndarray:
    rows = [row.detach() if hasattr(row, "detach") else row for row in vectors]
    return np.atleast_2d(np.array([np.asarray(row, dtype=np.float32) for row in rows]))


ONE, TWO = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
ONE[2] = 0


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (ONE, TWO),
        lambda: (ONE[0], TWO),
        lambda: (ONE.astype(np.float16), TWO.astype(np.float64)),
        lambda: ((100 * ONE).astype(np.int8), TWO),
        lambda: (list(ONE), TWO.tolist()),
        lambda: (tensor(ONE), tensor(TWO)),
        lambda: (list(tensor(ONE)), TWO),
        lambda: (tensor(ONE).requires_grad_(), TWO),
    ],
)
@pytest.mark.slow
def test_similarities_are_those_of_sentence_transformers(nano: Embedder, theirs: Any, pair: Any) -> None:
    left, right = pair()
    assert nano.similarity_fn_name == theirs.similarity_fn_name == "cosine"
    plain = [rows_of(it) for it in (left, right)]
    found, wanted = nano.similarity(left, right), theirs.similarity(*plain)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if len(found) == 4:
        found, wanted = nano.similarity_pairwise(left, right), theirs.similarity_pairwise(*plain)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    has_tensors = any(type(it[0]).__module__ == "torch" for it in (left, right))
    assert isinstance(found, type(wanted) if has_tensors else np.ndarray)


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        ("a", "b", "'a' of type str are none. Texts become vectors by `encode`"),
        (["a", "b"], np.eye(2), "of type list are none"),
        (np.eye(2), None, "None of type NoneType are none"),
        ([[1.0], [1.0, 2.0]], np.eye(2), "vectors to compare: "),
        (np.eye(2), np.eye(3), "vectors to compare: 2 and 3 dimensions"),
        (np.ones((2, 2, 2)), np.eye(2), "of type ndarray are none"),
    ],
)
def test_what_is_no_vector_is_named(left: Any, right: Any, words: str) -> None:
    for compare in (Embedder.similarity, Embedder.similarity_pairwise):
        with pytest.raises(InputError, match=words):
            compare(left, right)


def test_rows_are_compared_in_pairs() -> None:
    with pytest.raises(InputError, match="row by row: 2 and 1 of them"):
        Embedder.similarity_pairwise(np.eye(2), np.eye(2)[:1])


def test_numpy_alone_needs_no_torch() -> None:
    code = (
        "from f2gguf import Embedder; import sys; Embedder.similarity([[1.0]], [[1.0]]); print('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_numbers_of_other_types_are_whole_or_refused(nano: Embedder) -> None:
    assert nano.encode("a", truncate_dim=64.0).shape == nano.encode("a", truncate_dim=np.int64(64)).shape == (64,)  # type: ignore[arg-type]
    whole = nano.max_seq_length
    for limit in (7.0, "7", float("nan"), True, [7]):
        with pytest.raises(WrongUsage, match=r"max_tokens is .* takes 2 to 4096"):
            nano.max_seq_length = limit  # type: ignore[assignment]
    assert nano.max_seq_length == whole


@pytest.mark.parametrize("n_threads", [0, -1, 513, 100_000, 2.0, "2"])
def test_threads_that_ggml_cannot_have_are_refused(nano_f16: Path, n_threads: Any) -> None:
    with pytest.raises(WrongUsage, match=r"n_threads is .*: pass a whole number from 1 to 512 \(--threads\)"):
        Embedder(nano_f16, n_threads=n_threads)
