"""f2gguf's own products are those of the file's weights, and are left out where they cannot be had."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from checkpoints import edit_json, fill, write_tiny
from conftest import facts_of
from f2gguf.evals.drift import drift
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.repair.recipe import Recipe, make
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.runtime import Embedder, compiler
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama import engine, model
from f2gguf.runtime.llama.kernels import choice, own, trial
from f2gguf.runtime.llama.kernels.buffers import NUMBERS
from f2gguf.runtime.llama.library import OWN, libggml
from f2gguf.runtime.llama.model import MIN_FLASH, Model
from numpy.typing import NDArray

TEXTS = ["an archiver for zip files", "how do I play chess?", "数据库服务器", "x " * 100]
needs_own = pytest.mark.skipif(not own.works(), reason="needs a processor with AVX-512, and a C++ compiler")
needs_vnni = pytest.mark.skipif(
    own.units() != "VNNI", reason="needs a processor with AVX-512's VNNI and no AMX, and a C++ compiler"
)
needs_codes = pytest.mark.skipif(
    "Q4_0" not in own.products(), reason="needs a processor with AMX or AVX-512's VNNI, and a C++ compiler"
)
needs_floats = pytest.mark.skipif(
    "F32" not in own.products(), reason="needs a processor with AVX-512 and no AMX, and a C++ compiler"
)
CODES = [kind for kind, units in own.PRODUCTS["VNNI"].items() if units == "VNNI"]
SHAPES = [(32, 256, 1), (96, 1280, 16), (64, 2304, 17), (64, 512, 40)]  # rows, columns, tokens


def as_bf16(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded to the nearest of those with seven bits after the first, the even one of two."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> own._Library:
    """The kernels that multiply on AMX. Where the processor has none, plain code is its instructions (amx.h)."""
    library = own._registered()
    if not library:
        pytest.skip("needs a processor with AVX-512, and a C++ compiler")
    if library.units == "AMX":
        return library
    sources = shutil.copytree(own._SOURCE.parent, tmp_path_factory.mktemp("amx") / "cpp")
    text = (sources / "products.h").read_text(encoding="utf-8")
    configure = 'asm volatile("ldtilecfg %0" ::"m"(configuration));'
    assert configure in text
    (sources / "products.h").write_text(text.replace(configure, ""), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "_SOURCE", sources / "backend.cpp")
        patch.setattr(own, "_FLAGS", [*own._FLAGS, "-include", str(Path(__file__).with_name("amx.h"))])
        path = own._compiled.__wrapped__()
    assert path
    library = own._open(path)
    library.units = "AMX"
    return library


def own_products(
    matrix: NDArray[np.float32], kind: str, inputs: NDArray[np.float32], library: own._Library | None = None
) -> NDArray[np.float32]:
    library = library or own._registered()
    assert library
    library.switch(True)
    return trial.products(matrix, kind, inputs, backend=library.f2gguf_backend(2))


def quantised(matrix: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """What ggml makes of a matrix in a type."""
    if kind == "F32":
        return matrix
    if kind == "F16":
        return matrix.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        return as_bf16(matrix).astype(np.float32)
    number = NUMBERS[kind]
    data = np.empty(matrix.size // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)][0] * 256, np.uint8)
    n_bytes = libggml.ggml_quantize_chunk(
        number, trial.pointer_to(matrix), trial.pointer_to(data), 0, *matrix.shape, None
    )
    rows = data[:n_bytes].reshape(len(matrix), -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))


@pytest.mark.parametrize("kind", own.PRODUCTS["AMX"])
@pytest.mark.parametrize(("n_rows", "n_columns", "n_tokens"), SHAPES)
def test_products_on_amx_are_those_of_weights_and_inputs_in_bf16(
    amx: own._Library, kind: str, n_rows: int, n_columns: int, n_tokens: int, rng: random.Random
) -> None:
    generator = np.random.default_rng(rng.randrange(1 << 32))
    matrix = generator.standard_normal((n_rows, n_columns), dtype=np.float32)
    inputs = generator.standard_normal((n_tokens, n_columns), dtype=np.float32) * 10 ** generator.uniform(-3, 3)
    is_exact = kind in ("F16", "BF16")
    rounded = np.float64 if is_exact else as_bf16
    wanted = rounded(inputs) @ rounded(quantised(matrix, kind)).T
    found = own_products(matrix, kind, inputs.astype(np.float32), amx)
    # A weight is a product in F32 before it is rounded, in another order for some types: a few of them go the other way
    assert np.abs(found - wanted).max() <= (1e-5 if is_exact else 1e-4) * np.abs(wanted).max()


def in_bytes(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rounded to 8 bits, 32 columns at a time."""
    blocks = inputs.reshape(-1, 32)
    factors = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.round(blocks * (np.float32(1) / factors)).astype(np.float64) * factors
    return rounded.reshape(inputs.shape)


