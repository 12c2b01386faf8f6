"""What widgets ask: variables, time ranges, time zones and the filters of a scope, as pure functions."""

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetQuestion
from meshboard.analytics.v1.query_pb2 import Filter, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget

from services.chassis import errors
from services.dashboard_svc.questions import Question, Tile, resolve
from services.dashboard_svc.scopes import scope_of
from tests.harness import new_id

SOURCE = new_id()
VARIABLES: list[dict[str, Any]] = [
    {"name": "country", "text": {}, "multiple": True},
    {"name": "plan", "list": {"options": [{"value": "free"}, {"value": "paid"}]}, "defaults": ["paid"]},
    {"name": "least", "text": {}},
    {"name": "when", "timeSpan": {}},
]


def board(**more: Any) -> Dashboard:
    return ParseDict({"dashboardId": new_id(), "variables": VARIABLES, **more}, Dashboard())


def widget(kind: str = "TABLE", **more: Any) -> Widget:
    query = {"query": {"sourceIds": [SOURCE]}} if kind in {"TABLE", "NUMBER"} else {}
    return ParseDict({"widgetId": new_id(), "kind": kind, **query, **more}, Widget())


def filtered(*filters: dict[str, Any], **more: Any) -> Widget:
    return widget(query={"sourceIds": [SOURCE], "filters": filters, **more})


def asked(question: Question | None) -> dict[str, Any]:
    """The question as JSON, without its kind and its sources."""
    assert question is not None
    ((_, body),) = MessageToDict(WidgetQuestion.FromString(question.key)).items()
    body.pop("sourceIds")
    return dict(body)


def one(dashboard: Dashboard, tile: Widget, *choices: str, **scope: Any) -> Tile:
    (made,) = resolve([tile], dashboard, scope_of(dashboard.variables, choices, **scope))
    return made


def reason(tile: Tile) -> str:
    assert tile.problem is not None
    return errors.from_status(tile.problem).reason


@pytest.mark.parametrize(
    ("operator", "choices", "expected"),
    [
        ("EQUAL", ["country=de"], ("EQUAL", ["de"])),
        ("EQUAL", ["country=de", "country=at"], ("IN", ["de", "at"])),
        ("OPERATOR_UNSPECIFIED", ["country=de", "country=at"], ("IN", ["de", "at"])),
        ("NOT_EQUAL", ["country=de", "country=at"], ("NOT_IN", ["de", "at"])),
        ("NOT_EQUAL", ["country=de"], ("NOT_EQUAL", ["de"])),
        ("NOT_IN", ["country=de"], ("NOT_IN", ["de"])),
        ("CONTAINS", ["country=de"], ("CONTAINS", ["de"])),
        ("EQUAL", ["country=$plan"], ("EQUAL", ["$plan"])),
        ("EQUAL", ["country=a=b"], ("EQUAL", ["a=b"])),
    ],
)
def test_a_condition_compares_with_what_was_chosen(
    operator: str, choices: list[str], expected: tuple[str, list[str]]
) -> None:
    tile = filtered({"property": "country", "operator": operator, "values": ["$country"]})
    (found,) = asked(one(board(), tile, *choices).question)["filters"]
    assert (found["operator"], found["values"]) == expected


def test_what_nothing_is_chosen_for_does_not_filter() -> None:
    country = {"property": "country", "operator": "EQUAL", "values": ["$country"]}
    plan = {"property": "properties.plan", "operator": "EQUAL", "values": ["$plan"]}
    tile = filtered(country, plan)
    assert [found["values"] for found in asked(one(board(), tile).question)["filters"]] == [["paid"]]
    assert "filters" not in asked(one(board(), tile, "plan=").question)
    chosen = asked(one(board(), tile, "plan=free", "country=de").question)["filters"]
    assert [found["values"] for found in chosen] == [["de"], ["free"]]


def test_an_alternative_that_does_not_filter_lifts_all_of_them() -> None:
    country = {"property": "country", "operator": "EQUAL", "values": ["$country"]}
    other = {"property": "path", "operator": "EQUAL", "values": ["/"]}
    tile = filtered(anyOf=[{"filters": [country, other]}, {"filters": [other]}])
    assert asked(one(board(), tile).question)["anyOf"] == [{"filters": [other]}]
    assert len(asked(one(board(), tile, "country=de").question)["anyOf"]) == 2


def test_dollars_are_texts_when_they_name_nothing() -> None:
    def values(text: str) -> list[Any]:
        tile = filtered({"property": "path", "operator": "EQUAL", "values": [text]})
        return list(asked(one(board(), tile).question)["filters"][0]["values"])

    assert values("$$country") == ["$country"]
    assert values("$$$") == ["$$"]
    assert values("$5.00") == ["$5.00"]
    assert values("$") == ["$"]
    several = filtered({"property": "path", "operator": "IN", "values": ["$country", "x"]})
    assert asked(one(board(), several, "country=de").question)["filters"][0]["values"] == ["$country", "x"]


