"""What the pictures share: one style, one frame for every panel, the same bytes for the same figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

OURS_COLOUR, TEXT_COLOUR, LINE_COLOUR = "#1f6f8b", "#30363c", "#8a939b"
_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: read aloud, searched, and small
    "svg.hashsalt": "f2gguf",  # ids are random without one
    "text.color": TEXT_COLOUR,
    "axes.labelcolor": TEXT_COLOUR,
    "xtick.color": TEXT_COLOUR,
    "ytick.color": TEXT_COLOUR,
}
# without dates and versions
_METADATA = {"png": {"Software": None}, "svg": dict.fromkeys(("Creator", "Date", "Format", "Type"))}


@contextlib.contextmanager
def picture(path: Path | IO[bytes], *, size: tuple[float, float], file_format: str) -> Iterator[Any]:
    """Give an empty matplotlib Figure of `size` inches, and save it to `path` when the block ends well."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(["default", _STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, format=file_format, dpi=160, metadata=_METADATA[file_format])


def frame(axes: Any, title: str, *hidden: str) -> None:
    """The title of a panel, and only the spines that are not `hidden`."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.spines[["top", "right", *hidden]].set_visible(False)
    axes.spines[:].set_color(LINE_COLOUR)
