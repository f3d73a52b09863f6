"""The files beside the .gguf files: model card, picture, report, Ollama's Modelfile, licence texts, checksums."""

from __future__ import annotations

import shutil
from pathlib import Path

from f2gguf.quantize.checkpoint.folder import is_legal
from f2gguf.quantize.report.card import model_card
from f2gguf.quantize.report.page import report_html
from f2gguf.quantize.report.picture import can_draw, draw
from f2gguf.quantize.report.report import FILE_NAME, Report
from f2gguf.runtime.console import say
from f2gguf.runtime.files import sha256_file, write_text, writing


def write_release(folder: Path, report: Report) -> list[Path]:
    """Write what people read beside the files of `report`, and SHA256SUMS; gives their paths.

    drift.png is drawn only where matplotlib is installed. Without it, an older picture is removed, since it would show
    other figures.
    """
    # Source: https://docs.ollama.com/modelfile
    modelfile = f"FROM ./{report.files[report.recommended].file}\nPARAMETER num_ctx {report.source.max_tokens}\n"
    texts = {"README.md": model_card(report), "Modelfile": modelfile, "report.html": report_html(report)}
    for name, text in texts.items():
        write_text(folder / name, text)
    legal = sorted(path.name for path in folder.iterdir() if is_legal(path.name) and path.is_file())
    paths = [folder / name for name in [*texts, *_draw(folder / "drift.png", report), *legal]]
    files = [*report.files.values(), *([report.imatrix] if report.imatrix else [])]
    hashes = {file.file: file.sha256 for file in files}
    hashes |= {path.name: sha256_file(path) for path in (folder / FILE_NAME, *paths)}
    sums = folder / "SHA256SUMS"
    write_text(sums, "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items())))
    return [*paths, sums]


def copy_legal_files(source: Path, folder: Path) -> None:
    """Copy the checkpoint's licence and notice files, which must go wherever the weights go."""
    for path in source.iterdir():
        if is_legal(path.name) and path.is_file():
            with writing(folder / path.name) as part:
                shutil.copyfile(path, part)


def _draw(path: Path, report: Report) -> list[str]:
    """Draw the picture where that is possible; gives its name then."""
    if not can_draw(report):
        path.unlink(missing_ok=True)
        if report.variants:
            again = "Run: pip install 'f2gguf[plots]', then quantize card"
            say(f"{path.name}: not drawn, because matplotlib is missing. {again}")
        return []
    with writing(path) as part:
        draw(report, part, file_format="png")
    return [path.name]
