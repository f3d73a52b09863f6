"""Golden vectors and the selftest: sound files pass, and every damage is called by its name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import NANO, copy_of
from conftest import Release, Run, facts_of
from f2gguf.evals.drift import drift
from f2gguf.quantize.convert.readback import checkpoint_ids
from f2gguf.quantize.convert.reserved import PROBES, fill_in, stamp_golden
from f2gguf.quantize.convert.write import convert
from f2gguf.runtime import Embedder
from f2gguf.runtime.errors import NotGGUF, SelftestFailed, SelftestMissing
from f2gguf.runtime.gguf import golden
from f2gguf.runtime.gguf.golden import require_golden
from f2gguf.runtime.gguf.header import read_header
from others import edit_tensor

pytestmark = pytest.mark.filterwarnings("ignore::f2gguf.runtime.errors.FileWarning")  # of headers that are damaged
VARIANTS = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
Damage = Callable[[Path], None]


def overwrite(key: str, value: bytes, skip: int = 0) -> Damage:
    """Put bytes in the place of a header value, `skip` bytes behind its beginning."""

    def damage(path: Path) -> None:
        offset = read_header(path).offsets[key] + skip
        with path.open("rb+") as file:
            file.seek(offset)
            file.write(value)

    return damage


def other_prompt(path: Path) -> None:
    old = read_header(path).prompts["query"]
    fill_in(path, {"f2gguf.prompt.query": old.replace("question", "wishlist")})


def swap_tokens(one: str, other: str) -> Damage:
    """Exchange two vocabulary strings of equal length."""

    def damage(path: Path) -> None:
        data = path.read_bytes()
        packed = [struct.pack("<Q", len(text.encode())) + text.encode() for text in (one, other)]
        at = [data.index(piece) for piece in packed]
        assert len(packed[0]) == len(packed[1])
        with path.open("rb+") as file:
            for offset, piece in zip(at, reversed(packed), strict=True):
                file.seek(offset)
                file.write(piece)

    return damage


def weights(name: str, edit: Callable[[np.ndarray], None]) -> Damage:
    def damage(path: Path) -> None:
        edit_tensor(path, name, edit)

    return damage


def scale_half(values: np.ndarray) -> None:
    values[: len(values) // 2] *= 1.5


def erase(values: np.ndarray) -> None:
    values[:] = 0


def spoil(values: np.ndarray) -> None:
    values[0] = np.nan


MEAN, CLS, LAST = (struct.pack("<I", number) for number in (1, 2, 3))
DAMAGES = [
    ("nano", "Q8_0", swap_tokens("Ġthe", "Ġand"), "tokenizer", "text 1 ('how do I keep bread"),
    ("minilm", "Q8_0", swap_tokens("▁the", "▁and"), "tokenizer", "texts are split differently"),
    ("nano", "F16", overwrite("tokenizer.ggml.add_eos_token", b"\0"), "closing token", "16 of 16 texts end with"),
    (
        "nano",
        "Q8_0",
        overwrite("tokenizer.ggml.eos_token_id", struct.pack("<I", 7)),
        "closing token",
        "instead of 16383",
    ),
    ("nano", "Q8_0", other_prompt, "prompt", "The query prompt is 'Instruct: Given a wishlist"),
    ("nano", "Q4_0", overwrite("qwen3.pooling_type", MEAN), "pooling", "mean pooling gives other vectors"),
    ("nano", "F16", overwrite("qwen3.pooling_type", CLS), "pooling", "last gives those"),
    ("minilm", "Q4_K_M", overwrite("bert.pooling_type", LAST), "pooling", "last pooling gives other vectors"),
    ("minilm", "F16", overwrite("bert.pooling_type", CLS), "pooling", "mean gives those"),
    ("nano", "Q8_0", weights("output_norm.weight", scale_half), "vectors", "is the least allowed"),
    ("nano", "F16", weights("blk.1.ffn_down.weight", erase), "vectors", "The weights are damaged"),
    ("nano", "Q4_0", weights("output_norm.weight", spoil), "vectors", "no finite vector"),
    ("minilm", "Q4_0", weights("blk.3.attn_v.weight", erase), "vectors", "The weights are damaged"),
    ("minilm", "F16", weights("token_embd_norm.bias", spoil), "vectors", "16 of 16 texts are off"),
]


@pytest.fixture
def releases(nano_release: Release, minilm_release: Release) -> dict[str, Release]:
    return {"nano": nano_release, "minilm": minilm_release}


def copy_file(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    return path


def test_pooling_that_a_sound_file_states_otherwise_is_to_be_left_out(nano_release: Release) -> None:
    with Embedder(nano_release.file("Q8_0"), pooling="mean") as model:
        (fault,) = model.selftest().faults
    assert (fault.check, fault.message.partition(". ")[2]) == (
        "pooling",
        "The file states that itself: leave --pooling (pooling=) out.",
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["nano", "minilm"])
def test_sound_files_pass(releases: dict[str, Release], name: str, variant: str) -> None:
    with Embedder(releases[name].file(variant), selftest=True) as model:
        outcome = model.selftest()
    assert outcome.faults == ()
    assert outcome.n_texts == 16
    assert outcome.min_cosine == pytest.approx(outcome.maker_min_cosine, abs=1e-6)
    assert (outcome.maker_min_cosine == 1) == (variant == "F16")


@pytest.mark.parametrize(("name", "variant", "damage", "check", "words"), DAMAGES)
def test_every_damage_is_called_by_its_name(
    releases: dict[str, Release], tmp_path: Path, name: str, variant: str, damage: Damage, check: str, words: str
) -> None:
    path = copy_file(releases[name].file(variant), tmp_path)
    damage(path)
    with pytest.raises(SelftestFailed, match="failed its selftest") as raised:
        Embedder(path, selftest=True)
    assert [fault.check for fault in raised.value.faults] == [check]
    assert words in raised.value.faults[0].message


def test_two_damages_are_both_named(nano_release: Release, tmp_path: Path) -> None:
    path = copy_file(nano_release.file("Q8_0"), tmp_path)
    for damage in (
        overwrite("qwen3.pooling_type", MEAN),
        overwrite("tokenizer.ggml.add_eos_token", b"\0"),
        other_prompt,
    ):
        damage(path)
    with Embedder(path) as model:
        assert [fault.check for fault in model.selftest().faults] == ["closing token", "prompt", "pooling"]


@pytest.mark.parametrize("variant", ["Q8_0", "Q4_K_M", "Q4_0"])
def test_other_company_and_a_lower_limit_are_no_fault(releases: dict[str, Release], variant: str) -> None:
    with Embedder(releases["minilm"].file(variant), deterministic=True, max_tokens=16, selftest=True) as model:
        assert model.max_seq_length == 16


def test_header_holds_the_checkpoints_ids_and_the_files_vectors(
    releases: dict[str, Release], nano_facts: object, minilm_facts: object
) -> None:
    for name, facts in (("nano", nano_facts), ("minilm", minilm_facts)):
        header = read_header(releases[name].file("Q4_0"))
        found = require_golden(header)
        samples = [header.prompts.get(prompt, "") + text for prompt, text in PROBES]
        wanted = checkpoint_ids(facts, samples, max_tokens=header.max_tokens)  # type: ignore[arg-type]
        assert all(map(np.array_equal, found.ids, wanted))
        assert max(map(len, checkpoint_ids(facts, samples))) > 512  # type: ignore[arg-type]
        reference = require_golden(read_header(releases[name].file("F16")))
        np.testing.assert_array_equal(found.vectors, reference.vectors)
        kept = [i for i, sample in enumerate(samples) if len(sample) < 200]
        with Embedder(releases[name].file("F16")) as model:
            vectors = model.encode([samples[i] for i in kept])
        assert drift(vectors, reference.vectors[kept]).max() < 1e-6


def test_a_file_without_golden_vectors_works_and_says_so(nano_release: Release, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(nano_release.file("Q8_0").read_bytes().replace(b"f2gguf.golden.", b"f2gguf.former."))
    with Embedder(path) as model:
        assert np.isfinite(model.encode("a text")).all()
    with pytest.raises(SelftestMissing, match="Make the file again"):
        Embedder(path, selftest=True)
    process = run("f2gguf", "selftest", path)
    assert (process.returncode, process.stdout) == (1, "")
    changed, error = process.stderr.splitlines()
    assert changed.startswith(f"warning: {path}: its header is not as f2gguf wrote it")
    assert error.startswith(f"error: {path}: its header has no golden vectors")
    assert "golden vectors   none" in run("f2gguf", "inspect", path).stdout


def test_command_says_what_is_wrong(nano_release: Release, tmp_path: Path, run: Run) -> None:
    sound = run("f2gguf", "selftest", nano_release.file("Q4_K_M"), "--device", "cpu")
    assert sound.returncode == 0, sound.stderr
    assert [line.split("  ")[0] for line in sound.stdout.splitlines()][:3] == ["tokenizer", "closing token", "prompt"]
    assert "16 texts, 0.99" in sound.stdout
    path = copy_file(nano_release.file("Q4_K_M"), tmp_path)
    weights("output_norm.weight", spoil)(path)
    damaged = run("f2gguf", "selftest", path, "--json")
    outcome = json.loads(damaged.stdout)
    assert (damaged.returncode, outcome["holds"], outcome["min_cosine"]) == (1, False, None)
    assert [fault["check"] for fault in outcome["faults"]] == ["vectors"]
    assert "16 texts, cosine at least 0.99" in run("f2gguf", "inspect", nano_release.file("Q4_K_M")).stdout


def test_texts_that_overflow_the_reference_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ffn_down's inputs 4096 times larger, undone by its weights: the same function, partly too large for F16."""
    monkeypatch.setenv("F2GGUF_OWN_KERNELS", "0")  # they do not round inputs to F16
    from safetensors.torch import load_file, save_file

    folder = copy_of(NANO, tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] *= 2.0**12 if "up_proj" in name else 2.0**-12 if "down_proj" in name else 1
    save_file(tensors, folder / "model.safetensors")
    path = tmp_path / "large.gguf"
    convert(facts_of(folder), path)
    n_without = stamp_golden(path)
    assert 0 < n_without < 16
    with Embedder(path, selftest=True) as model:
        assert require_golden(model.header).is_compared.sum() == 16 - n_without


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (overwrite(golden.KEY_VECTORS, struct.pack("<f", np.nan), 12), "vectors holds a number that is not finite"),
        (overwrite(golden.KEY_COSINES, struct.pack("<f", np.inf), 12), "cosines holds a number that is not finite"),
        (overwrite(golden.KEY_N_TOKENS, struct.pack("<i", 5000), 12), r"token_ids has \d+ elements instead of \d+"),
        (overwrite(golden.KEY_N_TOKENS, struct.pack("<i", -1), 12), "holds a negative number"),
        (overwrite(golden.KEY_COSINES, struct.pack("<I", 5)), "cosines is no array of float"),
        (overwrite(golden.KEY_TOKEN_IDS, struct.pack("<Q", 1 << 60), 4), "truncated inside its header"),
    ],
)
def test_damaged_golden_values_are_refused(nano_f16: Path, tmp_path: Path, damage: Damage, words: str) -> None:
    path = copy_file(nano_f16, tmp_path)
    damage(path)
    with pytest.raises(NotGGUF, match=words):
        read_header(path)


def test_stamp_keeps_an_arrays_length_and_type(nano_f16: Path, tmp_path: Path) -> None:
    path = copy_file(nano_f16, tmp_path)
    fill_in(path, {golden.KEY_COSINES: [0.5] * 16})
    assert read_header(path).values[golden.KEY_COSINES] == (0.5,) * 16
    assert path.stat().st_size == nano_f16.stat().st_size
    for key, numbers in ((golden.KEY_COSINES, [0.5] * 15), (golden.KEY_N_TOKENS, [0.5] * 16)):
        with pytest.raises(ValueError, match="does not fit"):
            fill_in(path, {key: numbers})