def test_numbers_are_compared_as_numbers() -> None:
    tile = filtered({"property": "properties.price", "operator": "GREATER", "values": ["$least"]})
    assert asked(one(board(), tile, "least=9.5").question)["filters"][0]["values"] == [9.5]
    for wrong in ("least=many", "least=nan", "least=inf"):
        assert reason(one(board(), tile, wrong)) == "VARIABLE_UNFIT"


def test_what_cannot_be_compared_is_the_widgets_own_problem() -> None:
    contains = filtered({"property": "country", "operator": "CONTAINS", "values": ["$country"]})
    unknown = filtered({"property": "country", "operator": "EQUAL", "values": ["$county"]})
    scope = scope_of(board().variables, ["country=de", "country=at"])
    bad, worse, good = resolve([contains, unknown, filtered()], board(), scope)
    assert (reason(bad), reason(worse)) == ("VARIABLE_UNFIT", "VARIABLE_UNKNOWN")
    assert good.question is not None


def test_conditions_everywhere_are_settled() -> None:
    condition = {"property": "country", "operator": "EQUAL", "values": ["$country"]}
    chosen = {**condition, "values": ["de"]}
    funnel = {
        "sourceIds": [SOURCE],
        "steps": [{"event": "a", "filters": [condition]}, {"event": "b"}],
        "exclusions": [{"events": {"event": "c", "filters": [condition]}}],
        "filters": [condition],
    }
    found = asked(one(board(), widget("FUNNEL", funnel=funnel), "country=de").question)
    assert found["filters"] == [chosen]
    assert found["steps"][0]["filters"] == [chosen]
    assert found["exclusions"][0]["events"]["filters"] == [chosen]
    retention = {
        "sourceIds": [SOURCE],
        "timeRange": {"lastSeconds": 60},
        "start": {"filters": [condition]},
        "returning": {"filters": [condition]},
        "filters": [condition],
    }
    found = asked(one(board(), widget("RETENTION", retention=retention), "country=de").question)
    assert [found["filters"], found["start"]["filters"], found["returning"]["filters"]] == [[chosen]] * 3
    measured = filtered(measures=[{"aggregation": "COUNT", "filters": [condition]}])
    assert asked(one(board(), measured, "country=de").question)["measures"][0]["filters"] == [chosen]


def test_the_filters_of_a_scope_are_in_every_question() -> None:
    lock = Filter(property="country")
    lock.values.add(string_value="de")
    tiles = [
        filtered(),
        widget("NUMBER", display={"sparkline": True}),
        widget("FUNNEL", funnel={"sourceIds": [SOURCE], "steps": [{"event": "a"}, {"event": "b"}]}),
        widget("RETENTION", retention={"sourceIds": [SOURCE], "timeRange": {"lastSeconds": 60}}),
    ]
    for tile in resolve(tiles, board(), scope_of([], [], filters=[lock])):
        for question in tile.questions:
            assert asked(question)["filters"] == [{"property": "country", "values": ["de"]}]


def test_more_filters_than_a_query_may_have_are_a_problem_and_not_dropped() -> None:
    lock = Filter(property="country")
    lock.values.add(string_value="de")
    full = filtered(*[{"property": "path", "operator": "EXISTS"}] * 20)
    (tile, other) = resolve([full, filtered()], board(), scope_of([], [], filters=[lock]))
    assert (reason(tile), tile.question) == ("VALIDATION_FAILED", None)
    assert other.question is not None


def test_who_says_the_time_range() -> None:
    own, boards, viewers = {"lastSeconds": 1}, {"lastSeconds": 2}, TimeRange(last_seconds=3)
    tile = filtered(timeRange=own)
    plain, settled = board(), board(settings={"timeRange": boards})
    assert asked(one(plain, tile).question)["timeRange"] == own
    assert asked(one(settled, tile).question)["timeRange"] == boards
    assert asked(one(settled, tile, time_range=viewers).question)["timeRange"] == {"lastSeconds": 3}
    assert one(settled, tile, time_range=viewers).question == one(plain, tile, time_range=viewers).question
    tile.own_time_range = True
    assert asked(one(settled, tile, time_range=viewers).question)["timeRange"] == own
    by_variable = filtered(timeRange=own)
    by_variable.time_range_variable = "when"
    assert asked(one(settled, by_variable).question)["timeRange"] == boards
    chosen = one(settled, by_variable, "when=60", time_range=viewers)
    assert asked(chosen.question)["timeRange"] == {"lastSeconds": 60}
    fixed = "2026-01-01T00:00:00Z/2026-02-01T00:00:00+01:00"
    assert asked(one(settled, by_variable, f"when={fixed}").question)["timeRange"] == {
        "startTime": "2026-01-01T00:00:00Z",
        "endTime": "2026-01-31T23:00:00Z",
    }
    by_variable.time_range_variable = "gone"
    assert reason(one(settled, by_variable)) == "VARIABLE_UNKNOWN"