@needs_vnni
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(("n_rows", "n_columns", "n_tokens"), SHAPES)
def test_products_are_those_of_weights_and_inputs_in_bytes(
    kind: str, n_rows: int, n_columns: int, n_tokens: int, rng: random.Random
) -> None:
    generator = np.random.default_rng(rng.randrange(1 << 32))
    matrix = generator.standard_normal((n_rows, n_columns), dtype=np.float32)
    inputs = generator.standard_normal((n_tokens, n_columns), dtype=np.float32) * 10 ** generator.uniform(-3, 3)
    inputs = inputs.astype(np.float32)
    wanted = in_bytes(inputs) @ quantised(matrix, kind).astype(np.float64).T
    assert np.abs(own_products(matrix, kind, inputs) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@needs_floats
@pytest.mark.parametrize("kind", own.PRODUCTS["AVX-512"])
@pytest.mark.parametrize(("n_rows", "n_columns", "n_tokens"), [*SHAPES, (32, 32, 13), (32, 544, 25)])
def test_products_of_floats_are_rounded_nowhere(
    kind: str, n_rows: int, n_columns: int, n_tokens: int, rng: random.Random
) -> None:
    generator = np.random.default_rng(rng.randrange(1 << 32))
    matrix = generator.standard_normal((n_rows, n_columns), dtype=np.float32)
    inputs = generator.standard_normal((n_tokens, n_columns), dtype=np.float32)
    wanted = inputs.astype(np.float64) @ quantised(matrix, kind).astype(np.float64).T
    assert np.abs(own_products(matrix, kind, inputs) - wanted).max() <= 2e-6 * np.abs(wanted).max()


@needs_vnni
@pytest.mark.parametrize("n_columns", [32, 96, 544])
def test_rows_of_an_odd_number_of_blocks_have_their_products(n_columns: int) -> None:
    normal = np.random.default_rng(0).standard_normal
    matrix, inputs = normal((32, n_columns), dtype=np.float32), normal((7, n_columns), dtype=np.float32)
    wanted = in_bytes(inputs) @ quantised(matrix, "Q4_0").astype(np.float64).T
    assert np.abs(own_products(matrix, "Q4_0", inputs) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@needs_codes
@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_no_numbers_have_no_products(kind: str, bad: float) -> None:
    """Nor do they change those of the other tokens. Inputs of zeros have products of zero."""
    inputs, matrix = np.ones((3, 512), dtype=np.float32), np.ones((32, 512), dtype=np.float32)
    inputs[0, 40], inputs[1] = bad, 0
    found = own_products(matrix, kind, inputs)
    assert not np.isfinite(found[0]).any()
    assert np.all(found[1] == 0)
    assert np.allclose(found[2], 512, rtol=1e-3)


def test_bf16_weights_have_the_same_products_in_an_f16_file_on_amx(amx: own._Library) -> None:
    generator = np.random.default_rng(0)
    matrix = as_bf16(generator.uniform(0.5, 1, (64, 1536))).astype(np.float32)
    inputs = generator.standard_normal((40, 1536), dtype=np.float32)
    f16, others = (own_products(matrix, kind, inputs, amx) for kind in ("F16", "BF16"))
    assert np.array_equal(f16, others)
    matrix[40, 1200] += 2**-10
    f16, others = (own_products(matrix, kind, inputs, amx) for kind in ("F16", "BF16"))
    assert not np.array_equal(f16, others)


@needs_codes
@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_a_product_has_the_same_bytes_in_every_batch(kind: str) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((64, 1536), dtype=np.float32)
    inputs = generator.standard_normal((50, 1536), dtype=np.float32)
    together = own_products(matrix, kind, inputs)
    for first, last in ((0, 1), (7, 24), (49, 50)):
        assert np.array_equal(own_products(matrix, kind, inputs[first:last]), together[first:last])


def attended(
    queries: NDArray[np.float32], keys: NDArray[np.float32], values: NDArray[np.float32], mask: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Attention by its definition, in float64, of keys and values in F16."""
    n_shared = len(queries) // len(keys)
    keys, values = (np.repeat(it.astype(np.float16).astype(np.float64), n_shared, axis=0) for it in (keys, values))
    scores = queries.astype(np.float64) @ keys.transpose(0, 2, 1) * queries.shape[2] ** -0.5 + mask
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return (weights / weights.sum(axis=2, keepdims=True) @ values).transpose(1, 0, 2)


def own_attention(*tensors: NDArray[np.float32]) -> NDArray[np.float32]:
    library = own._registered()
    assert library
    library.switch(True)
    found = trial.attention(*tensors, backend=library.f2gguf_backend(2))
    assert not np.array_equal(found, trial.attention(*tensors)), "the CPU's rounds otherwise: two ways were compared"
    return found


def mask_of(lengths: list[int], *, n_shared: int = 0, is_causal: bool = False, window: int = 0) -> NDArray[np.float32]:
    """What tokens of texts see, all after `n_shared` keys that every text sees: 0 or -inf, (n_tokens, n_keys)."""
    text, place = np.repeat(np.arange(len(lengths)), lengths), np.concatenate([np.arange(n) for n in lengths])
    apart = place[:, None] - place
    sees = text[:, None] == text
    if is_causal:
        sees &= apart >= 0
    if window:
        sees &= abs(apart) < window
    sees = np.hstack([np.ones((len(text), n_shared), dtype=bool), sees])
    return np.where(sees, 0, -np.inf).astype(np.float32)


@needs_own
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "size"), [(12, 12, 32), (4, 1, 64), (2, 2, 96), (4, 2, 128), (1, 1, 256)]
)
@pytest.mark.parametrize(
    "mask",
    [
        mask_of([3]),
        mask_of([7, 1, 130, 64, 65]),
        mask_of([5, 120, 3], is_causal=True),
        mask_of([600, 9]),
        mask_of([9, 700], is_causal=True),
        mask_of([20, 400], window=30),
        mask_of([20, 400], is_causal=True, window=50),
        mask_of([8, 30, 17], n_shared=37, is_causal=True),
    ],
    ids=["few", "texts", "causal", "long", "long-causal", "window", "causal-window", "shared"],
)
def test_attention_is_what_it_is_defined_as(
    n_heads: int, n_kv_heads: int, size: int, mask: NDArray[np.float32], rng: random.Random
) -> None:
    normal = np.random.default_rng(rng.randrange(1 << 32)).standard_normal
    n_tokens, n_keys = mask.shape
    shapes = [(n_heads, n_tokens, size), (n_kv_heads, n_keys, size), (n_kv_heads, n_keys, size)]
    tensors = [normal(shape, dtype=np.float32) for shape in shapes]
    wanted = attended(*tensors, mask)
    assert np.abs(own_attention(*tensors, mask) - wanted).max() <= 3e-6 * np.abs(wanted).max()


@needs_own
def test_a_text_attends_alike_in_every_batch_whatever_the_others_are() -> None:
    lengths = [70, 300, 40]
    normal = np.random.default_rng(0).standard_normal
    tensors = [normal((2, sum(lengths), 32), dtype=np.float32) for _ in range(3)]
    for it in tensors:
        it[:, :70] = np.nan
    together = own_attention(*tensors, mask_of(lengths))
    assert np.isnan(together[:70]).all()
    for first, last in ((70, 370), (370, 410)):
        alone = own_attention(*(it[:, first:last] for it in tensors), mask_of([last - first]))
        assert np.array_equal(alone, together[first:last])


@needs_own
def test_attention_of_large_scores_and_of_a_query_that_sees_nothing() -> None:
    normal = np.random.default_rng(0).standard_normal
    queries, keys, values = (normal((1, 40, 32), dtype=np.float32) for _ in range(3))
    mask = mask_of([40])
    mask[3] = -np.inf
    found = own_attention(1e5 * queries, keys, values, mask)
    assert np.array_equal(found[3], np.zeros((1, 32)))
    kept = np.delete(np.arange(40), 3)
    wanted = attended(1e5 * queries[:, kept], keys, values, mask[kept])
    assert np.abs(found[kept] - wanted).max() <= 1e-3 * np.abs(wanted).max()


@needs_own
@pytest.mark.parametrize("shape", [(1, 16), (7, 384), (300, 1536)])
def test_steps_between_products_are_what_they_are_defined_as(shape: tuple[int, int], rng: random.Random) -> None:
    normal = np.random.default_rng(rng.randrange(1 << 32)).standard_normal
    inputs, others, factors = (3 * normal(it, dtype=np.float32) for it in (shape, shape, shape[1:]))
    library = own._registered()
    assert library
    library.switch(True)
    found = trial.steps(inputs, others, factors, backend=library.f2gguf_backend(2))
    x = inputs.astype(np.float64) + others
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * factors
    x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
    wanted = x / (1 + np.exp(-x)) * others + factors
    assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max()
    assert not np.array_equal(found, trial.steps(inputs, others, factors)), "two ways were compared"


@needs_own
def test_gelu_of_any_finite_number_is_one() -> None:
    inputs = np.zeros((1, 16), dtype=np.float32)
    inputs[0, :6] = -3e38, -1e14, -1e5, -20, 20, 1e14
    library = own._registered()
    assert library
    library.switch(True)
    found = trial.compute(libggml.ggml_gelu, trial.Tensor(inputs), backend=library.f2gguf_backend(2))
    assert found.tolist() == [0, 0, 0, 0, 20, np.float32(1e14), *[0] * 10]


@needs_codes
def test_a_pass_without_outputs_needs_no_inputs_of_the_last_products(tmp_path: Path) -> None:
    """What holds a shared prompt has none, so that nothing reaches the last layer's feed-forward network."""
    edit_json(write_tiny(tmp_path / "tiny") / "config.json", num_hidden_layers=1)
    source, path = tmp_path / "F16.gguf", tmp_path / "mixed.gguf"
    convert(facts_of(fill(tmp_path / "tiny")), source)
    types = {name: "Q4_0" if "ffn" in name else "Q4_1" for name in choice.matrices(read_header(source), OWN, ["F16"])}
    make(Weights(source), path, Recipe("Q4_0", types), {}, ready={}, header={})
    with Embedder(path) as model:
        assert "VNNI" in model.encoder.engine.description or own.units() == "AMX"
        together = model.encode_query(TEXTS[:2])
        assert drift(together, np.concatenate([model.encode_query([text]) for text in TEXTS[:2]])).max() < 1e-5


@pytest.mark.parametrize(("n_rows", "n", "n_cols"), [(1, 32, 32), (1300, 1056, 96), (513, 2304, 64)])
def test_products_of_arrays_keep_16_bits_on_amx(
    amx: own._Library, n_rows: int, n: int, n_cols: int, rng: random.Random
) -> None:
    normal = np.random.default_rng(rng.randrange(1 << 32)).standard_normal
    left, right = (normal((rows, n), dtype=np.float32) for rows in (n_rows, n_cols))
    found, wanted = own._product(amx, left, right.T, 2), left.astype(np.float64) @ right.T.astype(np.float64)
    assert found is not None
    assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_products_of_arrays_that_lie_otherwise_are_left_to_others(
    amx: own._Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "_registered", lambda: amx)
    left, right = np.ones((4, 64), dtype=np.float32), np.ones((32, 64), dtype=np.float32)
    assert own.product(left, right.T, 1) is not None
    for others in (
        (left, np.ones((64, 32), dtype=np.float32)),
        (np.ones((64, 4), dtype=np.float32).T, right.T),
        (left, np.ones((31, 64), dtype=np.float32).T),
        (left[:, :48].copy(), np.ones((32, 48), dtype=np.float32).T),
        (left.astype(np.float64), right.T),
    ):
        assert own.product(*others, 1) is None
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")
    assert own.product(left, right.T, 1) is None


@pytest.fixture(scope="module")
def of_many_types(nano_f16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano with every type of the kernels, and with one that they do not have."""
    weights, path = Weights(nano_f16), tmp_path_factory.mktemp("types") / "types.gguf"
    names = [name for name, info in weights.infos.items() if len(info.shape) == 2 and name.startswith("blk.")]
    kinds = [*CODES, "Q4_1"]
    chosen = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
    make(weights, path, Recipe("Q4_0"), {}, types={it: chosen.get(it, info.type) for it, info in weights.infos.items()})
    return path


def vectors_and_words(path: Path) -> tuple[NDArray[np.float32], str]:
    with Embedder(path, device="cpu") as embedder:
        return embedder.encode(TEXTS), embedder.description


@needs_codes
def test_vectors_are_those_of_llama_cpps_kernels(of_many_types: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, words = vectors_and_words(of_many_types)
    assert f"on {own.units()} by f2gguf's own kernels" in words
    header = read_header(of_many_types)
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert {types[name] for name in choice.choose(header)[OWN]} == set(CODES)
    assert choice.copied_bytes(header) == 0
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")
    others, words = vectors_and_words(of_many_types)
    assert "f2gguf" not in words
    assert not np.array_equal(vectors, others), "other kernels round otherwise, so two ways were compared"
    assert drift(vectors, others).max() < 1e-3


@needs_own
def test_vectors_of_an_f16_file_hardly_change(nano_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, words = vectors_and_words(nano_f16)
    assert f"matrices on {own.products()['F16']} by f2gguf's own kernels" in words
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")
    assert drift(vectors, vectors_and_words(nano_f16)[0]).max() < 1e-6


@needs_own
def test_without_amx_or_vnni_products_of_codes_are_llama_cpps(
    of_many_types: Path, nano_f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own._registered(), "units", "AVX-512")
    for path, words in ((nano_f16, "matrices on AVX-512"), (of_many_types, ", attention, norms and activations")):
        with monkeypatch.context() as patch:
            vectors, found = vectors_and_words(path)
            assert "AMX" not in found and "VNNI" not in found
            assert f"{words} by f2gguf's own kernels" in found
            assert f"{words} by f2gguf's own kernels" in choice.describe_kernels(read_header(path))
            patch.setenv("F2GGUF_OWN_KERNELS", "0")
            others, theirs = vectors_and_words(path)
            assert words not in theirs
            assert not np.array_equal(vectors, others), "two ways were compared"
            assert drift(vectors, others).max() < (1e-6 if path == nano_f16 else 1e-3)
    assert own.product(np.ones((4, 64), dtype=np.float32), np.ones((32, 64), dtype=np.float32).T, 1) is None


def together_and_alone(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    with Embedder(path, device="cpu") as embedder:
        return embedder.encode(TEXTS), np.concatenate([embedder.encode([text]) for text in TEXTS])


@needs_own
def test_a_text_has_the_same_vector_in_any_batch(nano_f16: Path) -> None:
    assert np.array_equal(*together_and_alone(nano_f16))


@needs_codes
def test_a_text_has_the_same_vector_in_any_batch_by_other_types(of_many_types: Path) -> None:
    assert drift(*together_and_alone(of_many_types)).max() < 1e-6, "one of its types is llama.cpp's"


@needs_own
def test_flash_attention_takes_texts_of_any_length_where_it_is_exact(
    nano_f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(nano_f16)
    with Model(nano_f16, device="cpu", placement=choice.choose(header)) as model:
        assert model.min_flash == 0
        for architecture in ("jina-bert-v2", "gemma2"):
            stated = {"general.architecture": architecture, "gemma2.attn_logit_softcapping": "50.0"}
            with monkeypatch.context() as patch:
                patch.setattr(model, "_stated", lambda key, stated=stated: stated.get(key, ""))
                assert model.min_flash == MIN_FLASH
        monkeypatch.setattr(model, "_stated", lambda key: "80" if key.endswith("key_length") else "")
        assert model.min_flash == MIN_FLASH
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")
    with Model(nano_f16, device="cpu", placement=choice.choose(header)) as model:
        assert model.min_flash == MIN_FLASH


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and nothing compiled yet."""
    monkeypatch.setenv("F2GGUF_CACHE", str(tmp_path))
    monkeypatch.setattr(own, "_compiled", own._compiled.__wrapped__)
    monkeypatch.setattr(own, "_registered", own._registered.__wrapped__)
    return tmp_path


def test_without_a_compiler_llama_cpps_kernels_are_used_and_inspect_says_why(
    afresh: Path, nano_f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "_could", lambda: True)
    monkeypatch.setenv("PATH", str(afresh))
    monkeypatch.delenv("CXX", raising=False)
    assert not own.works()
    assert list(afresh.iterdir()) == []
    header = read_header(nano_f16)
    assert choice.describe_kernels(header).endswith(own.NOT_COMPILED)
    assert "need a C++ compiler" in choice.summary(header, choice.choose(header))


@needs_own
def test_a_compiler_that_fails_is_not_the_last(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert own._compiled() == next(afresh.glob("own-kernels-*.so"))
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: pytest.fail("it is compiled once"))
    assert own._compiled()


@needs_own
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        {
            "AMX": ("products.h", "count(-8)", "count(-7)"),
            "VNNI": ("bytes.h", "8 * half(x)", "7 * half(x)"),
        }.get(own.units(), ("floats.h", "high, input", "low, input")),
        ("attention.h", "UNSEEN = 0xFC00", "UNSEEN = 0"),
        ("rows.h", "0.044715f", "0.44715f"),
        ("registers.h", "0.693359375f", "0.694359375f"),
    ],
)
def test_a_library_that_is_wrong_is_not_used(
    afresh: Path, monkeypatch: pytest.MonkeyPatch, name: str, right: str, wrong: str
) -> None:
    sources = shutil.copytree(own._SOURCE.parent, afresh / "cpp")
    text = (sources / name).read_text(encoding="utf-8")
    assert right in text
    (sources / name).write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(own, "_SOURCE", sources / "backend.cpp")
    code = f"from pathlib import Path\nfrom {own.__name__} import main\nimport {own.__name__} as own\n"
    monkeypatch.setattr(own, "_CODE", code + f"own._SOURCE = Path({str(own._SOURCE)!r})\nmain()")
    assert own._compiled()
    assert not own.works()


def test_where_the_cache_cannot_be_written_llama_cpps_kernels_are_used(
    afresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (afresh / "file").touch()
    monkeypatch.setenv("F2GGUF_CACHE", os.fspath(afresh / "file" / "folder"))
    assert own._compiled() is None


@needs_own
def test_a_library_that_cannot_be_loaded_is_compiled_again(afresh: Path) -> None:
    path = own._compiled()
    assert path
    path.unlink()  # another file takes its place: this process has loaded that one
    path.write_bytes(b"cut short")
    assert own._compiled() == path
    assert path.stat().st_size > 10_000
    assert [it.name for it in afresh.iterdir()] == [path.name]


@needs_own
def test_where_nothing_may_be_executed_nothing_is_compiled(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: pytest.fail("a compiler"))
    assert own._compiled() is None


@needs_own
def test_a_backend_that_takes_nothing_is_not_right(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own._compiled()
    assert path
    library = own._open(path)
    assert own._is_right(library)
    monkeypatch.setattr(own._Library, "switch", lambda self, _: self.f2gguf_switch(False, 0))
    assert not own._is_right(library)


def test_other_backends_than_these_kernels_know_use_llama_cpps(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "_api_version", lambda: 3)
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: pytest.fail("a compiler"))
    assert not own.works()


def test_a_model_on_a_gpu_compiles_nothing(nano_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine, model):
        monkeypatch.setattr(module, "runs_on_cpu", lambda *_: False)
    monkeypatch.setattr(own, "_compiled", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(own, "works", lambda: pytest.fail("tried"))
    with Embedder(nano_f16) as embedder:
        assert np.isfinite(embedder.encode("an archiver")).all()
        assert "AVX" not in embedder.encoder.engine.description


def test_another_processor_compiles_nothing(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(compiler.subprocess, "run", lambda *_, **__: pytest.fail("a compiler"))
    assert not own.works()
    assert not own.cannot_be_compiled()
