from __future__ import annotations

from typing import Any

import pytest
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, RetentionQuery
from meshboard.analytics.v1.query_pb2 import Breakdown, Comparison, Filter, Measure, Query
from meshboard.dashboard.v1.dashboard_pb2 import CustomWidget, Display, Link, Widget

from services.chassis import errors
from services.dashboard_svc import kinds
from tests.harness import new_id

PATH, BROWSER = Breakdown(property="path"), Breakdown(property="browser")
DAILY: Any = {"granularity": Query.DAY}
COMPARED: Any = {"comparison": Comparison()}
SUBJECTS: dict[str, Any] = {
    "query": Query(source_ids=[new_id()]),
    "funnel": FunnelQuery(source_ids=[new_id()]),
    "retention": RetentionQuery(source_ids=[new_id()]),
    "markdown": "# Words",
    "custom": CustomWidget(widget_kind_id=new_id()),
}


def thresholds(*bounds: float) -> Display:
    display = Display()
    for bound in bounds:
        setattr(display.thresholds.add(), "from", bound)
    return display


def refusal_of(widget: Widget, at: str = "") -> errors.Error:
    with pytest.raises(errors.Error) as refusal:
        kinds.check(widget, at)
    return refusal.value


@pytest.mark.parametrize(
    ("kind", "query", "fits"),
    [
        (Widget.TIMESERIES, Query(**DAILY), True),
        (Widget.TIMESERIES, Query(**DAILY, **COMPARED), True),
        (Widget.TIMESERIES, Query(), False),
        (Widget.NUMBER, Query(), True),
        (Widget.NUMBER, Query(**COMPARED), True),
        (Widget.NUMBER, Query(**DAILY), False),
        (Widget.NUMBER, Query(breakdowns=[PATH]), False),
        (Widget.PIE, Query(breakdowns=[PATH]), True),
        (Widget.PIE, Query(), False),
        (Widget.PIE, Query(breakdowns=[PATH], **DAILY), False),
        (Widget.PIE, Query(breakdowns=[PATH], **COMPARED), False),
        (Widget.BAR, Query(breakdowns=[PATH], **DAILY), True),
        (Widget.TABLE, Query(**DAILY), True),
        (Widget.STACKED, Query(breakdowns=[PATH], **DAILY), True),
        (Widget.STACKED, Query(measures=[Measure(), Measure(alias="two")], **DAILY), True),
        (Widget.STACKED, Query(measures=[Measure()], **DAILY), False),
        (Widget.STACKED, Query(breakdowns=[PATH]), False),
        (Widget.STACKED, Query(breakdowns=[PATH], **DAILY, **COMPARED), False),
        (Widget.HEATMAP, Query(breakdowns=[PATH], **DAILY), True),
        (Widget.HEATMAP, Query(breakdowns=[PATH, BROWSER]), True),
        (Widget.HEATMAP, Query(breakdowns=[PATH]), False),
        (Widget.HEATMAP, Query(**DAILY), False),
        (Widget.HEATMAP, Query(breakdowns=[PATH, BROWSER], **DAILY), False),
        (Widget.HEATMAP, Query(breakdowns=[PATH, BROWSER], **COMPARED), False),
    ],
)
def test_query_fits_the_kind(kind: Widget.Kind.ValueType, query: Query, fits: bool) -> None:
    query.source_ids[:] = [new_id()]
    widget = Widget(kind=kind, query=query)
    if fits:
        kinds.check(widget)
        return
    refusal = refusal_of(widget, "widget.")
    assert refusal.reason == "WIDGET_QUERY_UNFIT"
    assert refusal.violations[0][0] == "widget.query"
    assert refusal.metadata == {"kind": Widget.Kind.Name(kind)}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(
    ("kind", "needed"),
    [
        (Widget.TABLE, "query"),
        (Widget.FUNNEL, "funnel"),
        (Widget.RETENTION, "retention"),
        (Widget.TEXT, "markdown"),
    ],
)
def test_a_kind_has_what_it_shows_and_nothing_else(
    kind: Widget.Kind.ValueType, needed: str, subject: str
) -> None:
    kinds.check(Widget(kind=kind, **{needed: SUBJECTS[needed]}))
    if subject == needed:
        refusal = refusal_of(Widget(kind=kind))
    else:
        refusal = refusal_of(Widget(kind=kind, **{needed: SUBJECTS[needed], subject: SUBJECTS[subject]}))
    assert refusal.reason == "VALIDATION_FAILED"
    assert [field for field, _ in refusal.violations] == [subject]


