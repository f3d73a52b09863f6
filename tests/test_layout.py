"""The package mapping, the direction of imports, the wheel."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import f2gguf
import pytest
from conftest import Release, Run
from f2gguf.runtime.gguf.reader import TENSOR_TYPES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quantize", "evals", "runtime")
PUBLIC = ROOT / "runtime" / "public"
INTEGRATIONS = ROOT / "runtime" / "integrations"  # f2gguf.integrations, which only users import
ALLOWED = {"runtime": {"runtime"}, "evals": {"evals", "runtime"}, "quantize": {"quantize", "evals", "runtime"}}
HEAVY = ("numpy", "llama_cpp", "gguf", "scipy", "tokenizers", "huggingface_hub", "torch", "transformers", "safetensors")
HEAVY += ("fastapi", "uvicorn", "pydantic", "prometheus_client")


def _dotted(path: Path) -> str:
    return (
        path.relative_to(INTEGRATIONS.parent if INTEGRATIONS in (path, *path.parents) else ROOT)
        .as_posix()
        .replace("/", ".")
    )


MODULES = sorted(
    "f2gguf." + _dotted(path.with_suffix(""))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
)
IMPORT_ALL = f"import importlib\nfor name in {MODULES}:\n    importlib.import_module(name)"


def test_mapping_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} - {PUBLIC}
    assert set(settings["packages"]) == {"f2gguf"} | {f"f2gguf.{_dotted(path)}" for path in found}
    mapped = {"f2gguf": "runtime/public", "f2gguf.integrations": "runtime/integrations"}
    assert settings["package-dir"] == mapped | {f"f2gguf.{folder}": folder for folder in FOLDERS}
    assert not [path for path in found if not (path / "__init__.py").exists()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in _sources(folder):
        ours = {name.split(".")[1] for name in _imports(path)}
        allowed = ALLOWED[folder] | ({"integrations"} if INTEGRATIONS in path.parents else set())
        assert ours <= allowed, f"{path} imports {ours - allowed}"


def test_rooms_and_files_import_in_no_circle() -> None:
    """A room (a sub-package) counts as one; a file that stands in no room as itself."""
    graph: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for path in _sources(folder):
            here = _room(f"f2gguf.{_dotted(path.with_suffix(''))}")
            graph.setdefault(here, set()).update(_room(name) for name in _imports(path))
            graph[here] -= {here, *FOLDERS}  # the name of a folder is its __init__, which loads lazily
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_show_at_most_a_dozen_files(folder: str) -> None:
    for path in {path.parent for path in _sources(folder)}:
        names = [file.name for file in path.glob("*.py") if file.name != "__init__.py"]
        assert len(names) <= 12, f"{path.relative_to(ROOT)} shows {len(names)} files: is there a room in it?"


def test_public_names_are_one_list() -> None:
    """What type checkers are shown is what is there, and nothing public is left out of it."""
    block = next(node for node in ast.parse((PUBLIC / "__init__.py").read_text()).body if isinstance(node, ast.If))
    shown = {alias.asname or alias.name for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert shown == {*f2gguf.PUBLIC, "*"}
    for name in dir(f2gguf):
        assert getattr(f2gguf, name).__name__ == name
    assert {"Embedder", "quantize_model", "judge", "NoVector", "DriftWarning"} <= set(dir(f2gguf))
    with pytest.raises(AttributeError, match="no attribute 'Embeder'"):
        _ = f2gguf.Embeder


def test_importing_f2gguf_loads_nothing_heavy() -> None:
    code = f"import f2gguf, sys; print([m for m in {(*HEAVY, 'click')!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def _sources(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if PUBLIC not in path.parents]


def _imports(path: Path) -> set[str]:
    """Every module of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if alias.name.islower()}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("f2gguf.")}


def _room(module: str) -> str:
    """'f2gguf.quantize.convert.write' -> 'quantize.convert', 'f2gguf.quantize.pipeline' -> 'quantize.pipeline'."""
    return ".".join(module.split(".")[1:3])


