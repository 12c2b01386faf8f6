"""Three contents put together."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent

from services.dashboard_svc.merges import merge

A, B, C = (f"00000000-0000-7000-8000-00000000000{digit}" for digit in "abc")


def content(*widgets: dict[str, Any], **fields: Any) -> DashboardContent:
    return ParseDict({**fields, "widgets": list(widgets)}, DashboardContent())


def widget(widget_id: str, y: int = 0, **fields: Any) -> dict[str, Any]:
    return {"widgetId": widget_id, "name": f"w-{widget_id[-1]}", "layout": {"y": y, "width": 8}, **fields}


def variables(*names: str, **titles: str) -> DashboardContent:
    return content(variables=[{"name": name, "title": titles.get(name, ""), "text": {}} for name in names])


NOTHING = content()
# What is told, then: the base, what is here, the file, what becomes of it, and where they are in conflict.
CASES: dict[str, tuple[DashboardContent, DashboardContent, DashboardContent, DashboardContent, list[str]]] = {
    "the file alone has changed a field": (
        content(title="a", tags=["x"]),
        content(title="a", tags=["x"]),
        content(title="b", tags=["x", "y"]),
        content(title="b", tags=["x", "y"]),
        [],
    ),
    "people alone have changed a field": (
        content(title="a", description="d"),
        content(title="b"),
        content(title="a", description="d"),
        content(title="b"),
        [],
    ),
    "each has changed a field": (
        content(title="a", description="d"),
        content(title="b", description="d"),
        content(title="a", description="e"),
        content(title="b", description="e"),
        [],
    ),
    "both have changed a field to the same": (
        content(title="a"),
        content(title="b"),
        content(title="b"),
        content(title="b"),
        [],
    ),
    "both have changed a field otherwise": (
        content(title="a"),
        content(title="b"),
        content(title="c"),
        content(title="c"),
        ["title"],
    ),
    "settings field by field": (
        content(settings={"timeZone": "UTC", "refreshSeconds": 5}),
        content(settings={"timeZone": "Europe/Berlin", "refreshSeconds": 5}),
        content(settings={"timeZone": "UTC", "refreshSeconds": 9}),
        content(settings={"timeZone": "Europe/Berlin", "refreshSeconds": 9}),
        [],
    ),
    "a setting of both": (
        content(settings={"timeZone": "UTC"}),
        content(settings={"timeZone": "Europe/Berlin"}),
        content(settings={"timeZone": "Asia/Tokyo"}),
        content(settings={"timeZone": "Asia/Tokyo"}),
        ["settings.timeZone"],
    ),
    "a widget of each": (
        content(widget(A)),
        content(widget(A), widget(B, 8)),
        content(widget(A), widget(C, 16)),
        content(widget(A), widget(B, 8), widget(C, 16)),
        [],
    ),
    "the file has removed a widget": (
        content(widget(A), widget(B, 8)),
        content(widget(A), widget(B, 8)),
        content(widget(B, 8)),
        content(widget(B, 8)),
        [],
    ),
    "people have removed a widget": (
        content(widget(A), widget(B, 8)),
        content(widget(B, 8)),
        content(widget(A), widget(B, 8)),
        content(widget(B, 8)),
        [],
    ),
    "people have removed what the file has changed": (
        content(widget(A)),
        content(),
        content(widget(A, title="b")),
        content(widget(A, title="b")),
        ["widgets[w-a]"],
    ),
    "the file has removed what people have changed": (
        content(widget(A)),
        content(widget(A, title="b")),
        content(),
        content(),
        ["widgets[w-a]"],
    ),
    "fields of a widget": (
        content(widget(A, title="a", markdown="m")),
        content(widget(A, 4, title="a", markdown="m")),
        content(widget(A, title="b", markdown="m")),
        content(widget(A, 4, title="b", markdown="m")),
        [],
    ),
    "a field of a widget": (
        content(widget(A, markdown="a")),
        content(widget(A, markdown="b")),
        content(widget(A, markdown="c")),
        content(widget(A, markdown="c")),
        ["widgets[w-a].markdown"],
    ),
    "a query is one thing": (
        content(widget(A, query={"limit": 1})),
        content(widget(A, query={"limit": 1, "top": 3})),
        content(widget(A, query={"limit": 2})),
        content(widget(A, query={"limit": 2})),
        ["widgets[w-a].query"],
    ),
    "the first file adds, and keeps what is here": (
        NOTHING,
        content(widget(A), title="a", description="d"),
        content(widget(B, 8), title="a", tags=["x"]),
        content(widget(A), widget(B, 8), title="a", description="d", tags=["x"]),
        [],
    ),
    "the first file says otherwise": (
        NOTHING,
        content(widget(A, title="a"), title="a"),
        content(widget(A, title="b"), title="a"),
        content(widget(A, title="b"), title="a"),
        ["widgets[w-a].title"],
    ),
    "variables of each": (
        variables("a", "z"),
        variables("a", "m", "z"),
        variables("a", "z", "n"),
        variables("a", "m", "z", "n"),
        [],
    ),
    "the file has another order": (
        variables("a", "b"),
        variables("a", "b", "c"),
        variables("b", "a"),
        variables("b", "c", "a"),
        [],
    ),
    "people have another order": (
        variables("a", "b"),
        variables("b", "a"),
        variables("a", "b"),
        variables("b", "a"),
        [],
    ),
    "a variable of both": (
        variables("a"),
        variables("a", a="here"),
        variables("a", a="there"),
        variables("a", a="there"),
        ["variables[a]"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    base, here, theirs, expected, conflicts = CASES[case]
    merged = merge(base, here, theirs)
    assert merged.content == expected
    assert merged.conflicts == conflicts


titles = st.sampled_from(["", "a", "b"])
contents = st.builds(
    lambda title, description, tags, chosen: content(
        *(widget(widget_id, y, title=each) for y, (widget_id, each) in enumerate(sorted(chosen.items()))),
        title=title,
        description=description,
        tags=tags,
    ),
    titles,
    titles,
    st.lists(st.sampled_from("xyz"), unique=True),
    st.dictionaries(st.sampled_from([A, B, C]), titles),
)


@given(contents, contents)
def test_a_side_that_has_changed_nothing_leaves_the_other_as_it_is(
    base: DashboardContent, changed: DashboardContent
) -> None:
    for merged in (merge(base, changed, base), merge(base, base, changed)):
        assert merged.content == changed
        assert not merged.conflicts


@given(contents, contents, contents)
def test_to_merge_again_changes_nothing(
    base: DashboardContent, here: DashboardContent, theirs: DashboardContent
) -> None:
    merged = merge(base, here, theirs).content
    again = merge(theirs, merged, theirs)
    assert again.content == merged
    assert not again.conflicts
