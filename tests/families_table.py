"""The tables of quantize/README.md that say what converts. Run this file after a change of a family: it writes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from f2gguf.quantize.checkpoint.architectures import ARCHITECTURES, REFUSED
from f2gguf.quantize.repair.codes.layers import LAYERS

README = Path(__file__).resolve().parent.parent / "quantize" / "README.md"
BEGIN, END = "<!-- families: tests/families_table.py writes this part -->", "<!-- end of families -->"


def with_table(text: str) -> str:
    """The README with the tables that the code gives."""
    before, rest = text.split(BEGIN)
    converted = table(
        ("`model_type`", "for example", "GGUF architecture", "channels that can be re-scaled"),
        (
            (f"`{kind}`", one.examples, f"`{one.name}`", ", ".join(LAYERS[one.name].places))
            for kind, one in sorted(ARCHITECTURES.items())
        ),
    )
    refused = table(("`model_type`", "why not"), ((f"`{kind}`", why) for kind, why in REFUSED.items()))
    return f"{before}{BEGIN}\n{converted}\n{refused}{END}{rest.split(END)[1]}"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
