"""The doctor: what is missing or suspicious in a .gguf file, and the flag or command that mends it."""

from __future__ import annotations

from f2gguf.runtime.errors import NotGGUF
from f2gguf.runtime.gguf import habits, structure
from f2gguf.runtime.gguf.case import Case, Finding
from f2gguf.runtime.gguf.entries import is_sealed
from f2gguf.runtime.gguf.header import KEY_MENDED, KEY_SEAL, Header

_ORDER = ("error", "warning", "note")


def examine(header: Header, pooling: str | None = None) -> list[Finding]:
    """Everything that is wrong or may be, the worst first. `pooling` is what the caller states, where the file doesn't.

    A file that f2gguf made and sealed is only checked for damage: it was measured with what its header states.
    """
    case = Case(header, pooling or header.pooling)
    if nothing := [finding for finding in structure.usable(case) if finding.check == "model"]:
        return nothing
    is_known = case.is_own and KEY_SEAL in case.values and KEY_MENDED not in case.values
    checks = [*structure.CHECKS, *(() if is_known else habits.CHECKS)]
    found = [finding for check in checks for finding in check(case)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def warnings_of(header: Header, pooling: str) -> tuple[str, ...]:
    """What can make the vectors of a file wrong, a line each.

    Where f2gguf made it, and it is as it was, only another pooling than its own can. Raises `NotGGUF` for what
    llama.cpp would end the process for.
    """
    other: tuple[str, ...] = ()
    if header.pooling not in (None, pooling):
        words = f"its header says {header.pooling} pooling. With {pooling}, as you asked for, its vectors are others"
        other = (f"{header.path}: {words}. Leave --pooling out, unless the header is wrong.",)
    if is_sealed(header) and KEY_MENDED not in header.values:
        return other
    found = examine(header, pooling)
    if errors := [finding for finding in found if finding.severity == "error"]:
        raise NotGGUF(f"{header.path}: {errors[0]}")
    return other + tuple(f"{header.path}: {finding}" for finding in found if finding.severity == "warning")


def is_sound(findings: list[Finding]) -> bool:
    """Whether nothing is worse than a note."""
    return all(finding.severity == "note" for finding in findings)
