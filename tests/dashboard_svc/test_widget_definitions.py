from __future__ import annotations

import re
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from hypothesis import given
from hypothesis import strategies as st
from meshboard.dashboard.v1.dashboard_pb2 import Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind

from services.chassis import errors
from services.dashboard_svc.widget_definitions import MAX_BYTES, WidgetDefinition
from tests.dashboard_svc.custom import QUERY, SCHEMA, SPEC, VEGA_LITE, struct
from tests.dashboard_svc.hostile import TEXTS
from tests.harness import new_id

SOURCE = new_id()
TITLE = {"$option": "title"}


def kind_with(**parts: Any) -> WidgetKind:
    given = {"options_schema": SCHEMA, "query_template": QUERY, "spec": SPEC, **parts}
    kind = WidgetKind()
    ParseDict(given, kind)
    return kind


def spec_with(more: dict[str, Any]) -> dict[str, Any]:
    return {"$schema": VEGA_LITE, "data": {"name": "rows"}, "mark": "bar", **more}


def made_of(kind: WidgetKind, **options: Any) -> Widget:
    return WidgetDefinition(kind).made_of(struct({"source": SOURCE, **options}))


def reason(call: Any) -> str:
    with pytest.raises(errors.Error) as refusal:
        call()
    return refusal.value.reason


# Where a text is shown.
SHOWN: dict[str, dict[str, Any]] = {
    "a title": {"title": TITLE},
    "a subtitle": {"title": {"text": "x", "subtitle": [TITLE, "y"]}},
    "a description": {"description": TITLE},
    "a value of a text": {"encoding": {"text": {"value": TITLE}}},
    "a value of a tooltip": {"encoding": {"tooltip": {"value": TITLE}}},
    "the title of an axis": {"encoding": {"x": {"field": "a", "axis": {"title": TITLE}}}},
    "a value to compare with": {"transform": [{"filter": {"field": "a", "oneOf": [TITLE]}}]},
    "an order": {"encoding": {"x": {"field": "a", "sort": [TITLE]}}},
}
# Where a text means something.
MEANT: dict[str, dict[str, Any]] = {
    "a mark": {"mark": {"type": TITLE}},
    "a colour": {"encoding": {"color": {"value": TITLE}}},
    "a background": {"background": TITLE},
    "a range of colours": {"encoding": {"color": {"field": "a", "scale": {"range": [TITLE]}}}},
    "a font": {"config": {"axis": {"labelFont": TITLE}}},
    "a shape": {"mark": {"type": "point", "shape": TITLE}},
    "an operation": {"transform": [{"aggregate": [{"op": TITLE, "field": "a", "as": "b"}]}]},
    "a unit of time": {"encoding": {"x": {"field": "a", "timeUnit": TITLE}}},
    "a way to write": {"encoding": {"x": {"field": "a", "axis": {"formatType": TITLE}}}},
}


@pytest.mark.parametrize("place", SHOWN)
def test_text_that_is_shown_stays_what_it_is(place: str) -> None:
    kind = kind_with(spec=spec_with(SHOWN[place]))
    expected = MessageToDict(made_of(kind, title="MARKER").custom.spec)
    for text in TEXTS:
        spec = MessageToDict(made_of(kind, title=text).custom.spec)
        assert replaced(expected, "MARKER", text) == spec


@pytest.mark.parametrize("place", MEANT)
def test_text_that_means_something_is_a_word_or_refused(place: str) -> None:
    kind = kind_with(spec=spec_with(MEANT[place]))
    assert made_of(kind, title="time")
    for text in [*TEXTS, "url(#x)", "URL (https://a.example)", "a'b", 'a"b', "a`b", "a;b", "a:b", "a\nb"]:
        assert reason(lambda text=text: made_of(kind, title=text)) == "WIDGET_OPTIONS_INVALID", text