def test_commands_load_nothing_heavy_for_their_help() -> None:
    code = (
        "import sys\nfrom f2gguf.quantize.cli import f2gguf, quantize\n"
        "f2gguf(['--help'], standalone_mode=False)\nquantize(['--help'], standalone_mode=False)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.splitlines()[-1] == "[]"


def test_embed_imports_only_what_it_uses(nano_f16: Path) -> None:
    """Each of these takes 20 ms or more of a command that should take a third of a second."""
    unused = (
        "gguf",
        "yaml",
        "scipy",
        "pydantic",
        "safetensors",
        "huggingface_hub",
        "httpx",
        "torch",
        "fastapi",
        "tqdm",
        "llama_cpp.llama",
        "jinja2",
        "f2gguf.quantize.cli.all",
        "f2gguf.runtime.server",
    )
    code = (
        "import sys\nfrom f2gguf.quantize.cli import f2gguf\n"
        f"f2gguf(['embed', '-m', {str(nano_f16)!r}, 'a text'], standalone_mode=False)\n"
        f"print([m for m in {unused!r} if m in sys.modules])"
    )
    embedded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert embedded.splitlines()[-1] == "[]"


def test_llama_cpp_is_whole_where_its_classes_are_asked_for() -> None:
    code = (
        "import f2gguf.runtime.llama, llama_cpp\nprint(hasattr(llama_cpp, 'no_such_name'))\n"
        "from llama_cpp import Llama, llama_grammar\nprint(Llama is llama_cpp.llama.Llama, type(llama_cpp).__name__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True", "module"]


def test_llama_cpps_log_stays_ours_when_its_classes_are_imported(nano_f16: Path) -> None:
    code = (
        "from pathlib import Path\nfrom f2gguf.runtime.llama.library import log_to\n"
        "from f2gguf.runtime.llama.model import Model\nfrom llama_cpp import Llama\nlines = []\n"
        "with log_to(lambda _, line: lines.append(line)):\n"
        f"    Model(Path({str(nano_f16)!r}), device='cpu', vocab_only=True).close()\nprint(len(lines) > 10)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (printed.stdout, printed.stderr) == ("True\n", "")


def test_tensor_types_are_those_of_the_package_gguf() -> None:
    from gguf import GGML_QUANT_SIZES

    assert {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} == TENSOR_TYPES


def test_every_script_imports_what_is_there() -> None:
    """Nothing of a script runs: its name is not __main__."""
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.read_bytes().startswith(b"#!/usr/bin/env python3")]
    assert len(scripts) > 5
    for path in scripts:
        runpy.run_path(str(path), run_name="imported")


def test_f2gguf_quantize_is_the_same_group(run: Run) -> None:
    assert (
        run("f2gguf", "quantize", "--help").stdout.split("Commands:")[1]
        == run("quantize", "--help").stdout.split("Commands:")[1]
    )


def test_wheel_works_in_a_clean_environment(tmp_path: Path, nano_release: Release) -> None:
    """Built, installed without the checkout on the path, and used: help, lock, one embedding."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.split("/")[0] in FOLDERS], "bare names must not reach site-packages"
    assert {"f2gguf/runtime/server/page.html", "f2gguf/py.typed"} <= set(names)
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    scripts = environment / "bin"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # the dependencies by a .pth file: nested ones, such as the editable install of this checkout, are not followed
    (environment / "lib" / version / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)

    def output(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert str(environment) in output(scripts / "python", "-c", "import f2gguf.runtime; print(f2gguf.runtime.__file__)")
    walk = "import f2gguf, pkgutil; print(*(m.name for m in pkgutil.walk_packages(f2gguf.__path__, 'f2gguf.')))"
    assert set(MODULES) <= set(output(scripts / "python", "-c", walk).split())
    output(scripts / "python", "-c", IMPORT_ALL)
    output(scripts / "python", "-c", "from f2gguf import Embedder, quantize_model, judge")
    assert "all" in output(scripts / "quantize", "--help")
    without_sampling = ("--dry-run", "--quick", "--stock", "--variants", "Q8_0")  # of the machine's speed
    assert "f2llm-nano" in output(scripts / "quantize", "all", "f2llm-nano", *without_sampling)
    assert "embedding" in output(scripts / "f2gguf", "embed", "-m", nano_release.file("Q8_0"), "a text")
