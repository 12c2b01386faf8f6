"""EventService: pages of stored events, and live tails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from meshboard.analytics.v1.event_service_pb2 import (
    ListEventsRequest,
    StoredEvent,
    TailEventsRequest,
    TailEventsResponse,
)
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import DeleteSourceRequest

from services.analytics_svc.queries import Queries
from services.analytics_svc.raw_events import windows
from services.analytics_svc.selection import Selection
from services.analytics_svc.tables import insert_events
from services.analytics_svc.tails import Tails, stream
from services.chassis.rechecks import Rechecks, Span
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.oracle import Row
from tests.analytics_svc.test_compiler import batch_of, random_rows
from tests.analytics_svc.test_sources import refusal
from tests.harness import Member, new_id, reason_of

End = TailEventsResponse.End
PATIENCE = 20.0


async def listed(
    analytics: Analytics, member: Member, source_ids: list[str], **request: Any
) -> list[list[StoredEvent]]:
    """All pages."""
    message = ParseDict({"sourceIds": source_ids, **request}, ListEventsRequest())
    pages = []
    while True:
        answer = await analytics.events.ListEvents(message, metadata=member.metadata)
        pages.append(list(answer.events))
        if not answer.next_page_token:
            return pages
        message.page_token = answer.next_page_token


async def filled(analytics: Analytics, member: Member, count: int) -> tuple[list[str], list[Row]]:
    """Two sources with random events, many at the same instant."""
    sources = [(await analytics.source(member))[0].source_id for _ in range(2)]
    rows = []
    for source_id in sources:
        made = random_rows(source_id, count, seed=count)
        batch = batch_of(member.workspace_id, source_id, made, sequence=7)
        await insert_events(analytics.store, [batch], token=source_id)
        rows += made
    return sources, rows


@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_pages_are_complete_and_in_order(analytics: Analytics, size: int, oldest_first: bool) -> None:
    member = analytics.identity.member("viewer")
    editor = analytics.identity.member("editor", member.workspace_id)
    sources, rows = await filled(analytics, editor, 20 if size == 1 else 150)
    pages = await listed(analytics, member, sources, pageSize=size, oldestFirst=oldest_first)
    assert all(len(page) == size for page in pages[:-1])
    found = [event for page in pages for event in page]
    keys = [(event.source_id, event.insert_id) for event in found]
    assert len(set(keys)) == len(keys) == len(rows)
    times = [event.time.ToMilliseconds() for event in found]
    assert times == sorted((row.time for row in rows), reverse=not oldest_first)


async def test_filters_as_queries_do(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    sources, rows = await filled(analytics, member, 120)
    start = sorted(row.time for row in rows)[50]
    request = {
        "timeRange": {"startTime": datetime.fromtimestamp(start / 1000, UTC).isoformat()},
        "events": ["view", "buy"],
        "filters": [
            {"property": "properties.plan", "operator": "MATCHES", "values": ["^(pro|free)$"]},
            {"property": "browser", "operator": "EXISTS"},
        ],
    }
    expected = [
        row
        for row in rows
        if row.time >= start
        and row.built_ins["event"] in {"view", "buy"}
        and row.properties.get("plan") in {"pro", "free"}
        and row.built_ins["browser"]
    ]
    (page,) = await listed(analytics, member, sources, pageSize=1000, **request)
    assert expected
    assert sorted(event.time.ToMilliseconds() for event in page) == sorted(row.time for row in expected)
    (mine,) = await listed(analytics, member, sources, pageSize=1000, distinctId="u1")
    assert {event.distinct_id for event in mine} == {"u1"}
    assert len(mine) == sum(row.built_ins["distinct_id"] == "u1" for row in rows)
    visit = [{"property": "visit_id", "operator": "EXISTS"}]
    assert len((await listed(analytics, member, sources, pageSize=1000, filters=visit))[0]) == len(rows)


async def test_gives_back_what_was_sent(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(
        key,
        [
            {
                "event": "buy",
                "insertId": "one",
                "time": "2015-05-19T19:30:00.123Z",
                "url": "https://shop.example/cart?utm_source=mail",
                "properties": {"price": 2.5, "plan": "trüe\n'", "gift": True, "items": [1, {"a": None}]},
            }
        ],
    )
    await analytics.until_count(member, source, 1)
    ((event,),) = await listed(analytics, member, [source.source_id])
    shown = MessageToDict(event)
    received = datetime.fromisoformat(shown.pop("receiveTime"))
    assert timedelta(0) <= datetime.now(UTC) - received < timedelta(minutes=1)
    assert shown == {
        "sourceId": source.source_id,
        "event": "buy",
        "distinctId": "ada",
        "insertId": "one",
        "time": "2015-05-19T19:30:00.123Z",
        "properties": {"price": 2.5, "plan": "trüe\n'", "gift": "true", "items": '[1,{"a":null}]'},
        "builtIns": {
            "url": "https://shop.example/cart?utm_source=mail",
            "path": "/cart",
            "host": "shop.example",
            "utm_source": "mail",
            "is_robot": "false",
        },
    }


async def test_turned_pages_ignore_what_arrives_meanwhile(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{"insertId": str(i)} for i in range(5)])
    await analytics.until_count(member, source, 5)
    request = ListEventsRequest(source_ids=[source.source_id], page_size=3)
    request.time_range.last_seconds = 3600
    first = await analytics.events.ListEvents(request, metadata=member.metadata)
    await analytics.send(key, [{"insertId": "late"}])
    await analytics.until_count(member, source, 6)
    request.page_token = first.next_page_token
    second = await analytics.events.ListEvents(request, metadata=member.metadata)
    ids = [event.insert_id for event in [*first.events, *second.events]]
    assert sorted(ids) == ["0", "1", "2", "3", "4"]
    assert not second.next_page_token


async def test_pages_of_large_events_are_shorter_and_complete(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    large = {"text": "ü" * 30_000}
    for part in range(4):
        await analytics.send(key, [{"insertId": f"{part}-{i}", "properties": large} for i in range(25)])
    await analytics.until_count(member, source, 100)
    pages = await listed(analytics, member, [source.source_id], pageSize=1000)
    assert 1 < len(pages) < 10
    assert len({event.insert_id for page in pages for event in page}) == 100
    assert sum(map(len, pages)) == 100


async def test_a_page_token_is_of_its_question(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    sources, _ = await filled(analytics, member, 10)
    request = ListEventsRequest(source_ids=sources, page_size=3)
    token = (await analytics.events.ListEvents(request, metadata=member.metadata)).next_page_token
    for changed in (
        ListEventsRequest(source_ids=sources[:1], page_token=token),
        ListEventsRequest(source_ids=sources, oldest_first=True, page_token=token),
        ListEventsRequest(source_ids=sources, distinct_id="u1", page_token=token),
    ):
        asked = analytics.events.ListEvents(changed, metadata=member.metadata)
        assert await refusal(asked) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_others_sources_are_absent(analytics: Analytics) -> None:
    member, stranger = analytics.identity.member("editor"), analytics.identity.member("owner")
    source, _ = await analytics.source(member)
    request = ListEventsRequest(source_ids=[source.source_id])
    asked = analytics.events.ListEvents(request, metadata=stranger.metadata)
    assert await refusal(asked) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in analytics.events.TailEvents(
            TailEventsRequest(source_ids=[source.source_id]), metadata=stranger.metadata
        ):
            pass
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ([{"property": "pth", "values": ["x"]}], "PROPERTY_UNKNOWN"),
        ([{"property": "path", "values": []}], "QUERY_INVALID"),
        ([{"property": "path", "operator": "MATCHES", "values": ["("]}], "PATTERN_INVALID"),
    ],
)
async def test_refuses_what_cannot_be_asked(analytics: Analytics, filters: list[Any], reason: str) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    wrong = listed(analytics, member, [source.source_id], filters=filters)
    assert await refusal(wrong) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    async with tailing(analytics, member, [source], filters=filters) as tail:
        assert await refusal(tail.next()) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


def test_looks_at_the_latest_days_first() -> None:
    now = datetime(2026, 11, 24, tzinfo=UTC)
    day = 86_400_000
    today = int(now.timestamp() * 1000)

    def lengths(start: int | None, end: int | None) -> list[int | None]:
        whole = Selection(new_id(), [new_id()], start, end)
        return [
            None if one.start is None else (whole.end or today + day) - one.start
            for one in windows(whole, now)
        ]

    assert lengths(None, None) == [day, 32 * day, None]
    assert lengths(today - 3 * day, today) == [day, 3 * day]
    assert lengths(today - day, today) == [day]


# Live tails


class Watcher:
    """Reads a stream; `events` are those that have come."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.events: list[StoredEvent] = []
        self.skipped = 0

    async def next(self) -> TailEventsResponse:
        async with asyncio.timeout(PATIENCE):
            response = await self._call.read()
            if response is grpc.aio.EOF:
                raise AssertionError(f"the stream ended without a word: {await self._call.code()}")
            assert isinstance(response, TailEventsResponse)
        self.events += response.events
        self.skipped += response.skipped_count
        return response

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.events) + self.skipped < count:
                await self.next()
        assert len(self.events) + self.skipped == count

    async def ended(self) -> str:
        async with asyncio.timeout(PATIENCE):
            while not (response := await self.next()).HasField("end"):
                pass
            assert await self._call.read() is grpc.aio.EOF
        return End.Reason.Name(response.end.reason)


