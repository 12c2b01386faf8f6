"""What a query may take, whose turn it is, and that the store ends what nobody waits for."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.query_pb2 import Query, Result
from meshboard.analytics.v1.query_service_pb2 import (
    ExplainQueryRequest,
    RunQueryRequest,
    ValidateQueryRequest,
)
from meshboard.analytics.v1.source_pb2 import Source

from services.analytics_svc import queries as queries_module
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.queries import WAITING_FOR_EACH, Limits, Queries
from services.chassis.errors import Error
from tests.analytics_svc.conftest import Analytics
from tests.conditions import eventually
from tests.harness import Member, new_id

EVENTS = 1_500_000
# Takes the store seconds: visits, and the exact percentiles of twenty measures.
SLOW: dict[str, Any] = {
    "breakdowns": [{"property": "visit_id"}],
    "measures": [
        {"aggregation": "P95", "property": "properties.n", "alias": f"slow{number}"} for number in range(20)
    ],
}


@dataclass
class Crowd:
    """A source with many events."""

    member: Member
    source: Source

    def query(self, **parts: Any) -> Query:
        return ParseDict({"sourceIds": [self.source.source_id], **parts}, Query())


@pytest.fixture(scope="module")
async def crowd(analytics: Analytics) -> AsyncIterator[Crowd]:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    await analytics.store.execute(
        "INSERT INTO events (workspace_id, source_id, event, distinct_id, insert_id, time, receive_time, numbers)"
        " SELECT {w:UUID}, {s:UUID}, 'view', toString(number % 100000), toString(number),"
        " toDateTime64('2020-01-01 00:00:00', 3, 'UTC') + toIntervalSecond(number % 1000000),"
        " now64(3), map('n', toFloat64(number))"
        f" FROM numbers({EVENTS})",
        {"w": member.workspace_id, "s": source.source_id},
        timeout=120,
    )
    yield Crowd(member, source)
    await analytics.store.execute(
        "ALTER TABLE events DELETE WHERE workspace_id = {w:UUID}", {"w": member.workspace_id}
    )


async def under_way(store: EventStore) -> int:
    # The statement begins like a write, so that it does not wait behind the readers.
    body = await store.scan(
        "(SELECT count() FROM system.processes WHERE query LIKE '%AS m19%' AND query NOT LIKE '%system.proc%')"
        " FORMAT TSV"
    )
    return int(body)


def of_one(analytics: Analytics, **limits: Any) -> Queries:
    """Queries of a process of its own, with other limits."""
    return Queries(analytics.db, analytics.store, lambda: datetime.now(UTC), Limits(**limits))


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"seconds": 0.05}, "time"), ({"memory_bytes": 2_000_000}, "memory"), ({"rows": 1000}, "rows")],
)
async def test_a_query_has_limits(
    analytics: Analytics, crowd: Crowd, limits: dict[str, Any], limit: str
) -> None:
    with pytest.raises(Error) as caught:
        await of_one(analytics, **limits).answer(crowd.query(**SLOW), crowd.member.workspace_id)
    assert (caught.value.code, caught.value.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUERY_TOO_EXPENSIVE",
    )
    assert caught.value.metadata == {"limit": limit}


async def test_a_cancelled_call_ends_its_query_in_the_store(analytics: Analytics, crowd: Crowd) -> None:
    request = RunQueryRequest(query=crowd.query(**SLOW))
    calls = [analytics.queries.RunQuery(request, metadata=crowd.member.metadata) for _ in range(2)]

    async def runs() -> bool:
        return await under_way(analytics.store) == 1

    async def ended() -> bool:
        return await under_way(analytics.store) == 0

    await eventually(runs)
    calls[0].cancel()
    # On the same connection, so that the service has heard of what was before it.
    validate = ValidateQueryRequest(query=crowd.query())
    await analytics.queries.ValidateQuery(validate, metadata=crowd.member.metadata)
    assert await runs(), "the other one still waits for it"
    calls[1].cancel()
    await eventually(ended)


async def test_what_nobody_waits_for_ends_in_the_store(analytics: Analytics) -> None:
    """A statement that would never end by itself."""
    queries = of_one(analytics, seconds=600.0, rows=0)
    endless = "SELECT count() AS m19 FROM numbers(1000000000000)"
    waiting = [
        asyncio.create_task(queries.shared(("endless",), lambda: queries.rows(endless, {}, "a workspace")))
        for _ in range(2)
    ]

    async def runs() -> bool:
        return await under_way(analytics.store) == 1

    async def ended() -> bool:
        return await under_way(analytics.store) == 0

    await eventually(runs)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert await runs(), "the other one still waits for it"
    waiting[1].cancel()
    await eventually(ended)


async def test_a_call_past_its_deadline_ends_its_query_in_the_store(
    analytics: Analytics, crowd: Crowd
) -> None:
    request = RunQueryRequest(query=crowd.query(**SLOW, limit=7))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await analytics.queries.RunQuery(request, metadata=crowd.member.metadata, timeout=0.4)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def ended() -> bool:
        return await under_way(analytics.store) == 0

    await eventually(ended)


async def test_a_workspace_waits_for_its_own_queries_only(analytics: Analytics, crowd: Crowd) -> None:
    queries = of_one(analytics, per_workspace=1)
    workspace_id = crowd.member.workspace_id
    slow: list[asyncio.Task[Result]] = []

    def ask() -> asyncio.Task[Result]:
        asked = crowd.query(**SLOW, limit=1 + len(slow))  # no two the same: those would share an answer
        slow.append(asyncio.create_task(queries.answer(asked, workspace_id)))
        return slow[-1]

    for _ in range(1 + WAITING_FOR_EACH):
        ask()

    async def one_runs() -> bool:
        return await under_way(analytics.store) == 1

    await eventually(one_runs)
    refusals: list[Error] = []

    async def one_is_refused() -> bool:
        # What waits takes the place of one that has come to its end meanwhile.
        done, _ = await asyncio.wait([ask()], timeout=1)
        refusals.extend(failure for task in done if isinstance(failure := task.exception(), Error))
        return bool(refusals)

    await eventually(one_is_refused, 60)
    (refusal,) = refusals
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUERIES_QUEUED")
    assert refusal.retry_seconds
    others = await queries.answer(Query(source_ids=[new_id()]), new_id())
    assert [list(row) for row in others.rows] == [[0]]
    assert await under_way(analytics.store) == 1, "one at a time"
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert [list(row) for row in (await queries.answer(crowd.query(), workspace_id)).rows] == [[EVENTS]]


async def test_explains_what_a_query_takes(analytics: Analytics, crowd: Crowd) -> None:
    query = crowd.query(
        timeRange={"startTime": "2020-01-01T00:00:00Z", "endTime": "2020-01-03T00:00:00Z"},
        breakdowns=[{"property": "event"}],
        filters=[{"property": "distinct_id", "values": ["7"]}],
    )
    request = ExplainQueryRequest(query=query)
    for least in (
        172_800,
        1,
    ):  # what is remembered would take nothing; the store itself remembers where to look
        found = await analytics.queries.ExplainQuery(request, metadata=crowd.member.metadata)
        assert least <= found.rows_read <= EVENTS
        assert found.bytes_read > found.rows_read
        assert 0 < found.milliseconds < 60_000
        assert found.row_count == 1
        assert "['7']" in found.parameters.values()
        assert crowd.source.source_id not in found.sql
        assert all(f"{{{name}:" in found.sql for name in found.parameters if name != "zone")


async def test_remembers_no_more_than_it_may(
    analytics: Analytics, crowd: Crowd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries_module, "CACHED_BYTES", 2500)
    queries = of_one(analytics)

    async def cached(limit: int) -> bool:
        query = crowd.query(breakdowns=[{"property": "distinct_id"}], limit=limit)
        return (await queries.answer(query, crowd.member.workspace_id)).cached

    assert [await cached(limit) for limit in (40, 40, 41, 40, 41)] == [False, True, False, True, True]
    assert [await cached(limit) for limit in (42, 43, 40, 40)] == [False, False, False, True]
    assert [await cached(1000), await cached(1000)] == [False, False], "more than there is room for"