@pytest.mark.parametrize(
    "span",
    ["0", "-5", "315360001", "9999999999999", "x", "٣", "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z/",
     "2026-02-01T00:00:00Z/2026-01-01T00:00:00Z", "2026-02-01/2026-03-01"],
)  # fmt: skip
def test_what_is_no_stretch_of_time_cannot_be_chosen(span: str) -> None:
    with pytest.raises(errors.Error) as refusal:
        scope_of(board().variables, [f"when={span}"])
    assert refusal.value.reason == "CHOICE_INVALID"


@pytest.mark.parametrize("choice", ["plan=gold", "plan", "county=de", "", "=de", "Country=de"])
def test_what_is_no_choice_is_refused(choice: str) -> None:
    with pytest.raises(errors.Error) as refusal:
        scope_of(board().variables, [choice])
    assert refusal.value.reason == "CHOICE_INVALID"


def test_scopes_are_equal_in_whatever_order_variables_come() -> None:
    variables = board().variables
    assert scope_of(variables, ["country=de", "plan=free"]) == scope_of(
        variables, ["plan=free", "country=de"]
    )
    with pytest.raises(errors.Error):
        scope_of(variables, ["plan=free", "plan=paid"])


def test_the_time_zone_of_the_dashboard_counts() -> None:
    settled = board(settings={"timeZone": "Europe/Berlin"})
    assert asked(one(settled, filtered(timeZone="UTC")).question)["timeZone"] == "Europe/Berlin"
    assert asked(one(board(), filtered(timeZone="UTC")).question)["timeZone"] == "UTC"
    retention = {"sourceIds": [SOURCE], "timeRange": {"lastSeconds": 60}}
    tile = widget("RETENTION", retention=retention)
    assert asked(one(settled, tile).question)["timeZone"] == "Europe/Berlin"


@pytest.mark.parametrize(
    ("time_range", "granularity", "filled"),
    [
        ({"lastSeconds": 3600}, "MINUTE", True),
        ({"lastSeconds": 86_400}, "HOUR", True),
        ({"lastSeconds": 86_400 * 90}, "DAY", True),
        ({"lastSeconds": 86_400 * 700}, "WEEK", True),
        ({"startTime": "2010-01-01T00:00:00Z", "endTime": "2026-01-01T00:00:00Z"}, "MONTH", True),
        ({"startTime": "2010-01-01T00:00:00Z"}, "MONTH", False),
        ({}, "MONTH", False),
    ],
)
def test_a_sparkline_is_the_same_over_time(
    time_range: dict[str, Any], granularity: str, filled: bool
) -> None:
    query = {
        "sourceIds": [SOURCE],
        "timeRange": time_range,
        "measures": [{"aggregation": "UNIQUE"}],
        "comparison": {"period": "WEEK"},
        "limit": 1,
    }
    tile = one(board(), widget("NUMBER", query=query, display={"sparkline": True}))
    line = asked(tile.sparkline)
    assert line["granularity"] == granularity
    assert line.get("fillGaps", False) == filled
    assert line["measures"] == [{"aggregation": "UNIQUE"}]
    assert not line.keys() & {"comparison", "limit"}
    assert asked(tile.question)["comparison"] == {"period": "WEEK"}


def test_texts_ask_nothing() -> None:
    tile = one(board(), widget("TEXT", markdown="# Hello", html="<h1>Hello</h1>"))
    assert tile.html == ""
    tile = one(board(), widget("TEXT", markdown="${country}", html="<p>${country}</p>"), "country=<de>")
    assert tile.html == "<p>&lt;de&gt;</p>"
    tile = one(board(), widget("TEXT", markdown="# Hello"))
    assert (tile.questions, tile.problem) == ([], None)


def test_resolving_leaves_the_widget_alone() -> None:
    tile = filtered({"property": "country", "operator": "EQUAL", "values": ["$country"]})
    before = tile.SerializeToString(deterministic=True)
    first = one(board(settings={"timeRange": {"lastSeconds": 5}}), tile, "country=de")
    assert tile.SerializeToString(deterministic=True) == before
    assert first.question is not None
    assert (first.question.last_seconds, first.question.source_ids) == (5, (SOURCE,))


def test_a_widget_whose_library_widget_is_gone_says_so():
    gone = Widget(widget_id=new_id(), library_widget_id=new_id())
    assert reason(one(board(), gone)) == "LIBRARY_WIDGET_NOT_FOUND"
