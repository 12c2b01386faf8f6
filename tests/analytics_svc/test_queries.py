"""QueryService and InternalQueryService on the real store."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.query_pb2 import Query, TimeRange
from meshboard.analytics.v1.query_service_pb2 import ValidateQueryRequest

from services.analytics_svc.queries import Queries
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import refusal
from tests.harness import new_id


async def test_answers_in_the_shape_that_clients_rely_on(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(
        key,
        [
            {"time": "2015-05-19T19:30:00Z", "properties": {"latency": 10}},
            {"time": "2015-05-19T19:59:59.999Z", "properties": {"latency": 20}},
            {"time": "2015-05-19T20:00:00Z"},
        ],
    )
    await analytics.until_count(member, source, 3)
    result = await analytics.ask(
        member,
        source,
        timeRange={"startTime": "2015-05-19T19:00:00Z", "endTime": "2015-05-19T22:00:00Z"},
        granularity="HOUR",
        timeZone="Europe/Berlin",
        measures=[{"aggregation": "COUNT"}, {"aggregation": "P50", "property": "properties.latency"}],
        fillGaps=True,
    )
    assert int(result.pop("watermark")) > 0
    assert result == {
        "columns": [
            {"name": "time", "type": "TIME"},
            {"name": "count", "type": "NUMBER"},
            {"name": "p50_properties.latency", "type": "NUMBER"},
        ],
        "rows": [
            ["2015-05-19T19:00:00Z", 2.0, 15.0],
            ["2015-05-19T20:00:00Z", 1.0, None],
            ["2015-05-19T21:00:00Z", 0.0, None],
        ],
        "cached": False,
        "truncated": False,
    }


async def test_computes_once_until_new_events_arrive(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{}])
    await analytics.until_count(member, source, 1)
    question = {"breakdowns": [{"property": "event"}]}
    answers = await asyncio.gather(*[analytics.ask(member, source, **question) for _ in range(20)])
    assert all(answer["rows"] == [["view", 1.0]] for answer in answers)
    assert (await analytics.ask(member, source, **question))["cached"]
    await analytics.send(key, [{}])
    await analytics.until_count(member, source, 2)
    assert (await analytics.ask(member, source, **question))["rows"] == [["view", 2.0]]


async def test_tells_of_cut_rows(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{"distinctId": name} for name in "aabbcccdd"])
    await analytics.until_count(member, source, 9)
    by_name = {"breakdowns": [{"property": "distinct_id"}]}
    cut = await analytics.ask(member, source, **by_name, limit=2)
    assert (cut["rows"], cut["truncated"]) == ([["c", 3.0], ["a", 2.0]], True)
    whole = await analytics.ask(member, source, **by_name, limit=4)
    assert (len(whole["rows"]), whole["truncated"]) == (4, False)


async def test_the_last_seconds_hold_what_was_just_sent(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{}, {"time": "2020-01-01T00:00:00Z"}])
    await analytics.until_count(member, source, 2)
    recent = await analytics.ask(member, source, timeRange={"lastSeconds": 3600})
    assert recent["rows"] == [[1.0]]


async def test_a_query_is_compiled_once_for_a_workspace_and_a_range(analytics: Analytics) -> None:
    clock = [datetime(2027, 1, 1, 12, 0, 1, tzinfo=UTC)]
    queries = Queries(analytics.db, analytics.store, lambda: clock[0])
    member, other = analytics.identity.member("editor"), analytics.identity.member("editor")
    query = Query(source_ids=[new_id()], time_range=TimeRange(last_seconds=86_400 * 365))

    first = await queries.compiled(query, member.workspace_id)
    clock[0] += timedelta(seconds=58)
    assert await queries.compiled(query, member.workspace_id) is first
    strange = await queries.compiled(query, other.workspace_id)
    assert first.params != strange.params
    clock[0] += timedelta(seconds=2)
    later = await queries.compiled(query, member.workspace_id)
    assert (later.sql, later.params != first.params) == (first.sql, True)
    query.limit = 5
    assert (await queries.compiled(query, member.workspace_id)).limit == 5


async def test_validates_without_running(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)

    async def validate(**query: Any) -> list[str]:
        message = ParseDict({"sourceIds": [source.source_id], **query}, Query())
        answer = await analytics.queries.ValidateQuery(
            ValidateQueryRequest(query=message), metadata=member.metadata
        )
        return [column.name for column in answer.columns]

    assert await validate(granularity="DAY", breakdowns=[{"property": "path"}]) == ["time", "path", "count"]
    wrong = validate(breakdowns=[{"property": "pth"}])
    assert await refusal(wrong) == (grpc.StatusCode.INVALID_ARGUMENT, "PROPERTY_UNKNOWN")


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 50_001},
        {"measures": [{}] * 21},
        {"timeRange": {"lastSeconds": 5, "endTime": "2020-01-01T00:00:00Z"}},
    ],
)
async def test_the_contract_bounds_a_query(analytics: Analytics, query: dict[str, Any]) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    assert await refusal(analytics.ask(member, source, **query)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VALIDATION_FAILED",
    )
