from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshboard.dashboard.v1.dashboard_pb2 import Layout

from services.chassis import errors
from services.dashboard_svc import layouts

SMALL = st.builds(
    Layout,
    x=st.integers(0, 8),
    y=st.integers(0, 8),
    width=st.integers(1, 8),
    height=st.integers(1, 8),
)


def cells(layout: Layout) -> set[tuple[int, int]]:
    return {
        (x, y)
        for x in range(layout.x, layout.x + layout.width)
        for y in range(layout.y, layout.y + layout.height)
    }


@given(SMALL, st.dictionaries(st.sampled_from("abc"), SMALL))
def test_a_place_is_free_when_no_cell_is_shared(layout: Layout, others: dict[str, Layout]) -> None:
    taken = {
        other_id for other_id, other in others.items() if other_id != "a" and cells(layout) & cells(other)
    }
    if not taken:
        layouts.check_free("a", layout, others)
        return
    with pytest.raises(errors.Error) as refusal:
        layouts.check_free("a", layout, others)
    assert refusal.value.reason == "LAYOUT_OVERLAP"
    assert refusal.value.metadata["widget_id"] in taken


@given(st.lists(SMALL))
def test_below_is_free(others: list[Layout]) -> None:
    place = layouts.below(others)
    assert not any(cells(place) & cells(other) for other in others)


def test_the_grid_ends() -> None:
    assert layouts.below([Layout(y=9_000, height=1_000)]).y == layouts.LAST_ROW
    with pytest.raises(errors.Error) as refusal:
        layouts.below([Layout(y=9_001, height=1_000)])
    assert refusal.value.reason == "LAYOUT_FULL"


def test_sizes_are_filled_in() -> None:
    assert layouts.settle(Layout(x=20)) == Layout(x=20, width=4, height=8)
    assert layouts.settle(Layout()) == Layout(width=12, height=8)
