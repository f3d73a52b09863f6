from __future__ import annotations

import os

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Workers of pytest-xdist share out the processors, and what they start keeps to its share: before numpy counts them
    processors = sorted(os.sched_getaffinity(0))
    mine = processors[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, mine or processors)

import pickle
import random
import secrets
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forking
import pytest
from checkpoints import MINILM, NANO, write_tiny, write_tiny_bert
from endpoint import Api, serving
from f2gguf.quantize.convert.reserved import stamp_golden
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.report.report import read_report
from f2gguf.quantize.source.facts import NOTHING, Facts, Stated, read_facts
from f2gguf.quantize.source.lock import Entry, read_lock
from f2gguf.runtime import Embedder
from filelock import FileLock
from hypothesis import settings
from pushing import Site, open_site

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = "from f2gguf.quantize.cli import {name}; {name}(prog_name='{name}')"


def without(*modules: str) -> str:
    """As where they are not installed."""
    return f"""
import importlib.util
def find_spec(name, *rest, find=importlib.util.find_spec):
    return None if name in {modules} else find(name, *rest)
importlib.util.find_spec = find_spec
"""


NO_TRANSFORMERS = without("torch", "transformers")
NO_TRAINING = "import f2gguf.quantize.repair.codes.tune as tune; tune.MAX_MINUTES = 0\n"  # as it takes minutes
NO_SAMPLES = "import f2gguf.quantize.outlook as outlook; outlook._WORTH_SAMPLING = 1e9\n"  # test_outlook.py takes them
# Few of the calibration texts, and none made of them: many times as quick
FEW_TEXTS = """
import f2gguf.quantize.repair.calibration as calibration
calibration.N_SPLICED, calibration.N_PRODUCTS = 0, 5e10
"""
MORE_TEXTS = FEW_TEXTS + "calibration.N_PRODUCTS = 2e11\n"  # MiniLM's Q4_0 drifts 1.05% with half as many
# Gate 1 is passed on all texts, and variants are judged on a quarter, which nano's are far under the bound on
FEW_VERDICTS = """
import f2gguf.quantize.pipeline as pipeline
def claimed_texts(*arguments, claimed=pipeline.claimed_texts):
    return pipeline.quick_texts(claimed(*arguments))
pipeline.claimed_texts = claimed_texts
"""
# Of the texts in other languages, MiniLM converts and runs a quarter: it is judged on none
MOSTLY_ENGLISH = """
import f2gguf.quantize.pipeline as pipeline
def load_texts(load=pipeline.load_texts):
    claimed = pipeline.claimed_texts(load(), ["en"])
    others = [text for text in load() if text not in claimed][::4]
    return tuple(text for text in load() if text in claimed or text in others)
pipeline.load_texts = load_texts
"""
NANO_QUICK = NO_TRANSFORMERS + NO_SAMPLES + FEW_TEXTS + FEW_VERDICTS
# Where measuring is not the subject
FEW_EVALUATED = """
import f2gguf.evals.drift as drift
drift.N_RESAMPLES = 999
import f2gguf.evals.texts as texts
def load_texts(*path, load=texts.load_texts):
    return load(*path)[:64] if path else tuple(text for text in load() if text.id[:2] in ("en", "py"))
texts.load_texts = load_texts
"""
QUICK_DRAWN = NO_TRANSFORMERS + FEW_EVALUATED  # gate 1 is left to the releases of nano and MiniLM
QUICK = QUICK_DRAWN + without("matplotlib")  # the picture takes as long as a variant

# What is slow for its fixtures or as a file; single tests carry the marker themselves
SLOW_FIXTURES = {"nano_release", "minilm_release", "studied", "nano_study", "outcome", "full_precision"}
SLOW_FILES = {
    "test_exactness",
    "test_full_precision",
    "test_hub_standin",
    "test_mteb",
    "test_push_faults",
    "test_serve_schema",
    "test_stages",
}


@dataclass(frozen=True)
class Release:
    """What `quantize all` left behind."""

    folder: Path
    process: subprocess.CompletedProcess[str]

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.folder.name}-{variant}.gguf"


