"""JSON files of a checkpoint folder: read and checked, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from f2gguf.runtime.errors import BrokenCheckpoint, parsing
from pydantic import TypeAdapter

FETCH_AGAIN = "Fetch the model again."


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file. Raises `BrokenCheckpoint` if it does not parse, or is missing and not `optional`."""
    if optional and not path.exists():
        return {}
    content = load_json(path)
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{path}: holds a JSON {type(content).__name__}, not an object. {FETCH_AGAIN}")
    return content


def load_json(path: Path) -> Any:
    """Any JSON value from a file. Raises `BrokenCheckpoint` if the file is missing or does not parse.

    Python would let halves of letters through ("\\ud800"), which no other program reads, and no header can hold.
    """
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data))
        content = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path}: no such file. A checkpoint folder needs it. {FETCH_AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path}: does not parse as JSON: {error}. {FETCH_AGAIN}") from error


def read_value(path: Path, key: str, shape: Any) -> Any:
    """The value of `key` in a JSON file; None in a file that is missing. pydantic checks that it has the type `shape`.

    Raises `BrokenCheckpoint` for a value of another type.
    """
    content = read_json(path, optional=True)
    with parsing(path, BrokenCheckpoint, FETCH_AGAIN):
        return TypeAdapter(dict[str, shape]).validate_python({key: content.get(key)})[key]