def test_a_widget_has_a_kind() -> None:
    assert refusal_of(Widget(query=SUBJECTS["query"])).violations == (("kind", "is not set"),)


def test_a_question_is_bounded() -> None:
    query = Query(source_ids=[new_id()], filters=[Filter(property="path")])
    query.filters[0].values.add(string_value="x" * 70_000)
    assert refusal_of(Widget(kind=Widget.TABLE, query=query)).violations[0][0] == "query"


@pytest.mark.parametrize("field", kinds.OF_THE_LIBRARY)
def test_what_shows_a_library_widget_says_nothing_itself(field: str) -> None:
    kinds.check(Widget(library_widget_id=new_id(), name="revenue", own_time_range=True))
    more = {
        **SUBJECTS,
        "title": "t",
        "description": "d",
        "kind": Widget.TABLE,
        "display": Display(decimals=1),
    }
    refusal = refusal_of(Widget(library_widget_id=new_id(), **{field: more[field]}))
    assert refusal.violations == ((field, "is what the library widget says"),)


@pytest.mark.parametrize(
    "widget", [Widget(kind=Widget.TABLE, query=SUBJECTS["query"]), Widget(library_widget_id=new_id())]
)
def test_a_widget_has_one_time_range(widget: Widget) -> None:
    widget.own_time_range, widget.time_range_variable = True, "when"
    assert refusal_of(widget).violations[0][0] == "time_range_variable"


@pytest.mark.parametrize(
    ("display", "field"),
    [
        (Display(unit=Display.MONEY, unit_text="EUR"), ""),
        (Display(unit=Display.MONEY), "unit_text"),
        (Display(unit=Display.MONEY, unit_text="euro"), "unit_text"),
        (Display(unit=Display.CUSTOM_UNIT, unit_text="req/s"), ""),
        (Display(unit=Display.CUSTOM_UNIT, unit_text=" "), "unit_text"),
        (Display(unit=Display.BYTES, unit_text="B"), "unit_text"),
        (thresholds(1, 2), ""),
        (thresholds(1, 1), "thresholds[1].from"),
        (thresholds(-1, 5, 4), "thresholds[2].from"),
        (Display(sparkline=True), "sparkline"),
        (Display(links=[Link(title="t", url="https://a.example/${country}?b#c")]), ""),
        (Display(links=[Link(title="t", url="mailto:a@a.example")]), ""),
        (Display(links=[Link(title="t", url="mailto:nobody")]), "links[0].url"),
        (Display(links=[Link(title="t", url="https:///path")]), "links[0].url"),
        (Display(links=[Link(title="t", url="https://bank.example@evil.example/")]), "links[0].url"),
        (Display(links=[Link(title="t", url="https://a.example\\@evil.example")]), "links[0].url"),
        (Display(links=[Link(title="t", url="https://[::1")]), "links[0].url"),
    ],
)
def test_display(display: Display, field: str) -> None:
    widget = Widget(kind=Widget.TABLE, query=SUBJECTS["query"], display=display)
    if not field:
        kinds.check(widget)
        return
    assert [name for name, _ in refusal_of(widget, "widget.").violations] == [f"widget.display.{field}"]


def test_a_number_has_a_sparkline() -> None:
    kinds.check(Widget(kind=Widget.NUMBER, query=SUBJECTS["query"], display=Display(sparkline=True)))


def test_another_kind_drops_what_it_does_not_show() -> None:
    widget = Widget(
        kind=Widget.TEXT,
        query=SUBJECTS["query"],
        markdown="# Words",
        display=Display(sparkline=True, decimals=2),
    )
    kinds.keep_to_kind(widget, {"kind", "markdown"})
    assert widget == Widget(kind=Widget.TEXT, markdown="# Words", display=Display(decimals=2))
    widget.query.CopyFrom(SUBJECTS["query"])
    kinds.keep_to_kind(widget, {"query"})
    assert refusal_of(widget).violations[0][0] == "query"
