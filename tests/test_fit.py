"""`f2gguf fit`: what files take and give, before they are made."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import NANO
from conftest import Release, Run
from f2gguf import Fits, fit
from f2gguf.quantize.fit.goal import choose, parse_goal
from f2gguf.quantize.fit.picture import draw, require_picture
from f2gguf.quantize.fit.table import lines
from f2gguf.quantize.repair.recipe import Recipe, make
from f2gguf.quantize.repair.tensors import Weights
from f2gguf.quantize.source.facts import NOTHING, Facts, Stated
from f2gguf.runtime.errors import UnknownName, WrongUsage
from f2gguf.runtime.fit.devices import Work, devices
from f2gguf.runtime.fit.memory import model_memory
from f2gguf.runtime.gguf.describe import is_reference
from f2gguf.runtime.gguf.header import read_header
from f2gguf.runtime.llama.kernels import own
from hub import Hub, only_error, run_command, serving

CHECK_FIT = Path(__file__).resolve().parent.parent / "scripts" / "check-fit"
GOAL = "drift<1%,memory<3GB"
RUN = """
import sys
from f2gguf import Embedder
with Embedder(sys.argv[1]) as model:
    model.encode_query(["how do I compress a folder?"])
    model.encode_document([f"{i} " + "tar is an archiving program " * n for i, n in enumerate((2, 9, 30, 100))])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.fixture(scope="module")
def nano_fits() -> Fits:
    return fit("f2llm-nano", goal=GOAL, sample=False)