def test_the_name_of_a_column_is_escaped() -> None:
    kind = kind_with(spec=spec_with({"encoding": {"x": {"field": {"$column": "title"}}}}))
    bare = kind_with(spec=spec_with({"encoding": {"x": {"field": TITLE}}}))
    for text in TEXTS:
        field = MessageToDict(made_of(kind, title=text).custom.spec)["encoding"]["x"]["field"]
        assert re.sub(r"\\(.)", r"\1", field, flags=re.DOTALL) == text
        assert re.fullmatch(r"(\\.|[^\\.'\"\[\]])*", field, flags=re.DOTALL)
        if field != text:
            assert reason(lambda text=text: made_of(bare, title=text)) == "WIDGET_OPTIONS_INVALID", text


def test_an_option_is_no_filter_and_no_test() -> None:
    for spec in (
        {"transform": [{"filter": TITLE}]},
        {"encoding": {"color": {"condition": {"test": TITLE, "value": "red"}}}},
        {"transform": [{"filter": {"and": [TITLE]}}]},
    ):
        kind = kind_with(spec=spec_with(spec))
        assert reason(lambda kind=kind: WidgetDefinition(kind)) == "WIDGET_KIND_INVALID"


def test_parts_are_bounded() -> None:
    large = "x" * MAX_BYTES
    for parts in (
        {"options_schema": {**SCHEMA, "description": large}},
        {"query_template": {**QUERY, "timeZone": large}},
        {"spec": {**SPEC, "description": large}},
    ):
        assert reason(lambda parts=parts: WidgetDefinition(kind_with(**parts))) == "WIDGET_KIND_INVALID"
    many = kind_with(spec=spec_with({"title": [TITLE] * 100}))
    assert made_of(many, title="x" * 100)
    assert reason(lambda: made_of(many, title="x" * 1000)) == "WIDGET_OPTIONS_INVALID"


NAMES = sorted(
    {
        "$option",
        "$column",
        "$if",
        "$ref",
        "$defs",
        "properties",
        "type",
        "items",
        "pattern",
        "enum",
        "default",
    }
    | {
        "sourceIds",
        "timeRange",
        "startTime",
        "lastSeconds",
        "measures",
        "aggregation",
        "filters",
        "values",
        "limit",
    }
    | {"$schema", "data", "mark", "encoding", "x", "field", "title", "filter", "test"}
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(allow_nan=False, width=32),
    st.sampled_from(
        [*NAMES, VEGA_LITE, "object", "string", "#/$defs/x", "rows", SOURCE, "(", "2026-01-01T00:00:00Z"]
    ),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5)


@given(schema=OBJECTS, query=OBJECTS, spec=OBJECTS, options=OBJECTS, which=st.integers(0, 4))
def test_whatever_somebody_sends_is_let_in_or_refused(
    schema: dict[str, Any], query: dict[str, Any], spec: dict[str, Any], options: dict[str, Any], which: int
) -> None:
    """Nothing else is raised: that would be a fault of the service."""
    parts: dict[str, Any] = {}
    if which in {0, 4}:
        parts["options_schema"] = {**schema, "type": "object"}
    if which in {1, 4}:
        parts["query_template"] = query
    if which in {2, 4}:
        parts["spec"] = {**spec, "$schema": VEGA_LITE}
    kind = kind_with(**parts)
    refusal = ""
    try:
        WidgetDefinition(kind).made_of(struct(options))
    except errors.Error as error:
        refusal = error.reason
    assert refusal in {"", "WIDGET_KIND_INVALID", "WIDGET_OPTIONS_INVALID"}


def test_messages_are_bounded() -> None:
    with pytest.raises(errors.Error) as refusal:
        made_of(kind_with(), top="y" * 20_000)
    assert len(refusal.value.message) < 700


def replaced(json: Any, old: str, new: str) -> Any:
    if isinstance(json, dict):
        return {key: replaced(value, old, new) for key, value in json.items()}
    if isinstance(json, list):
        return [replaced(value, old, new) for value in json]
    return new if json == old else json
