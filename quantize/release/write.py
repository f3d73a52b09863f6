"""What goes beside the .gguf files: model card, picture, report, Ollama's Modelfile, licence texts, checksums."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from f2gguf.quantize.checkpoint.folder import is_legal
from f2gguf.quantize.release.card import model_card
from f2gguf.quantize.report.page import report_html
from f2gguf.quantize.report.picture import can_draw, draw
from f2gguf.quantize.source.facts import Facts
from f2gguf.runtime.console import say
from f2gguf.runtime.files import sha256_file, write_text, writing
from f2gguf.runtime.hub.models import recommended


def write_release(facts: Facts, folder: Path, report: dict[str, Any]) -> list[Path]:
    """Write what people read beside the files of `report`, and SHA256SUMS; gives their paths.

    drift.png is drawn only where matplotlib is installed, and an older one would show other figures: it goes.
    """
    texts = {
        "README.md": model_card(facts, report),
        "Modelfile": ollama_modelfile(facts, report),
        "report.html": report_html(report),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    names = [*texts, *_draw(folder / "drift.png", report), *_copy_notices(facts.checkpoint.folder, folder)]
    paths = [folder / name for name in names]
    files = [*report["files"].values(), *([report["imatrix"]] if "imatrix" in report else [])]
    hashes = {file["file"]: file["sha256"] for file in files}
    hashes |= {path.name: sha256_file(path) for path in (folder / "drift.json", *paths)}
    sums = folder / "SHA256SUMS"
    write_text(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())))
    return [*paths, sums]


def ollama_modelfile(facts: Facts, report: dict[str, Any]) -> str:
    """Of the recommended file. Source: https://docs.ollama.com/modelfile"""
    file = report["files"][recommended(report)]["file"]
    return f"FROM ./{file}\nPARAMETER num_ctx {facts.max_tokens}\n"


def _draw(path: Path, report: dict[str, Any]) -> list[str]:
    """Draw the picture where that is possible; gives the names of what was drawn."""
    if not can_draw(report):
        path.unlink(missing_ok=True)
        if report["variants"]:
            say(f"{path.name}: not drawn, for want of matplotlib. Run: pip install 'f2gguf[plots]', then quantize card")
        return []
    with writing(path) as part:
        draw(report, part, file_format="png")
    return [path.name]


def _copy_notices(source: Path, folder: Path) -> list[str]:
    """Copy the licence and notice files of the checkpoint; gives their names."""
    paths = sorted(path for path in source.iterdir() if is_legal(path.name) and path.is_file())
    for path in paths:
        with writing(folder / path.name) as part:
            shutil.copyfile(path, part)
    return [path.name for path in paths]
