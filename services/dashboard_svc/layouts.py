"""Where widgets stand on the grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshboard.dashboard.v1.dashboard_pb2 import Layout

from services.chassis import errors

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


def below(others: Iterable[Layout]) -> Layout:
    """A place below all others. Raises FAILED_PRECONDITION (LAYOUT_FULL) when the grid ends there."""
    y = max((other.y + other.height for other in others), default=0)
    if y > LAST_ROW:
        raise errors.failed_precondition(
            "LAYOUT_FULL", "The grid ends below the lowest widget: say where the widget is to stand."
        )
    return Layout(x=0, y=y, width=DEFAULT_WIDTH, height=DEFAULT_HEIGHT)


def check_free(widget_id: str, layout: Layout, others: Mapping[str, Layout]) -> None:
    """Raises FAILED_PRECONDITION (LAYOUT_OVERLAP) when another widget stands on a cell of this place.

    `others` are by widget id; `widget_id` itself is passed over.
    """
    for other_id, other in others.items():
        if other_id != widget_id and _overlap(layout, other):
            raise errors.failed_precondition(
                "LAYOUT_OVERLAP",
                f"The widget {other_id} stands there, from ({other.x}, {other.y}), {other.width} wide and"
                f" {other.height} high.",
                widget_id=other_id,
            )


def _overlap(one: Layout, other: Layout) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )
