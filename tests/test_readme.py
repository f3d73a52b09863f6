"""The READMEs name what there is, and every command says what it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import families_table
import pytest
from f2gguf.quantize.cli import f2gguf, quantize

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("quantize", "evals", "runtime"))]
TEXT = "\n".join(path.read_text() for path in READMES)


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group with its full name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict([*commands(quantize, "quantize"), *commands(f2gguf, "f2gguf")])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help_in_whole_phrases(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.help.split("\n")[0].endswith(".")
    for option in command.params:
        if isinstance(option, click.Option):
            words = option.help or ""
            assert words.endswith("."), f"{name} {option.opts[-1]}: {words!r}"
            assert words[0].isupper(), f"{name} {option.opts[-1]}: {words!r}"
            assert len(words.partition("[default")[0].split()) >= 3, f"{name} {option.opts[-1]}: {words!r} is no phrase"


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("f2gguf quantize")])
def test_every_command_is_named_in_a_readme(name: str) -> None:
    assert name in TEXT


def test_every_script_is_named_in_the_readme() -> None:
    names = {path.name for path in (ROOT / "scripts").iterdir()} - {
        "setup",
        "check",
        "demo-packages.txt",
        "__pycache__",
    }
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", READMES[0].read_text())] == []


@pytest.mark.parametrize("folder", ["quantize", "evals", "runtime"])
def test_every_file_and_room_of_a_folder_is_named_in_its_readme(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text().split("## ")[0]
    words = set(re.findall(r"[\w/.-]+", text))
    paths = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    rooms = {f"{path.parent.name}/" for path in paths if path.parent.name != folder}
    assert rooms <= words
    paths = [path for path in paths if path.parent.name not in ("architectures", "layers")]  # a file for every family
    assert [path.name for path in paths if not {path.name, path.stem} & words and folder != "evals"] == []


def test_table_of_families_is_what_the_code_says() -> None:
    text = families_table.README.read_text()
    assert families_table.with_table(text) == text, "run: python tests/families_table.py"


def test_readmes_link_to_files_that_are_there() -> None:
    for path in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_readmes_do_not_grow_into_manuals() -> None:
    assert len(READMES[0].read_text().splitlines()) <= 160
