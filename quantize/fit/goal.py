"""Wishes such as `drift<1%,memory<3GB,latency<50ms`: which file grants them all, or comes closest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from f2gguf.runtime.errors import UnknownName, WrongUsage

_WISH = re.compile(r"\s*([a-z]+)\s*([<>])=?\s*([0-9.]+)\s*([a-zA-Z%/$]*)\s*")
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
# wish -> the sign that it takes, and its units in that of the figure
WISHES: dict[str, tuple[str, Mapping[str, float]]] = {
    "drift": ("<", {"%": 0.01}),
    "size": ("<", _BYTES),
    "memory": ("<", _BYTES),
    "vram": ("<", _BYTES),
    "latency": ("<", {"ms": 1, "s": 1000}),  # of a query
    "speed": (">", {"": 1, "tokens/s": 1}),  # of documents
    "cost": ("<", {"": 1}),  # of a million texts, in the money of --price
}


@dataclass(frozen=True)
class Wish:
    name: str
    text: str
    limit: float

    def excess(self, value: float | None) -> float:
        """By which factor a figure misses the wish: 1 or less where it grants it, infinite where it is unknown."""
        if value is None:
            return float("inf")
        if self.name == "speed":
            return self.limit / max(value, 1e-9)
        return value / self.limit if value != self.limit or "=" in self.text else 1.0000001  # less is asked for


def parse_goal(text: str) -> list[Wish]:
    """The wishes of a goal. Raises `WrongUsage` for what is no wish, or two about one figure."""
    wishes: list[Wish] = []
    for part in text.split(","):
        match = _WISH.fullmatch(part)
        if not match:
            raise WrongUsage(f"--goal {part.strip()!r}: is no wish. Write such as drift<1%,memory<3GB,latency<50ms.")
        name, sign, number, unit = match.groups()
        if name not in WISHES:
            raise UnknownName("wish of --goal", name, WISHES)
        asked, units = WISHES[name]
        by_lower = {key.lower(): factor for key, factor in units.items()}
        try:
            limit = float(number) * by_lower[unit.lower()]
        except (ValueError, KeyError) as error:
            known = ", ".join(filter(None, units)) or "a plain number"
            raise WrongUsage(f"--goal {part.strip()!r}: {number}{unit} is no {name}. Units: {known}.") from error
        if sign != asked or not limit > 0:
            raise WrongUsage(f"--goal {part.strip()!r}: say {name}{asked}NUMBER, with a number above 0.")
        if name in (wish.name for wish in wishes):
            raise WrongUsage(f"--goal: has two wishes about {name}. Keep one of them.")
        wishes.append(Wish(name, part.strip(), limit))
    return wishes


def choose(
    wishes: Sequence[Wish], figures: Sequence[Mapping[str, float | None]]
) -> tuple[int, dict[str, float | None]]:
    """The index of the file of least drift that grants all wishes, else of the closest; and the wishes that it fails.

    `figures` has a value for each wish, of each file. The closest file misses its worst wish by the least factor.
    """
    worst = [max(wish.excess(row[wish.name]) for wish in wishes) for row in figures]
    granting = [i for i, excess in enumerate(worst) if excess <= 1]

    def drift(i: int) -> tuple[float, float]:
        found = figures[i]["drift"]
        return (float("inf") if found is None else found, figures[i]["memory"] or 0.0)

    if granting:
        return min(granting, key=drift), {}
    closest = min(range(len(figures)), key=lambda i: (worst[i], *drift(i)))
    row = figures[closest]
    return closest, {wish.text: row[wish.name] for wish in wishes if wish.excess(row[wish.name]) > 1}
