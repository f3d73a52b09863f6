from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import forking
import pytest
from checkpoints import MINILM, NANO, write_tiny
from endpoint import Api, serving
from f2gguf.quantize.convert.write import convert
from f2gguf.quantize.source.facts import Facts, settle_facts
from f2gguf.quantize.source.lock import Entry, read_lock
from f2gguf.runtime import Embedder
from pushing import Site, open_site

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = "from f2gguf.quantize.cli import {name}; {name}(prog_name='{name}')"


@dataclass(frozen=True)
class Release:
    """What `quantize all` left behind."""

    folder: Path
    process: subprocess.CompletedProcess[str]

    def file(self, variant: str) -> Path:
        return self.folder / f"{self.folder.name}-{variant}.gguf"


def run_command(
    *arguments: str | Path, stdin: str | bytes = "", timeout_s: float = 600, is_real: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `quantize ...` or `f2gguf ...` in a process of its own (`forking`)."""
    name, *rest = arguments
    return forking.run(COMMAND.format(name=name), *rest, stdin=stdin, timeout_s=timeout_s, is_real=is_real)


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
    return settle_facts(read_lock().entry("f2llm-nano"), NANO)


@pytest.fixture(scope="session")
def minilm_facts() -> Facts:
    return settle_facts(read_lock().entry("all-MiniLM-L6-v2"), MINILM)


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


def facts_of(folder: Path, **stated: object) -> Facts:
    """The settled facts of a folder that no lock knows."""
    return settle_facts(Entry(name=folder.name, **stated), folder)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def nano_release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    out = tmp_path_factory.mktemp("release")
    process = run_command("quantize", "all", "f2llm-nano", "--out", out)
    return Release(out / "f2llm-nano", process)


@pytest.fixture(scope="session")
def minilm_release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    out = tmp_path_factory.mktemp("release")
    process = run_command("quantize", "all", "all-MiniLM-L6-v2", "--out", out)
    return Release(out / "all-MiniLM-L6-v2", process)


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The quickest release there is: a tiny model's F16 file and its plain Q8_0."""
    folder = tmp_path_factory.mktemp("release")
    arguments = ("--stock", "--variants", "Q8_0", "--out", folder / "dist")
    process = run_command("quantize", "all", write_tiny(folder / "tiny"), *arguments)
    return Release(folder / "dist" / "tiny", process)


@pytest.fixture
def site(tiny_release: Release, tmp_path: Path) -> Iterator[Site]:
    """The quickest release there is, and a Hub to push it to."""
    with open_site(tiny_release.folder, tmp_path) as site:
        yield site
