"""The README says what the commands say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_help_texts_are_those_of_the_commands() -> None:
    process = subprocess.run([sys.executable, ROOT / "scripts" / "readme", "--check"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_every_file_of_the_tree_is_there() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n\nImports")[0]
    names = {word for word in tree.replace(",", " ").split() if word.endswith(".py")}
    found = {path.name for folder in ("quantize", "evals", "runtime") for path in (ROOT / folder).glob("*.py")}
    assert names == found - {"__init__.py"} | {"texts.py"}


def test_scripts_of_the_tree_are_there() -> None:
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    scripts/ "))
    names = {name.strip() for name in line.split("scripts/", 1)[1].split(",")}
    assert names == {path.name for path in (ROOT / "scripts").iterdir()} - {"setup", "demo-packages.txt", "__pycache__"}
