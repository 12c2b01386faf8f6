"""What is taken, what is refused, and what becomes of it in the store."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest

from services.analytics_svc.ingest import refusal_of
from services.analytics_svc.write_keys import HEADER
from tests.analytics_svc.conftest import Analytics
from tests.harness import reason_of

NOW_SECONDS = 1_800_000_000
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:120.0) Gecko/20100101 Firefox/120.0"
GOOGLEBOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"


async def test_counts_what_it_accepts(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    response = await analytics.send(key, [{"distinctId": name} for name in ("ada", "grace", "ada")])
    assert (response.accepted_count, len(response.refused)) == (3, 0)
    await analytics.until_count(member, source, 3)
    result = await analytics.ask(member, source, measures=[{"aggregation": "UNIQUE"}])
    assert result["rows"] == [[2.0]]
    assert int(result["watermark"]) > 0


async def test_takes_the_key_in_the_body_as_well(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    request = IngestRequest(write_key=key, events=[Event(event="view", distinct_id="ada")])
    assert (await analytics.ingest.Ingest(request)).accepted_count == 1


@pytest.mark.parametrize("key", ["", "mbw_wrong"])
async def test_refuses_an_unknown_key(analytics: Analytics, key: str) -> None:
    request = IngestRequest(events=[Event(event="view", distinct_id="ada")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await analytics.ingest.Ingest(request, metadata=((HEADER, key),))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(caught.value) == "WRITE_KEY_INVALID"


async def test_keeps_the_good_neighbours_of_refused_events(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    events: list[dict[str, Any]] = [{}, {"event": ""}, {}, {"distinctId": "x" * 201}, {}]
    response = await analytics.send(key, events)
    assert [(r.index, r.reason) for r in response.refused] == [
        (1, "EVENT_NAME_INVALID"),
        (3, "DISTINCT_ID_INVALID"),
    ]
    assert response.accepted_count == 3
    await analytics.until_count(member, source, 3)


async def test_counts_an_event_that_is_sent_again_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    events = [{"insertId": f"order {n}"} for n in range(50)]
    for batch in (events, [*events, *events], [*events[:10], {"insertId": "another"}]):
        await analytics.send(key, batch)
    await analytics.until_count(member, source, 51)
    other, other_key = await analytics.source(member)
    await analytics.send(other_key, events)  # an insert_id is of one source only
    await analytics.until_count(member, other, 50)
    await analytics.send(key, [*events, {}])
    await analytics.until_count(member, source, 52)


async def test_counts_equal_events_without_insert_id_each(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{"time": "2015-05-19T19:00:00Z"}] * 19)
    await analytics.until_count(member, source, 19)


async def test_requests_at_once_share_publishes_and_lose_nothing(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    before = (await analytics.bus.state("EVENTS")).last
    answers = await asyncio.gather(*[analytics.send(key, [{}, {"event": ""}, {}]) for _ in range(200)])
    assert [a.accepted_count for a in answers] == [2] * 200
    after = (await analytics.bus.state("EVENTS")).last
    assert after - before < 200
    await analytics.until_count(member, source, 400)


async def test_finds_out_what_urls_and_user_agents_tell(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(
        key,
        [
            {
                "url": "https://Shop.example/a%20b/c?utm_source=news+letter&utm_medium=e%2Dmail#x",
                "referrer": "https://www.Search.example/?q=1",
                "userAgent": FIREFOX,
            },
            {"url": "/relative/path?x=1", "userAgent": GOOGLEBOT},
        ],
    )
    await analytics.until_count(member, source, 2)
    names = ["path", "host", "referrer_host", "browser", "os", "is_robot", "utm_source", "utm_medium"]
    result = await analytics.ask(
        member, source, breakdowns=[{"property": n} for n in names[:5]], orderBy=[{"column": "path"}]
    )
    rest = await analytics.ask(
        member, source, breakdowns=[{"property": n} for n in names[5:]], orderBy=[{"column": "is_robot"}]
    )
    assert [row[:-1] for row in result["rows"]] == [
        ["/a%20b/c", "shop.example", "www.search.example", "Firefox", "Linux"],
        ["/relative/path", "", "", "Googlebot", ""],
    ]
    assert [row[:-1] for row in rest["rows"]] == [["false", "news letter", "e-mail"], ["true", "", ""]]


async def test_keeps_properties_of_every_kind(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    properties = {
        "n": 1.5,
        "zero": 0,
        "t": "x",
        "yes": True,
        "no": False,
        "nil": None,
        "l": [1, "a"],
        "o": {"b": {"c": 2}},
    }
    await analytics.send(key, [{"properties": properties}])
    await analytics.until_count(member, source, 1)

    async def value(name: str) -> str:
        result = await analytics.ask(member, source, breakdowns=[{"property": f"properties.{name}"}])
        text: str = result["rows"][0][0]
        return text

    assert [await value(name) for name in properties] == [
        "1.5",
        "0",
        "x",
        "true",
        "false",
        "",
        '[1,"a"]',
        '{"b":{"c":2}}',
    ]
    exists = [
        {"property": "properties.nil", "alias": "nil"},
        {"property": "properties.zero", "alias": "zero"},
        {"aggregation": "MINIMUM", "property": "properties.zero", "alias": "least"},
        {"aggregation": "SUM", "property": "properties.t", "alias": "text"},
    ]
    assert (await analytics.ask(member, source, measures=exists))["rows"] == [[0.0, 1.0, 0.0, None]]


async def test_an_application_cannot_write_what_is_not_its_own(analytics: Analytics) -> None:
    member, victim = analytics.identity.member("editor"), analytics.identity.member("editor")
    source, key = await analytics.source(member)
    target, _ = await analytics.source(victim)
    # In the log these are the fields for workspace, source, browser and country; an IngestRequest does not know them.
    smuggled = LoggedBatch(
        workspace_id=target.workspace_id,
        source_id=target.source_id,
        events=[LoggedEvent(event="view", distinct_id="ada", browser="Smuggler", country="XX")],
    )
    request = IngestRequest.FromString(smuggled.SerializeToString())
    await analytics.ingest.Ingest(request, metadata=((HEADER, key),))
    await analytics.until_count(member, source, 1)
    assert await analytics.count(victim, target) == 0
    result = await analytics.ask(
        member, source, breakdowns=[{"property": "browser"}, {"property": "country"}]
    )
    assert result["rows"] == [["", "", 1.0]]


def _event(**fields: Any) -> Event:
    return Event(**{"event": "view", "distinct_id": "ada", **fields})


def _with_properties(**properties: Any) -> Event:
    event = _event()
    event.properties.update(properties)
    return event


GOOD = {
    "plain": _event(),
    "longest": _event(event="e" * 200, distinct_id="d" * 200, insert_id="i" * 200, url="u" * 4096),
    "begin of 1970": _event(time=Timestamp(seconds=0)),
    "a day ahead": _event(time=Timestamp(seconds=NOW_SECONDS + 86_400)),
    "200 properties": _with_properties(**{f"p{i}": i for i in range(200)}),
}
BAD = {
    "EVENT_NAME_INVALID": [_event(event=""), _event(event="e" * 201)],
    "DISTINCT_ID_INVALID": [_event(distinct_id=""), _event(distinct_id="d" * 201)],
    "INSERT_ID_INVALID": [_event(insert_id="i" * 201)],
    "TIME_INVALID": [
        _event(time=Timestamp(seconds=-1)),
        _event(time=Timestamp(seconds=NOW_SECONDS + 86_401)),
        _event(time=Timestamp(seconds=5, nanos=2_000_000_000)),
    ],
    "CONTEXT_INVALID": [_event(url="u" * 4097), _event(referrer="r" * 4097), _event(user_agent="a" * 2049)],
    "PROPERTIES_INVALID": [
        _with_properties(**{f"p{i}": i for i in range(201)}),
        _with_properties(**{"n" * 201: 1}),
        _with_properties(**{"": 1}),
        _with_properties(text="x" * 65_536),
        _with_properties(number=float("nan")),
        _with_properties(number=float("inf")),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_accepts(name: str) -> None:
    assert refusal_of(GOOD[name], NOW_SECONDS) is None


@pytest.mark.parametrize(
    ("reason", "number"), [(r, n) for r, events in BAD.items() for n in range(len(events))]
)
def test_refuses(reason: str, number: int) -> None:
    refusal = refusal_of(BAD[reason][number], NOW_SECONDS)
    assert refusal is not None
    assert refusal[0] == reason


async def test_needs_an_event(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await analytics.ingest.Ingest(IngestRequest(), metadata=((HEADER, key),))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
