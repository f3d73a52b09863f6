"""Reads the folder that `quantize all` wrote, and refuses it unless it is complete, unchanged and measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2gguf.quantize.report.report import FILE_NAME, Measured, Report, read_report
from f2gguf.runtime.errors import HashMismatch, InputError, OverBound, UnfitRelease, UnknownName, parsing
from f2gguf.runtime.files import format_bound, sha256_file
from f2gguf.runtime.gguf import header as keys
from f2gguf.runtime.gguf.describe import is_reference
from f2gguf.runtime.gguf.header import Header, read_header

REPORT, SUMS, CARD = FILE_NAME, "SHA256SUMS", "README.md"
_SUMS_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")
_REPORT_DIGITS = 1e-6  # drift.json rounds to six
_MAKE_AGAIN = "Run `quantize all` for it again, or move the file out of the folder."
# header key -> key of the verdict in drift.json that states the same
_SAME = {
    keys.KEY_HOLDS: "holds",
    keys.KEY_N_TEXTS: "n",
    keys.KEY_MEAN_DRIFT: "mean",
    keys.KEY_UPPER_DRIFT: "upper",
    keys.KEY_MAX_DRIFT: "max_drift",
}
# The same of the corpus that a file was made for; header and drift.json have all of it, or nothing
_SAME_OF_CORPUS = {
    keys.KEY_CORPUS: "name",
    keys.KEY_CORPUS_N_TEXTS: "n",
    keys.KEY_CORPUS_MEAN: "mean",
    keys.KEY_CORPUS_UPPER: "upper",
}


@dataclass(frozen=True)
class Release:
    """A folder that may be pushed. Make one with `read_release`."""

    folder: Path
    report: Report
    hashes: dict[str, str]  # file -> SHA-256, SHA256SUMS itself included
    unlisted: tuple[str, ...]  # what else lies in the folder

    @property
    def tag(self) -> str:
        """A name made from the content: it changes when a byte of the release does."""
        return f"f2gguf-{self.report.made_with['f2gguf']}-{self.hashes[SUMS][:8]}"

    def size_bytes(self, name: str) -> int:
        return (self.folder / name).stat().st_size


def find_release(model: str, out: Path) -> Path:
    """The folder of a release: `model` itself, or `out`/NAME of the MODEL that `quantize all` was given.

    Raises `UnknownName` where there is none.
    """
    name = Path(model.partition("@")[0]).name
    folders = [Path(model), out / name] if name else [Path(model)]
    for folder in folders:
        if (folder / REPORT).is_file() or (folder / SUMS).is_file():
            return folder
    if name and folders[-1].is_dir():
        return folders[-1]  # `read_release` says what it lacks
    known = [path.parent.name for path in sorted(out.glob(f"*/{REPORT}"))]
    raise UnknownName("release", model, known, f" Make it first: quantize all {model} --out {out}")


def read_release(folder: Path, *, allow_over_bound: bool = False) -> Release:
    """Read a release, and check every byte of it.

    Raises `UnfitRelease` for one that is incomplete, unmeasured or contradicts itself, `HashMismatch` for a file that
    changed since it was measured, `OverBound` for a variant over the bound unless `allow_over_bound`.
    """
    for name in (REPORT, SUMS):
        if not (folder / name).is_file():
            raise UnfitRelease(f"{folder}: has no {name}, so nothing in it was measured. Run `quantize all` for it.")
    hashes = _read_sums(folder / SUMS)
    for name in (REPORT, CARD):
        if name not in hashes:
            raise UnfitRelease(f"{folder / SUMS}: does not list {name}. Run `quantize card` for the model.")
    for name, sha256 in hashes.items():
        _require_bytes(folder / name, sha256)
    try:
        report = read_report(folder)
    except InputError as error:
        raise UnfitRelease(str(error)) from error
    for file in report.files.values():
        if hashes.get(file.file) != file.sha256:
            raise UnfitRelease(
                f"{folder / file.file}: {REPORT} and {SUMS} state different hashes of it, or one lacks it. "
                + _make_again(SUMS)
            )
    _require_measured(folder, hashes, report, allow_over_bound=allow_over_bound)
    listed = {**hashes, SUMS: sha256_file(folder / SUMS)}
    unlisted = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir() if path.name not in listed)
    return Release(folder, report, listed, tuple(sorted(unlisted)))


def _read_sums(path: Path) -> dict[str, str]:
    """File -> SHA-256, from lines such as sha256sum writes."""
    with parsing(path, UnfitRelease, _make_again(path.name)):
        *lines, rest = path.read_bytes().decode().split("\n")
        matches = [_SUMS_LINE.fullmatch(line) for line in lines]
        hashes = {match[2]: match[1] for match in matches if match}
        if rest or len(hashes) < len(lines):
            raise ValueError("a line is no SHA-256, two spaces and a name, or is there twice")
        return hashes


def _require_bytes(path: Path, sha256: str) -> None:
    again = _make_again(path.name)
    if not path.is_file():
        if path.suffix == ".gguf":
            again = f"{again[:-1]} with its variant among --variants, or without it to take it off the lists."
        raise UnfitRelease(f"{path}: is listed in {SUMS} and not there. {again}")
    if (actual := sha256_file(path)) != sha256:
        changed = "the file changed since it was measured"
        raise HashMismatch(f"{path}: has the SHA-256 {actual}, and {SUMS} states {sha256}: {changed}. {again}")


def _make_again(name: str) -> str:
    is_measured = name == REPORT or name.endswith(".gguf")
    return f"Run `quantize {'all' if is_measured else 'card'}` for the model again."


def _require_measured(folder: Path, hashes: dict[str, str], report: Report, *, allow_over_bound: bool) -> None:
    variants = {file.file: variant for variant, file in report.files.items()}
    imatrix = report.imatrix.file if report.imatrix else None
    names = {path.name for path in folder.iterdir()} | set(hashes)
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        path = folder / name
        if name not in hashes or name not in (*variants, imatrix):
            raise UnfitRelease(f"{path}: is unmeasured: {SUMS} or {REPORT} lacks it. {_MAKE_AGAIN}")
        header = read_header(path)
        if name == imatrix:
            _require(header.values.get("general.type") == "imatrix", path, "is no importance matrix")
        elif variants[name] == report.base:
            _require_reference(header, report)
        else:
            verdict = _require_verdict(header, variants[name], report)
            if not (verdict.holds or allow_over_bound):
                raise OverBound(
                    f"{path}: over the bound of {format_bound(verdict.max_drift)}: {'; '.join(verdict.over[:5])}. "
                    "Pass --allow-over-bound to push it anyway; its header and the card say so."
                )


def _require_reference(header: Header, report: Report) -> None:
    """The base file is what others are measured against; it is itself measured by gate 1."""
    is_variant = keys.KEY_VARIANT in header.values or not is_reference(header)
    _require(not is_variant, header.path, f"is no 16- or 32-bit file, as {REPORT} says")
    check = report.conversion
    _require(check is not None, header.path, f"is unmeasured: {REPORT} has no conversion check of it")
    _require(check is None or check.holds is not False, header.path, "does not do what the checkpoint does")


def _require_verdict(header: Header, variant: str, report: Report) -> Measured:
    """The verdict on a variant, which its header and drift.json must both state."""
    path, values = header.path, header.values
    missing = ", ".join(key for key in _SAME if key not in values)
    _require(not missing, path, f"is unmeasured: its header lacks {missing}")
    _require(variant in report.variants, path, f"is unmeasured: {REPORT} has no verdict on {variant}")
    _require(values.get(keys.KEY_VARIANT) == variant, path, f"is no {variant}, as {REPORT} says")
    is_same_source = values.get(keys.KEY_SOURCE_SHA256) == report.source.sha256
    _require(is_same_source, path, f"is of another checkpoint than {REPORT}")
    verdict = report.variants[variant]
    for key, name in _SAME.items():
        _require_same(header, key, getattr(verdict, name), name)
    for key, name in _SAME_OF_CORPUS.items():
        _require_same(header, key, getattr(verdict.corpus, name, None), f"corpus.{name}")
    return verdict


def _require_same(header: Header, key: str, reported: Any, name: str) -> None:
    stated = header.values.get(key)
    is_same = stated == reported
    if isinstance(stated, float) and isinstance(reported, float):
        is_same = math.isclose(stated, reported, rel_tol=1e-6, abs_tol=_REPORT_DIGITS)
    _require(is_same, header.path, f"states {key} = {stated}, and {REPORT} {name} = {reported}")


def _require(condition: bool, path: Path, otherwise: str) -> None:
    if not condition:
        raise UnfitRelease(f"{path}: {otherwise}. {_MAKE_AGAIN}")
