from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.query_pb2 import Filter, Query, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import (
    CustomWidget,
    DashboardContent,
    Display,
    Layout,
    Settings,
    Variable,
    Widget,
)

from services.dashboard_svc.diffs import changes


def diff(before: DashboardContent, after: DashboardContent) -> list[tuple[str, Any, Any]]:
    found = [MessageToDict(change) for change in changes(before, after)]
    return [(change["path"], change.get("before"), change.get("after")) for change in found]


def test_names_fields_as_json_does() -> None:
    before = DashboardContent(settings=Settings(time_range=TimeRange(last_seconds=60)))
    after = DashboardContent(
        settings=Settings(time_range=TimeRange(last_seconds=3600), time_zone="Europe/Berlin")
    )
    assert diff(before, after) == [
        ("settings.timeRange.lastSeconds", 60, 3600),
        ("settings.timeZone", None, "Europe/Berlin"),
    ]
    assert diff(before, DashboardContent()) == [("settings", {"timeRange": {"lastSeconds": 60}}, None)]
    assert diff(DashboardContent(), DashboardContent(settings=Settings())) == [("settings", None, {})]


def test_tells_variables_by_name_and_their_order() -> None:
    text = Variable.FreeText()
    a, b, c = (Variable(name=name, text=text) for name in "abc")
    titled = Variable(name="a", title="A", text=text)
    before, after = DashboardContent(variables=[a, b]), DashboardContent(variables=[c, b, titled])
    assert diff(before, after) == [
        ("variables[c]", None, {"name": "c", "text": {}}),
        ("variables[a].title", None, "A"),
        ("variables", ["a", "b"], ["b", "a"]),
    ]
    assert diff(after, DashboardContent(variables=[c, b])) == [
        ("variables[a]", {"name": "a", "title": "A", "text": {}}, None)
    ]
    span = Variable(name="a", time_span=Variable.TimeSpan())
    assert diff(DashboardContent(variables=[a]), DashboardContent(variables=[span])) == [
        ("variables[a].text", {}, None),
        ("variables[a].timeSpan", None, {}),
    ]


def test_tells_widgets_by_id_and_calls_them_by_name() -> None:
    filter_ = Filter(property="country", values=[Value(string_value="DE")])
    old = Widget(widget_id="1", name="revenue", query=Query(limit=1), layout=Layout(x=1))
    new = Widget(widget_id="1", name="revenue", query=Query(limit=1, filters=[filter_]), layout=Layout(x=2))
    assert diff(DashboardContent(widgets=[old]), DashboardContent(widgets=[new])) == [
        ("widgets[revenue].query.filters", None, [{"property": "country", "values": ["DE"]}]),
        ("widgets[revenue].layout.x", 1, 2),
    ]
    other = Widget(widget_id="2", name="revenue")
    assert diff(DashboardContent(widgets=[old]), DashboardContent(widgets=[other])) == [
        ("widgets[revenue]", None, {"widgetId": "2", "name": "revenue"}),
        ("widgets[revenue]", MessageToDict(old), None),
    ]


def test_compares_what_can_be_anything_as_a_whole() -> None:
    old, new = CustomWidget(), CustomWidget()
    old.options.update({"a": {"b": 1}})
    new.options.update({"a": {"b": 2}})
    before = DashboardContent(widgets=[Widget(widget_id="1", custom=old)])
    after = DashboardContent(widgets=[Widget(widget_id="1", custom=new)])
    assert diff(before, after) == [("widgets[1].custom.options", {"a": {"b": 1}}, {"a": {"b": 2}})]


def test_tells_nothing_from_zero_where_that_matters() -> None:
    before = DashboardContent(widgets=[Widget(widget_id="1", display=Display())])
    after = DashboardContent(widgets=[Widget(widget_id="1", display=Display(decimals=0))])
    assert diff(before, after) == [("widgets[1].display.decimals", None, 0)]
    assert diff(after, after) == []
