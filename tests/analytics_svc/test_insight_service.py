"""InsightService: the shapes that charts draw, what one event after the other means, and what is refused."""

from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from meshboard.analytics.v1.cohort_service_pb2 import CreateCohortRequest
from meshboard.analytics.v1.insight_service_pb2 import (
    RunFunnelRequest,
    RunLifecycleRequest,
    RunPathsRequest,
    RunRetentionRequest,
)
from meshboard.analytics.v1.source_pb2 import Source

from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import refusal
from tests.harness import Member, new_id

REQUESTS: Mapping[str, type[Message]] = {
    "RunFunnel": RunFunnelRequest,
    "RunRetention": RunRetentionRequest,
    "RunPaths": RunPathsRequest,
    "RunLifecycle": RunLifecycleRequest,
}
STEPS = [{"event": "view"}, {"event": "cart"}, {"event": "buy"}]
MARCH = {"startTime": "2015-03-02T00:00:00Z", "endTime": "2015-03-30T00:00:00Z"}
# The least that each question needs.
LEAST: Mapping[str, Mapping[str, Any]] = {
    "RunFunnel": {"steps": STEPS},
    "RunRetention": {"timeRange": MARCH},
    "RunPaths": {},
    "RunLifecycle": {"timeRange": MARCH},
}


async def run(
    analytics: Analytics, member: Member, source: Source, name: str, **query: Any
) -> dict[str, Any]:
    """The result, written as JSON has it."""
    request = ParseDict({"query": {"sourceIds": [source.source_id], **query}}, REQUESTS[name]())
    answer = await getattr(analytics.insights, name)(request, metadata=member.metadata)
    result: dict[str, Any] = MessageToDict(answer.result, always_print_fields_with_no_presence=True)
    return result


def at(minute: int, event: str, who: str = "ada", **more: Any) -> dict[str, Any]:
    """An event on the second of March, so many minutes after noon."""
    time = f"2015-03-02T{12 + minute // 60:02}:{minute % 60:02}:00Z"
    return {"event": event, "distinctId": who, "time": time, **more}