def run_command(*arguments: str | Path, prelude: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `quantize ...` or `f2gguf ...` in a process of its own, after a `prelude`; options go to `forking`."""
    name, *rest = arguments
    return forking.run(prelude + COMMAND.format(name=name), *rest, **options)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """One seed for hypothesis and for `rng`, so that any run can be repeated."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(secrets.randbits(32))
    settings.register_profile("f2gguf", deadline=None, derandomize=False, print_blob=True)
    settings.load_profile("f2gguf")


def pytest_sessionstart(session: pytest.Session) -> None:
    """The seed is said at once: a run that is killed says nothing later."""
    if terminal := session.config.pluginmanager.getplugin("terminalreporter"):
        terminal.write_line(f"To repeat this run: --hypothesis-seed={session.config.option.hypothesis_seed}")
        terminal.flush()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is slow."""
    if item.path.stem in SLOW_FILES or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each of two workers begin with another release, and none wait for the other's: what needs both comes late."""
    first: dict[str, list[pytest.Item]] = {"minilm_release": [], "nano_release": [], "": []}
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        first[next((name for name in first if name in fixtures), "")].append(item)
    minilm, nano, others = first.values()
    minilm.sort(key=lambda item: "nano_release" in item.fixturenames)  # type: ignore[attr-defined]
    n_before = max(0, len(items) // 2 - len(nano))  # pytest-xdist gives each worker a half of the list
    items[:] = [*nano, *others[:n_before], *minilm, *others[n_before:]]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of the session's seed, others for each test."""
    return random.Random(f"{request.config.option.hypothesis_seed} {request.node.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What f2gguf remembers between runs, for this session alone."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["F2GGUF_CACHE"] = str(path)
    return path


@pytest.fixture
def run() -> Run:
    return run_command


@pytest.fixture(scope="session")
def nano_facts() -> Facts:
    return read_facts(read_lock().entry("f2llm-nano"), NANO)


@pytest.fixture(scope="session")
def minilm_facts() -> Facts:
    return read_facts(read_lock().entry("all-MiniLM-L6-v2"), MINILM)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def nano_f16(nano_facts: Facts, made: Path) -> Path:
    path = made / "nano-F16.gguf"
    convert(nano_facts, path)
    return path


@pytest.fixture(scope="session")
def minilm_f16(minilm_facts: Facts, made: Path) -> Path:
    path = made / "minilm-F16.gguf"
    convert(minilm_facts, path)
    return path


@pytest.fixture(scope="session")
def small_bert_f16(made: Path) -> Path:
    """A BERT with MiniLM's layers, and like there, blocks of 256 fit the rows of ffn_down alone."""
    path = made / "small-bert-F16.gguf"
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 256}
    convert(facts_of(write_tiny_bert(made / "small-bert", **sizes)), path)
    return path


@pytest.fixture(scope="session")
def own(made: Path) -> Path:
    """A tiny model's F16 file with golden vectors, as f2gguf makes it."""
    path = made / "own-tiny.gguf"
    convert(facts_of(write_tiny(made / "own-tiny")), path)
    stamp_golden(path)
    return path


@pytest.fixture(scope="session")
def nano(nano_f16: Path) -> Iterator[Embedder]:
    with Embedder(nano_f16) as model:
        yield model


@pytest.fixture(scope="session")
def minilm(minilm_f16: Path) -> Iterator[Embedder]:
    with Embedder(minilm_f16) as model:
        yield model


@pytest.fixture
def api(nano: Embedder) -> Iterator[Api]:
    """An endpoint that embeds with nano's F16 file, texts as they are."""
    with serving(nano.encode) as api:
        yield api


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def contents(folder: Path) -> dict[str, object]:
    """What a release holds: its .gguf files, and its report without what is measured of the machine each time."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
    is_whole = (folder / "SHA256SUMS").exists()
    return files | (
        {"drift.json": replace(read_report(folder), model_memory=None, performance=None)} if is_whole else {}
    )


def facts_of(folder: Path, stated: Stated = NOTHING, **locked: object) -> Facts:
    """The facts of a folder: what the user states, and what a lock does."""
    return read_facts(Entry(name=folder.name, **locked), folder, stated=stated)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def release_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Release]:
    """Gives the release of a model: made once, by the first process of pytest-xdist that asks for it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "releases"

    def release(model: str | Path, *arguments: str, **options: Any) -> Release:
        name = Path(model).name
        folder = root / "-".join([name, *arguments])
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (made := folder / "process").exists():
                process = run_command("quantize", "all", model, *arguments, "--out", folder / "dist", **options)
                made.write_bytes(pickle.dumps(process))
        return Release(folder / "dist" / name, pickle.loads(made.read_bytes()))

    return release


@pytest.fixture(scope="session")
def nano_release(release_of: Callable[..., Release]) -> Release:
    """Gate 1 compares it with the stored vectors, and MiniLM's with what transformers computes."""
    return release_of("f2llm-nano", is_real=True, prelude=NANO_QUICK)


@pytest.fixture(scope="session")
def minilm_release(release_of: Callable[..., Release]) -> Release:
    prelude = NO_TRAINING + NO_SAMPLES + MORE_TEXTS + MOSTLY_ENGLISH
    return release_of("all-MiniLM-L6-v2", is_real=True, timeout_s=1800, prelude=prelude)


@pytest.fixture(scope="session")
def tiny_release(release_of: Callable[..., Release], made: Path) -> Release:
    """The quickest release there is: a tiny model's F16 file and its plain Q8_0."""
    return release_of(write_tiny(made / "tiny"), "--stock", "--variants", "Q8_0", prelude=QUICK_DRAWN)


@pytest.fixture(scope="session")
def tiny_variants(release_of: Callable[..., Release], made: Path) -> Release:
    """Measured files of a tiny model, of which Q4_0 is over the bound."""
    release = release_of(write_tiny(made / "tiny"), "--stock", prelude=QUICK)
    assert (release.process.returncode, release.process.stderr.splitlines()[-1]) == (
        3,
        "error: over the bound of 2%: tiny Q4_0. Every file was written, and says so.",
    )
    return release


@pytest.fixture(scope="session")
def tiny_repaired(release_of: Callable[..., Release], made: Path) -> Release:
    """A tiny model's F16 file and its Q4_0, whose codes compensate for each other's errors."""
    return release_of(write_tiny(made / "tiny"), "--variants", "Q4_0", prelude=QUICK)


@pytest.fixture
def site(tiny_release: Release, tmp_path: Path) -> Iterator[Site]:
    """The quickest release there is, and a Hub to push it to."""
    with open_site(tiny_release.folder, tmp_path) as site:
        yield site
