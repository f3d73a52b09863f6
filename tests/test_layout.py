"""The package mapping, the direction of imports, the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import Release, Run

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quantize", "evals", "runtime")
ALLOWED = {"runtime": {"runtime"}, "evals": {"evals", "runtime"}, "quantize": {"quantize", "evals", "runtime"}}
HEAVY = ("numpy", "llama_cpp", "gguf", "scipy", "tokenizers", "huggingface_hub", "torch", "transformers", "safetensors")
HEAVY += ("fastapi", "uvicorn", "pydantic", "prometheus_client")


def test_mapping_lists_every_folder_with_python_code() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        f"f2gguf.{path.parent.relative_to(ROOT).as_posix().replace('/', '.')}" for path in ROOT.glob("*/__init__.py")
    }
    nested = [path for folder in FOLDERS for path in (ROOT / folder).glob("*/**/*.py")]
    assert set(settings["packages"]) == found == {f"f2gguf.{folder}" for folder in FOLDERS}
    assert settings["package-dir"] == {f"f2gguf.{folder}": folder for folder in FOLDERS}
    assert not nested, "a sub-package would be missing from the wheel"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {name.split(".")[1] for name in names if name.startswith("f2gguf.")}
            assert ours <= ALLOWED[folder], f"{path.name} imports {ours - ALLOWED[folder]}"


def test_commands_load_nothing_heavy_for_their_help() -> None:
    code = f"import f2gguf.quantize.cli, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


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
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    scripts = environment / "bin"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # the dependencies by a .pth file: nested ones, such as the editable install of this checkout, are not followed
    (environment / "lib" / version / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([scripts / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)

    def output(*command: str | Path) -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert str(environment) in output(scripts / "python", "-c", "import f2gguf.runtime; print(f2gguf.runtime.__file__)")
    assert "all" in output(scripts / "quantize", "--help")
    assert "f2llm-nano" in output(scripts / "quantize", "all", "f2llm-nano", "--dry-run")
    assert "embedding" in output(scripts / "f2gguf", "embed", "-m", nano_release.file("Q8_0"), "a text")
