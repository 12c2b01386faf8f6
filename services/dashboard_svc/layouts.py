"""Where widgets stand on the grid."""

from __future__ import annotations

from collections.abc import Iterable

from meshboard.dashboard.v1.dashboard_pb2 import Layout

COLUMNS = 24
LAST_ROW = 10_000
DEFAULT_WIDTH = 12
DEFAULT_HEIGHT = 8


def settle(layout: Layout) -> Layout:
    """The layout with sizes filled in: the usual ones, or what is left of the row."""
    return Layout(
        x=layout.x,
        y=layout.y,
        width=layout.width or min(DEFAULT_WIDTH, COLUMNS - layout.x),
        height=layout.height or DEFAULT_HEIGHT,
    )


def below(others: Iterable[tuple[int, int]]) -> Layout:
    """A place below all others, given as (y, height), as far down as the grid goes."""
    y = max((y + height for y, height in others), default=0)
    return Layout(x=0, y=min(y, LAST_ROW), width=DEFAULT_WIDTH, height=DEFAULT_HEIGHT)