@asynccontextmanager
async def tailing(
    analytics: Analytics, member: Member, sources: list[Source], **request: Any
) -> AsyncIterator[Watcher]:
    message = ParseDict(
        {"sourceIds": [source.source_id for source in sources], **request}, TailEventsRequest()
    )
    call = analytics.events.TailEvents(message, metadata=member.metadata)
    try:
        yield Watcher(call)
    finally:
        call.cancel()


async def test_a_tail_shows_each_event_that_arrives_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    (source, key), (other, other_key) = await analytics.source(member), await analytics.source(member)
    await analytics.send(key, [{"insertId": "before"}])
    await analytics.until_count(member, source, 1)
    async with tailing(analytics, member, [source, other]) as tail:
        assert (await tail.next()).HasField("heartbeat")
        for number in range(6):
            await analytics.send(key, [{"insertId": f"{number}", "time": "2001-01-01T00:00:00Z"}])
            await analytics.send(other_key, [{"insertId": f"other {number}"}])
        await tail.until(12)
        assert tail.skipped == 0
        ids = [event.insert_id for event in tail.events]
        assert sorted(ids) == sorted([f"{i}" for i in range(6)] + [f"other {i}" for i in range(6)])
        of_source = [event.insert_id for event in tail.events if event.source_id == source.source_id]
        assert of_source == [f"{i}" for i in range(6)], "in the order of arrival"
        assert not (await tail.next()).events