def test_planned_sizes_are_those_of_the_files(nano_fits: Fits, nano_f16: Path, tmp_path: Path) -> None:
    """Of a variant's header, only the length of its recipe is not known before."""
    sizes = {file.variant: file.size_bytes for file in nano_fits.files}
    assert sizes["F16"] == nano_f16.stat().st_size
    make(Weights(nano_f16), tmp_path / "Q4_0.gguf", Recipe("Q4_0"), {})
    assert sizes["Q4_0"] == pytest.approx((tmp_path / "Q4_0.gguf").stat().st_size, abs=1000)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_is_what_a_process_takes(nano_f16: Path) -> None:
    said = fit(nano_f16, sample=False).files[0].memory.total_bytes
    done = subprocess.run([sys.executable, "-c", RUN, str(nano_f16)], capture_output=True, text=True, check=True)
    assert said == pytest.approx(1024 * int(done.stdout), rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("arguments", "figures"),
    [
        (("80M", "--no-speed"), ["memory"]),
        (("4B", "--accounting"), ["weights", "keys and values", "passes, of what is reserved"]),
    ],
)
def test_memory_of_shapes_is_what_is_said(arguments: Sequence[str], figures: list[str]) -> None:
    """80M beside the peak of a process, and 4B beside what llama.cpp says that it takes."""
    command = [sys.executable, CHECK_FIT, *arguments, "--variants", "Q8_0"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ratios = {cells[1]: float(cells[-1]) for cells in (re.split(r"  +", line) for line in table.splitlines()[1:])}
    assert list(ratios) == figures
    assert list(ratios.values()) == pytest.approx([1] * len(ratios), abs=0.05)


def test_memory_grows_with_texts_and_requests(nano_f16: Path) -> None:
    short, long, many = (
        fit(nano_f16, sample=False, max_tokens=n, parallel=parallel).files[0].memory
        for n, parallel in ((256, 1), (2048, 1), (2048, 4))
    )
    assert short.kv_bytes < long.kv_bytes < many.kv_bytes
    assert short.compute_bytes < long.compute_bytes < many.compute_bytes


@pytest.mark.skipif(not own.works(), reason="needs a processor with AVX-512, and a C++ compiler")
def test_f2ggufs_kernels_take_memory_and_no_vram(minilm_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = []
    for wanted in ("1", "0"):
        monkeypatch.setenv("F2GGUF_OWN_KERNELS", wanted)
        memories.append(model_memory(read_header(minilm_f16), pooling="mean", max_tokens=512))
    ours, theirs = memories
    assert ours.documents.used_bytes == theirs.documents.used_bytes + 2 * 512 * 512
    assert ours.on_gpu == theirs.on_gpu


def test_the_table_of_bert_takes_no_vram(minilm_f16: Path) -> None:
    header = read_header(minilm_f16)
    table_bytes = next(tensor.size_bytes for tensor in header.tensors if tensor.name == "token_embd.weight")
    memory = fit(minilm_f16, sample=False).files[0].memory
    on_gpu = model_memory(header, pooling="mean").on_gpu
    assert memory.vram_bytes + table_bytes == pytest.approx(
        sum(tensor.size_bytes for tensor in header.tensors) + on_gpu.kv_bytes + on_gpu.compute_bytes
    )


def test_a_speed_is_sampled_and_a_corpus_follows(nano_f16: Path) -> None:
    file = fit(nano_f16, n_texts=2e6, n_tokens=64, price=0.5).files[0]
    assert file.speed and file.corpus and file.corpus.cost
    assert file.corpus.hours == pytest.approx(2e6 * 64 / file.speed.tokens_per_s / 3600)
    assert file.corpus.cost == pytest.approx(0.5 * file.corpus.hours / 2)


def test_quality_is_measured_or_says_that_it_is_a_range(nano_fits: Fits, tiny_fits: Fits) -> None:
    assert [str(file.quality) for file in nano_fits.files] == ["reference", "0.002%", "0.022%", "0.025%"]
    assert str(tiny_fits.files[1].quality) == "not measured; 2 others: 0.002% to 0.041%"


@pytest.fixture(scope="module")
def tiny_fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """A checkpoint whose weights are elsewhere: its tensors follow from config.json."""
    folder = tmp_path_factory.mktemp("settings") / "tiny"
    folder.mkdir()
    for path in NANO.rglob("*"):
        if path.is_file() and path.suffix == ".json":
            (folder / path.relative_to(NANO)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(NANO)).write_bytes(path.read_bytes())
    return fit(folder, sample=False, device="H100 SXM", price=2.0)


def test_a_checkpoint_without_weights_is_planned_alike(nano_fits: Fits, tiny_fits: Fits) -> None:
    ours, theirs = ({file.variant: file.memory.vram_bytes for file in fits.files} for fits in (nano_fits, tiny_fits))
    assert ours == theirs


def test_a_device_is_estimated_and_costs(tiny_fits: Fits) -> None:
    f16, q8_0, *_ = tiny_fits.files
    assert f16.corpus is None, "16-bit files were not measured on a GPU"
    assert q8_0.corpus and q8_0.corpus.cost and q8_0.fits
    document = tiny_fits.as_dict()
    json.dumps(document, allow_nan=False)
    int8 = next(row for row in document["files"][1]["vectors"] if (row["width"], row["precision"]) == (256, "int8"))
    assert int8["gb_of_million"] == 0.256
    assert int8["cost_of_gb"] == pytest.approx(q8_0.corpus.cost / 0.256)


def test_every_device_states_its_source() -> None:
    assert len(devices()) > 30
    for device in devices().values():
        assert device.source.startswith("https://")
        assert device.bandwidth_gb_s > 0
        assert device.memory_gb is None or device.memory_gb > 0
        assert (device.price is None) == (device.price_source is None)


def test_a_device_costs_what_its_price_says_unless_the_user_knows_another(nano_f16: Path) -> None:
    listed = fit(nano_f16, device="RTX 4090")
    assert listed.price == devices()["RTX 4090"].price
    assert listed.price
    assert any("US dollars an hour (RunPod" in line for line in lines(listed))
    assert fit(nano_f16, device="RTX 4090", price=9.0).price == 9.0
    assert fit(nano_f16, device="M3 Pro").price is None


def test_a_processor_has_the_memory_of_its_machine(nano_f16: Path) -> None:
    found = fit(nano_f16, device="EPYC 9654")
    assert found.files[0].fits is None
    assert found.files[0].speed
    assert found.files[0].speed.tokens_per_s is None
    assert any("the memory of its machine" in line for line in lines(found))


def test_the_estimate_gives_what_was_measured_on_an_h200() -> None:
    """Tokens/s of CHANGELOG.md, "On a GPU", by the layers and the products of each shape."""
    shapes = [(28, 440_401_920, 92_900), (28, 440_401_920, 99_700), (8, 31_457_280, 363_000)]
    for n_layers, products, measured in shapes:
        estimate = devices()["H200"].speed(Work(n_layers, products, 1)).tokens_per_s
        assert estimate == pytest.approx(measured, rel=0.1)


def test_another_checkpoint_of_a_known_name_is_not_what_was_measured(nano_facts: Facts, tmp_path: Path) -> None:
    for source in nano_facts.checkpoint.folder.rglob("*"):
        if source.is_file():
            path = tmp_path / "all-MiniLM-L6-v2" / source.relative_to(nano_facts.checkpoint.folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source)
    renamed = Stated(name="all-MiniLM-L6-v2")
    for model, stated in ((tmp_path / "all-MiniLM-L6-v2", NOTHING), ("f2llm-nano", renamed)):
        quality = fit(model, variants="Q4_0", sample=False, stated=stated).files[1].quality
        assert quality
        assert not quality.is_measured


def test_quantised_files_are_no_reference_whatever_type_they_state(nano_f16: Path) -> None:
    header = read_header(nano_f16)
    assert is_reference(header)
    for kind in ("Q8_0", "IQ4_NL"):
        first, *others = header.tensors
        assert not is_reference(replace(header, tensors=(replace(first, type=kind), *others)))


def test_a_folder_of_files_is_a_release(tiny_variants: Release) -> None:
    names = [file.variant for file in fit(tiny_variants.folder, sample=False).files]
    assert names == ["F16", "Q8_0", "Q4_K_M", "Q4_0"]


def test_texts_are_cut_at_what_the_model_takes(tiny_variants: Release) -> None:
    path = tiny_variants.file("Q8_0")
    longest = read_header(path).max_tokens
    most, more = (fit(path, n_tokens=n, device="RTX 4090").files[0].corpus for n in (longest, 1_000_000))
    assert most
    assert most == more


def test_a_goal_picks_the_file_of_least_drift(nano_fits: Fits) -> None:
    assert nano_fits.best and nano_fits.best.variant == "F16"


def test_the_closest_file_misses_its_worst_wish_by_the_least() -> None:
    figures = [{"drift": 0.03, "memory": 1e9}, {"drift": 0.001, "memory": 5e9}, {"drift": None, "memory": 1e6}]
    assert choose(parse_goal("drift<1%,memory<2GB"), figures) == (1, {"memory<2GB": 5e9})
    assert choose(parse_goal("drift<4%,memory<2GB"), figures) == (0, {})
    assert choose(parse_goal("memory<1MB"), figures) == (2, {"memory<1MB": 1e6})
    assert choose(parse_goal("memory<=1MB"), figures) == (2, {})


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ("drift", "is no wish"),
        ("", "is no wish"),
        ("drift<1%,", "is no wish"),
        ("drift>1%", "say drift<NUMBER"),
        ("drift<0%", "a number above 0"),
        ("drift<1GB", "Units: %"),
        ("drift<1", "Units: %"),
        ("memory<1.2.3GB", "is no memory"),
        ("speed<100", "say speed>NUMBER"),
        ("memory<1GB,memory<2GB", "two wishes about memory"),
        ("latency<50ms", "--no-sample"),
        ("cost<3", "--price"),
    ],
)
def test_a_goal_that_is_none_is_refused(nano_f16: Path, goal: str, words: str) -> None:
    with pytest.raises(WrongUsage) as caught:
        fit(nano_f16, sample=False, goal=goal)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_texts": 0}, "--texts 0: pass a number above 0"),
        ({"n_texts": float("nan")}, "--texts nan"),
        ({"n_tokens": -1}, "--tokens -1"),
        ({"price": float("inf")}, "--price inf"),
        ({"parallel": 0}, "--parallel 0"),
        ({"variants": " , "}, "--variants: names none"),
        ({"max_tokens": 1}, "max_tokens is 1"),
    ],
)
def test_nonsense_is_refused(nano_f16: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(WrongUsage) as caught:
        fit(nano_f16, sample=False, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_unknown_names_suggest_the_nearest(nano_f16: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'RTX 4090'"):
        fit(nano_f16, device="rtx4090")
    with pytest.raises(UnknownName, match="wish of --goal"):
        fit(nano_f16, goal="drft<1%")


def test_files_that_are_split_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/split", {f"x-Q8_0-0000{i}-of-00002.gguf": b"GGUF" for i in (1, 2)})
    with serving(hub):
        done = run_command("f2gguf", "fit", "org/split", hub=hub, home=tmp_path)
    assert "its files are split (x-Q8_0-00001-of-00002.gguf)" in only_error(done, exit_code=2)


@pytest.fixture
def hub(tiny_variants: Release) -> Hub:
    hub = Hub()
    hub.add("org/tiny", {path.name: path.read_bytes() for path in tiny_variants.folder.iterdir()})
    return hub


def test_a_release_on_the_hub_is_not_downloaded(hub: Hub, tiny_variants: Release, tmp_path: Path) -> None:
    with serving(hub):
        done = run_command("f2gguf", "fit", "org/tiny", "--no-sample", "--json", hub=hub, home=tmp_path)
    files = {file["variant"]: file for file in json.loads(done.stdout)["files"]}
    assert files["Q8_0"]["size_bytes"] == tiny_variants.file("Q8_0").stat().st_size
    assert files["Q8_0"]["quality"]["is_measured"]


def test_a_checkpoint_on_the_hub_is_planned_from_its_small_files(nano_fits: Fits, tmp_path: Path) -> None:
    hub = Hub()
    files = {path.relative_to(NANO).as_posix(): path.read_bytes() for path in NANO.rglob("*.json")}
    hub.add("org/f2llm-nano", files | {"model.safetensors": b"of 80 GB"})
    with serving(hub):
        done = run_command("f2gguf", "fit", "org/f2llm-nano", "--no-sample", "--json", hub=hub, home=tmp_path)
    vram = [file["memory"]["vram_bytes"] for file in json.loads(done.stdout)["files"]]
    assert vram == [file.memory.vram_bytes for file in nano_fits.files]
    assert not [request for request in hub.requests if "safetensors" in request.path]


def test_a_gated_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/tiny"].is_gated = True
    with serving(hub):
        done = run_command("f2gguf", "fit", "org/tiny", hub=hub, home=tmp_path)
    assert "is gated" in only_error(done)


def test_a_picture_is_drawn(tiny_fits: Fits, tmp_path: Path) -> None:
    draw(tiny_fits, tmp_path / "fit.svg")
    assert {"Q8_0", "F16"} <= set(re.findall(r">(Q8_0|F16)(?=[,<])", (tmp_path / "fit.svg").read_text()))
    with pytest.raises(UnknownName, match="picture format"):
        require_picture(tmp_path / "fit.gif", force=False)


def test_a_goal_that_no_file_grants_is_exit_code_3(run: Run, nano_f16: Path) -> None:
    done = run("f2gguf", "fit", nano_f16, "--no-sample", "--goal", "memory<20MB")
    assert done.returncode == 3
    closest = r"The closest is f2llm-nano F16, which fails memory<20MB \([\d.]+ MB\)"
    assert re.search(closest, done.stderr.splitlines()[-1])


def test_quantize_all_makes_what_fits(run: Run) -> None:
    done = run("quantize", "all", "f2llm-nano", "--fit", "1GB", "--dry-run")
    assert [variant in done.stdout for variant in ("F16", "Q8_0", "Q4_K_M")] == [True, True, False]
    done = run("quantize", "all", "f2llm-nano", "--fit", "20MB", "--dry-run")
    assert done.returncode == 3
    assert "f2llm-nano: no variant runs in 20.0 MB (--fit)" in done.stderr