async def sent(analytics: Analytics, events: list[dict[str, Any]]) -> tuple[Member, Source]:
    """A new source with these events in it, and somebody who may ask it."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    for event in events:  # one after the other, so that their order of receipt is certain
        await analytics.send(key, [event])
    await analytics.until_count(member, source, len(events))
    return member, source


async def counts(analytics: Analytics, member: Member, source: Source, **query: Any) -> list[int]:
    """How many reach each step."""
    result = await run(analytics, member, source, "RunFunnel", **{"steps": STEPS, **query})
    return [step["count"] for step in result["total"]["steps"]]


async def test_a_funnel_has_what_a_chart_draws(analytics: Analytics) -> None:
    member, source = await sent(
        analytics,
        [
            at(0, "view", "ada", properties={"plan": "pro"}),
            at(1, "cart", "ada"),
            at(3, "buy", "ada"),
            at(0, "view", "bob"),
            at(5, "cart", "bob"),
            at(0, "cart", "eve"),
        ],
    )
    result = await run(
        analytics, member, source, "RunFunnel", steps=STEPS, breakdowns=[{"property": "properties.plan"}]
    )
    assert int(result["watermark"]) > 0
    assert (result["cached"], result["truncated"]) == (False, False)
    assert result["total"]["values"] == []
    assert result["total"]["steps"] == [
        {"title": "view", "count": 2, "conversion": 1.0, "stepConversion": 1.0},
        {
            "title": "cart",
            "count": 2,
            "conversion": 1.0,
            "stepConversion": 1.0,
            "averageSeconds": 180.0,
            "medianSeconds": 180.0,
            "medianSecondsFromStart": 180.0,
        },
        {
            "title": "buy",
            "count": 1,
            "conversion": 0.5,
            "stepConversion": 0.5,
            "averageSeconds": 120.0,
            "medianSeconds": 120.0,
            "medianSecondsFromStart": 180.0,
        },
    ]
    groups = {group["values"][0]: [step["count"] for step in group["steps"]] for group in result["groups"]}
    assert groups == {"": [1, 1, 0], "pro": [1, 1, 1]}
    (bucket,) = [each for each in result["total"]["conversionTimes"] if each["count"]]
    assert bucket == {"startSeconds": 60, "endSeconds": 300, "count": 1}
    again = await run(
        analytics, member, source, "RunFunnel", steps=STEPS, breakdowns=[{"property": "properties.plan"}]
    )
    assert again == {**result, "cached": True}


async def test_a_funnel_of_nobody_has_its_steps(analytics: Analytics) -> None:
    member, source = await sent(analytics, [])
    for breakdowns in ([], [{"property": "browser"}]):
        result = await run(analytics, member, source, "RunFunnel", steps=STEPS, breakdowns=breakdowns)
        assert [step["count"] for step in result["total"]["steps"]] == [0, 0, 0]
        assert "conversion" not in result["total"]["steps"][0]
        assert result["groups"] == []


async def test_at_one_millisecond_the_order_of_receipt_counts(analytics: Analytics) -> None:
    member, source = await sent(
        analytics,
        [
            at(0, event, who)
            for who, events in (("ada", STEPS), ("bob", STEPS[::-1]))
            for event in (step["event"] for step in events)
        ],
    )
    assert await counts(analytics, member, source) == [2, 1, 1]


async def test_an_event_serves_one_step_only(analytics: Analytics) -> None:
    member, source = await sent(analytics, [at(0, "view", "ada"), at(0, "view", "bob"), at(1, "view", "bob")])
    assert await counts(analytics, member, source, steps=[{"event": "view"}, {"event": ""}]) == [2, 1]
    assert await counts(analytics, member, source, steps=[{"event": "view"}] * 3) == [2, 1, 0]


async def test_the_window_is_measured_from_the_first_step(analytics: Analytics) -> None:
    member, source = await sent(analytics, [at(0, "view"), at(6, "cart"), at(10, "buy")])
    assert await counts(analytics, member, source, windowSeconds=600) == [1, 1, 1]
    assert await counts(analytics, member, source, windowSeconds=599) == [1, 1, 0]
    assert await counts(analytics, member, source, windowSeconds=359) == [1, 0, 0]


async def test_a_later_start_is_tried_as_well(analytics: Analytics) -> None:
    """The first view is too early for the purchase, the second is not."""
    member, source = await sent(
        analytics, [at(0, "view"), at(1, "cart"), at(9, "view"), at(10, "cart"), at(15, "buy")]
    )
    assert await counts(analytics, member, source, windowSeconds=600) == [1, 1, 1]


async def test_strict_allows_nothing_between(analytics: Analytics) -> None:
    member, source = await sent(
        analytics,
        [at(i, event, "ada") for i, event in enumerate(["view", "scroll", "cart", "buy"])]
        + [at(i, event, "bob") for i, event in enumerate(["view", "view", "cart", "buy"])],
    )
    assert await counts(analytics, member, source, order="IN_ORDER") == [2, 2, 2]
    assert await counts(analytics, member, source, order="STRICT") == [2, 1, 1]
    names = [{"property": "event", "operator": "NOT_EQUAL", "values": ["scroll"]}]
    assert await counts(analytics, member, source, order="STRICT", filters=names) == [2, 2, 2]


async def test_exclusions_end_attempts_between_their_steps(analytics: Analytics) -> None:
    member, source = await sent(
        analytics, [at(i, event) for i, event in enumerate(["view", "cart", "leave", "buy"])]
    )
    leave = {"events": {"event": "leave"}}
    assert await counts(analytics, member, source, exclusions=[leave]) == [1, 1, 0]
    assert await counts(analytics, member, source, exclusions=[{**leave, "beforeStep": 2}]) == [1, 1, 1]
    assert await counts(analytics, member, source, exclusions=[{**leave, "afterStep": 2}]) == [1, 1, 0]


async def test_attempts_start_in_the_range_and_may_end_after_it(analytics: Analytics) -> None:
    member, source = await sent(analytics, [at(0, "view"), at(5, "cart"), at(9, "buy"), at(9, "view", "bob")])
    until = {"startTime": "2015-03-02T12:00:00Z", "endTime": "2015-03-02T12:06:00Z"}
    assert await counts(analytics, member, source, timeRange=until) == [1, 1, 1]
    after = {"startTime": "2015-03-02T12:01:00Z"}
    assert await counts(analytics, member, source, timeRange=after) == [1, 0, 0]


async def test_the_largest_groups_are_kept(analytics: Analytics) -> None:
    members = [("a", "1"), ("b", "1"), ("c", "2"), ("d", "3")]
    member, source = await sent(
        analytics, [at(0, "view", who, properties={"plan": plan}) for who, plan in members]
    )
    result = await run(
        analytics,
        member,
        source,
        "RunFunnel",
        steps=STEPS,
        breakdowns=[{"property": "properties.plan"}],
        limit=2,
    )
    assert [group["values"] for group in result["groups"]] == [["1"], ["2"]]
    assert result["truncated"]
    assert result["total"]["steps"][0]["count"] == 4


async def test_retention_is_a_triangle_of_periods(analytics: Analytics) -> None:
    days = {"ada": (2, 3, 9), "bob": (2, 9), "eve": (3,)}
    member, source = await sent(
        analytics,
        [
            {"event": "view", "distinctId": who, "time": f"2015-03-{day:02}T12:00:00Z"}
            for who, on in days.items()
            for day in on
        ],
    )
    week = {"startTime": "2015-03-02T05:00:00Z", "endTime": "2015-03-04T00:00:00Z"}
    result = await run(analytics, member, source, "RunRetention", timeRange=week, periodCount=8)
    assert [(row["startTime"], row["size"]) for row in result["rows"]] == [
        ("2015-03-02T00:00:00Z", 2),
        ("2015-03-03T00:00:00Z", 1),
    ]
    assert [cell["count"] for cell in result["rows"][0]["cells"]] == [2, 1, 0, 0, 0, 0, 0, 2]
    assert result["rows"][0]["cells"][1] == {"count": 1, "ratio": 0.5, "complete": True}
    assert result["averages"][1] == {"size": 3, "count": 1, "ratio": pytest.approx(1 / 3)}
    later = await run(
        analytics, member, source, "RunRetention", timeRange=week, periodCount=8, orLater=True, entry="EVERY"
    )
    assert [(row["size"], [cell["count"] for cell in row["cells"]]) for row in later["rows"]] == [
        (2, [2] * 8),
        (2, [2, 1, 1, 1, 1, 1, 1, 0]),
    ]


async def test_the_future_has_no_cells(analytics: Analytics) -> None:
    member, source = await sent(analytics, [{"event": "view"}])
    result = await run(analytics, member, source, "RunRetention", timeRange={"lastSeconds": 1}, periodCount=3)
    (cell,) = result["rows"][-1]["cells"]
    assert cell == {"count": 1, "ratio": 1.0, "complete": False}
    assert result["averages"][0] == {"size": 0, "count": 0}
    result = await run(
        analytics, member, source, "RunLifecycle", timeRange={"lastSeconds": 1}, period="MONTH"
    )
    assert (result["rows"][-1]["newCount"], result["rows"][-1]["complete"]) == (1, False)


async def test_a_lifecycle_tells_who_is_new_and_who_stays_away(analytics: Analytics) -> None:
    days = {"ada": (1, 2, 3, 5), "bob": (2, 4)}
    member, source = await sent(
        analytics,
        [
            {"event": "view", "distinctId": who, "time": f"2015-03-{day:02}T12:00:00Z"}
            for who, on in days.items()
            for day in on
        ],
    )
    result = await run(
        analytics,
        member,
        source,
        "RunLifecycle",
        timeRange={"startTime": "2015-03-02T00:00:00Z", "endTime": "2015-03-06T00:00:00Z"},
    )
    kinds = ("newCount", "returningCount", "resurrectedCount", "dormantCount")
    assert [tuple(row[kind] for kind in kinds) for row in result["rows"]] == [
        (1, 1, 0, 0),
        (0, 1, 0, 1),
        (0, 0, 1, 1),
        (0, 0, 1, 1),
    ]


async def test_paths_are_what_a_flow_chart_draws(analytics: Analytics) -> None:
    ways = {"ada": "aabc", "bob": "abd", "eve": "ba"}
    member, source = await sent(
        analytics, [at(i, event, who) for who, way in ways.items() for i, event in enumerate(way)]
    )
    result = await run(analytics, member, source, "RunPaths", depth=2)
    assert (result["pathCount"], result["actorCount"], result["truncated"]) == (3, 3, False)
    assert result["nodes"] == [
        {"step": 1, "node": "a", "count": 2, "exitCount": 0},
        {"step": 2, "node": "b", "count": 2, "exitCount": 0},
        {"step": 1, "node": "b", "count": 1, "exitCount": 0},
        {"step": 2, "node": "a", "count": 1, "exitCount": 1},
    ]
    # The second "a" of ada is not there: it takes two minutes to the "b", and bob one.
    assert result["links"][0] == {
        "step": 1,
        "source": "a",
        "target": "b",
        "count": 2,
        "actorCount": 2,
        "averageSeconds": 90.0,
    }
    ending = await run(analytics, member, source, "RunPaths", depth=3, endNode="b")
    assert {(node["step"], node["node"]): node["count"] for node in ending["nodes"]} == {
        (2, "a"): 2,
        (3, "b"): 3,
    }
    cut = await run(analytics, member, source, "RunPaths", limit=1)
    assert (len(cut["nodes"]), len(cut["links"]), cut["truncated"]) == (1, 1, True)


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_visit_can_be_who_is_counted(analytics: Analytics, name: str) -> None:
    member, source = await sent(analytics, [at(0, "view"), at(5, "cart"), at(50, "view")])
    result = await run(analytics, member, source, name, **LEAST[name], actor="VISIT_ID")
    found = {
        "RunFunnel": lambda: result["total"]["steps"][0]["count"],
        "RunRetention": lambda: result["rows"][0]["size"],
        "RunPaths": lambda: result["actorCount"],
        "RunLifecycle": lambda: result["rows"][0]["newCount"],
    }
    assert found[name]() == 2


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("RunFunnel", {"steps": [{"filters": [{"property": "pth"}]}, {}]}, "PROPERTY_UNKNOWN"),
    ("RunFunnel", {"exclusions": [{"events": {}, "beforeStep": 4}]}, "QUERY_INVALID"),
    ("RunFunnel", {"exclusions": [{"events": {}, "afterStep": 3}]}, "QUERY_INVALID"),
    ("RunFunnel", {"exclusions": [{"events": {}, "afterStep": 2, "beforeStep": 2}]}, "VALIDATION_FAILED"),
    ("RunFunnel", {"steps": [{"event": "view"}]}, "VALIDATION_FAILED"),
    ("RunFunnel", {"breakdowns": [{"property": "nosuch"}]}, "PROPERTY_UNKNOWN"),
    ("RunRetention", {"timeRange": {"endTime": "2015-03-02T00:00:00Z"}}, "QUERY_INVALID"),
    ("RunRetention", {"timeRange": {"startTime": "2010-03-02T00:00:00Z"}}, "QUERY_INVALID"),
    ("RunRetention", {"timeZone": "Mars"}, "TIME_ZONE_UNKNOWN"),
    ("RunRetention", {"periodCount": 101}, "VALIDATION_FAILED"),
    ("RunLifecycle", {"timeRange": {}}, "QUERY_INVALID"),
    ("RunLifecycle", {"timeZone": "Mars"}, "TIME_ZONE_UNKNOWN"),
    ("RunPaths", {"property": "nosuch"}, "PROPERTY_UNKNOWN"),
    ("RunPaths", {"depth": 21}, "VALIDATION_FAILED"),
    ("RunPaths", {"filters": [{"property": "url"}]}, "QUERY_INVALID"),
    ("RunPaths", {"filters": [{"operator": "IN"}]}, "VALIDATION_FAILED"),
]


@pytest.mark.parametrize(("name", "query", "reason"), REFUSED)
async def test_refuses_what_does_not_fit_together(
    analytics: Analytics, name: str, query: dict[str, Any], reason: str
) -> None:
    member = analytics.identity.member("viewer")
    source, _ = await analytics.source(analytics.identity.member("editor", member.workspace_id))
    call = run(analytics, member, source, name, **{**LEAST[name], **query})
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_refuses_more_than_a_statement_can_hold(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    condition = {"property": "properties.plan", "operator": "NOT_CONTAINS", "values": ["x"]}
    many = [{"filters": [condition] * 20}] * 20
    for query in (
        {"steps": many},
        {"steps": STEPS, "filters": [{**condition, "operator": "IN", "values": ["x" * 1000] * 300}]},
    ):
        call = run(analytics, member, source, "RunFunnel", **query)
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "QUERY_INVALID")
    few = [{"event": "view", "filters": [condition] * 2}] * 20
    assert await counts(analytics, member, source, steps=few) == [0] * 20


@pytest.mark.parametrize("name", REQUESTS)
async def test_sources_of_others_are_absent(analytics: Analytics, name: str) -> None:
    source, _ = await analytics.source(analytics.identity.member("editor"))
    call = run(analytics, analytics.identity.member("owner"), source, name, **LEAST[name])
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")


@pytest.mark.parametrize("name", REQUESTS)
async def test_filters_by_a_cohort(analytics: Analytics, name: str) -> None:
    member, source = await sent(analytics, [at(0, "view"), at(1, "buy"), at(0, "view", "bob")])
    request = ParseDict(
        {"title": "Buyers", "definition": {"conditions": [{"behaviour": {"event": "buy"}}]}},
        CreateCohortRequest(),
    )
    cohort = (await analytics.cohorts.CreateCohort(request, metadata=member.metadata)).cohort
    by = {"filters": [{"cohortId": cohort.cohort_id}]}
    few = await run(analytics, member, source, name, **LEAST[name], **by)
    everyone = await run(analytics, member, source, name, **LEAST[name])
    found = {
        "RunFunnel": lambda result: result["total"]["steps"][0]["count"],
        "RunRetention": lambda result: result["rows"][0]["size"],
        "RunPaths": lambda result: result["actorCount"],
        "RunLifecycle": lambda result: result["rows"][0]["newCount"],
    }[name]
    assert (found(few), found(everyone)) == (1, 2)
    absent = run(analytics, member, source, name, **LEAST[name], filters=[{"cohortId": new_id()}])
    assert await refusal(absent) == (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")