async def test_a_tail_filters(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    filters = [{"property": "properties.n", "operator": "GREATER", "values": [1]}]
    async with tailing(
        analytics, member, [source], events=["buy"], distinctId="ada", filters=filters
    ) as tail:
        await tail.next()
        await analytics.send(
            key,
            [
                {"event": "buy", "properties": {"n": 1}},
                {"event": "view", "properties": {"n": 2}},
                {"event": "buy", "distinctId": "bob", "properties": {"n": 3}},
                {"event": "buy", "properties": {"n": 4}},
            ],
        )
        await tail.until(1)
    assert [event.properties["n"] for event in tail.events] == [4]


async def test_a_tail_tells_how_many_it_leaves_out(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    async with tailing(analytics, member, [source]) as tail:
        await tail.next()
        await analytics.send(key, [{"insertId": str(i)} for i in range(250)])
        await tail.until(250)
    assert tail.skipped == 150
    assert [event.insert_id for event in tail.events] == [str(i) for i in range(150, 250)]


async def test_a_slow_reader_gets_the_latest_only(analytics: Analytics) -> None:
    """What is not read is not kept: megabytes later the stream goes on with the newest events."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    large = {"text": "x" * 30_000}
    sent = 0
    async with tailing(analytics, member, [source]) as tail:
        await tail.next()
        for _ in range(12):
            await analytics.send(key, [{"properties": large} for _ in range(60)])
            sent += 60
            await analytics.until_count(member, source, sent)
        await analytics.send(key, [{"insertId": "last"}])
        await tail.until(sent + 1)
    assert tail.events[-1].insert_id == "last"
    assert tail.skipped > 0


async def test_a_tail_ends_with_its_reason(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    admin = analytics.identity.member("admin", member.workspace_id)
    reader = analytics.identity.member("viewer", member.workspace_id)
    source, _ = await analytics.source(member)
    async with tailing(analytics, reader, [source]) as tail, tailing(analytics, member, [source]) as other:
        await tail.next()
        await other.next()
        reader.sign_out()
        assert await tail.ended() == "SESSION_REVOKED"
        request = DeleteSourceRequest(source_id=source.source_id)
        await analytics.sources.DeleteSource(request, metadata=admin.metadata)
        assert await other.ended() == "ACCESS_LOST"


@pytest.mark.parametrize(("seconds", "draining", "reason"), [(0.0, False, "RENEW"), (60.0, True, "DRAINING")])
async def test_a_tail_ends_when_its_time_or_the_service_does(
    analytics: Analytics, seconds: float, draining: bool, reason: str
) -> None:
    queries = Queries(analytics.db, analytics.store, lambda: datetime.now(UTC))

    async def allowed() -> None:
        pass

    with Tails(queries, per_workspace=1, at_most=1).open(new_id(), TailEventsRequest()) as tail:
        sent = [one async for one in stream(tail, Span(15, seconds), Rechecks(allowed), lambda: draining)]
    assert [End.Reason.Name(one.end.reason) for one in sent] == [reason]


async def test_tails_of_a_workspace_are_limited(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    tails = [tailing(analytics, member, [source]) for _ in range(6)]
    for number, opening in enumerate(tails):
        tail = await opening.__aenter__()
        if number < 5:
            assert (await tail.next()).HasField("heartbeat")
        else:
            assert await refusal(tail.next()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TAILS_EXHAUSTED")
    for opening in tails:
        await opening.__aexit__(None, None, None)


async def test_a_visit_cannot_be_tailed(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    filters = [{"property": "visit_id", "operator": "EXISTS"}]
    async with tailing(analytics, member, [source], filters=filters) as tail:
        assert await refusal(tail.next()) == (grpc.StatusCode.INVALID_ARGUMENT, "QUERY_INVALID")


async def test_a_tail_finds_what_it_was_not_told_of(analytics: Analytics) -> None:
    """Ticks are not stored: after a lost connection the tail looks for itself; after a replaced log it begins anew."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    queries = Queries(analytics.db, analytics.store, lambda: datetime.now(UTC))
    deaf = Tails(queries, per_workspace=1, at_most=1)
    with deaf.open(member.workspace_id, TailEventsRequest(source_ids=[source.source_id])) as tail:
        await tail.start()
        await analytics.send(key, [{"insertId": "missed"}])
        await analytics.until_count(member, source, 1)
        assert not tail.behind
        tail.miss()
        assert tail.behind
        news = await tail.read()
        assert news is not None
        assert [event.insert_id for event in news.events] == ["missed"]
        assert not tail.behind
        assert await tail.read() is None
        sequence = tail.since
        tail.since = tail.until = 10 * sequence
        tail.tick(sequence)
        news = await tail.read()
        assert news is not None
        assert [event.insert_id for event in news.events] == ["missed"]
        assert tail.since == sequence
