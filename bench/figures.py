"""A measured figure, and the table and JSON document of many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing that was measured, once in each round.

    Attributes:
        name: `group/what`, unique in a run.
        rounds: the values in `unit`, in the order of measuring; never empty.
        at_least, at_most: the target for the median, if there is one.
        note: how to read it.
    """

    name: str
    rounds: tuple[float, ...]
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; None without one."""
        if self.at_least is not None:
            return self.median >= self.at_least
        return None if self.at_most is None else self.median <= self.at_most


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of them do not exceed: nearest rank, no interpolation."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ratios(subject: Iterable[float], baseline: Iterable[float]) -> tuple[float, ...]:
    """Round by round: what slowed the machine down for a while slowed both."""
    return tuple(one / other for one, other in zip(subject, baseline, strict=True))


def table(figures: Iterable[Figure]) -> str:
    """Aligned text, a heading for each group."""
    rows = [_row(figure) for figure in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines: list[str] = []
    group = ""
    for figure, row in zip(figures, rows, strict=True):
        if figure.name.partition("/")[0] != group:
            group = figure.name.partition("/")[0]
            lines += ["", group]
        name, value, unit, spread = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(f"  {name}  {value.strip():>{widths[1]}} {unit}  {spread}  {row[4]}".rstrip())
    return "\n".join(lines).lstrip("\n")


def document(figures: Iterable[Figure]) -> list[dict[str, object]]:
    """The figures as JSON."""
    return [
        {
            "name": figure.name,
            "median": figure.median,
            "unit": figure.unit,
            "rounds": list(figure.rounds),
            "at_least": figure.at_least,
            "at_most": figure.at_most,
            "met": figure.met,
            "note": figure.note,
        }
        for figure in figures
    ]


def _row(figure: Figure) -> tuple[str, str, str, str, str]:
    low, high = min(figure.rounds), max(figure.rounds)
    spread = f"{_number(low)} … {_number(high)}" if len(figure.rounds) > 1 else ""
    target = ""
    if figure.met is not None:
        wanted = f"≥ {figure.at_least:,g}" if figure.at_least is not None else f"≤ {figure.at_most:,g}"
        target = f"{'✓' if figure.met else '✗'} {wanted}"
    last = "  ".join(text for text in (target, figure.note) if text)
    return figure.name.partition("/")[2], _number(figure.median), figure.unit, spread, last


def _number(value: float) -> str:
    """Three digits that matter."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
