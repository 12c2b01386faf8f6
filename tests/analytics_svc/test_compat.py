"""Messages in Segment's shape, and the events that they become."""

import base64
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.compat_service_pb2 import (
    CompatMessage,
    SendAliasRequest,
    SendBatchRequest,
    SendBatchResponse,
    SendGroupRequest,
    SendIdentifyRequest,
    SendPageRequest,
    SendScreenRequest,
    SendTrackRequest,
)

from services.analytics_svc.compat import MessageRefusedError, event_of
from tests.analytics_svc.conftest import Analytics
from tests.harness import refused

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:120.0) Gecko/20100101 Firefox/120.0"


def basic(key: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller with basic authentication."""
    return (("authorization", "Basic " + base64.b64encode(f"{key}:".encode()).decode()),)


async def send(analytics: Analytics, key: str, **body: Any) -> SendBatchResponse:
    request = ParseDict(body, SendBatchRequest(), ignore_unknown_fields=True)
    response: SendBatchResponse = await analytics.compat.SendBatch(request, metadata=basic(key))
    return response


def event(**message: Any) -> Any:
    parsed = ParseDict({"type": "track", "event": "e", "userId": "ada", **message}, CompatMessage())
    return event_of(parsed, parsed.type, Value())


async def test_messages_of_each_type_become_events(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    answer = await send(
        analytics,
        key,
        sentAt="2026-01-01T00:00:00Z",
        batch=[
            {"type": "track", "event": "Bought", "userId": "ada", "properties": {"price": 3.5}},
            {"type": "identify", "userId": "ada", "anonymousId": "a1", "traits": {"plan": "pro"}},
            {"type": "page", "userId": "ada", "name": "Home", "properties": {"url": "https://x.example/h"}},
            {"type": "screen", "userId": "ada", "name": "Start", "category": "Main"},
            {"type": "group", "userId": "ada", "groupId": 7, "traits": {"seats": 5}},
            {"type": "alias", "userId": "ada", "previousId": "a0"},
        ],
    )
    assert (answer.success, answer.accepted_count, list(answer.refused)) == (True, 6, [])
    await analytics.until_count(member, source, 6)
    rows = (
        await analytics.ask(
            member,
            source,
            breakdowns=[
                {"property": name}
                for name in ("event", "distinct_id", "path", "properties.name", "properties.group_id")
            ],
            orderBy=[{"column": "event"}],
        )
    )["rows"]
    assert [row[:-1] for row in rows] == [
        ["Bought", "ada", "", "", ""],
        ["alias", "ada", "", "", ""],
        ["group", "ada", "", "", "7"],
        ["identify", "ada", "", "", ""],
        ["page", "ada", "/h", "Home", ""],
        ["screen", "ada", "", "Start", ""],
    ]


async def test_messages_come_alone_too(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    message = ParseDict({"event": "e", "anonymousId": "a", "userId": None, "writeKey": key}, CompatMessage())
    stub = analytics.compat
    assert (await stub.SendTrack(SendTrackRequest(message=message))).success
    assert (await stub.SendIdentify(SendIdentifyRequest(message=message))).success
    assert (await stub.SendPage(SendPageRequest(message=message))).success
    assert (await stub.SendScreen(SendScreenRequest(message=message))).success
    assert (await stub.SendGroup(SendGroupRequest(message=message))).success
    assert (await stub.SendAlias(SendAliasRequest(message=message), metadata=basic(key))).success is True
    await analytics.until_count(member, source, 6)


async def test_a_batch_keeps_the_good_neighbours_of_refused_messages(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    answer = await send(
        analytics,
        key,
        batch=[
            {"type": "nothing", "userId": "ada"},
            {"type": "track", "event": "e", "userId": "ada"},
            {"type": "track", "event": "", "userId": "ada"},
            {"type": "track", "event": "e"},
            {"type": "track", "event": "e", "userId": {"a": 1}},
            {"type": "track", "event": "e", "userId": "ada", "timestamp": "yesterday"},
            {"type": "track", "event": "e", "userId": "ada", "properties": [1]},
            {"type": "track", "event": "e", "userId": "ada"},
        ],
    )
    assert (answer.success, answer.accepted_count) == (False, 2)
    assert [(r.index, r.reason) for r in answer.refused] == [
        (0, "MESSAGE_TYPE_UNKNOWN"),
        (2, "EVENT_NAME_INVALID"),
        (3, "DISTINCT_ID_INVALID"),
        (4, "MESSAGE_INVALID"),
        (5, "TIME_INVALID"),
        (6, "MESSAGE_INVALID"),
    ]
    await analytics.until_count(member, source, 2)


async def test_a_refused_message_alone_is_an_error(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    for message, reason in (
        (CompatMessage(event="e"), "DISTINCT_ID_INVALID"),
        (CompatMessage(event="e", user_id=Value(bool_value=True)), "MESSAGE_INVALID"),
    ):
        call = analytics.compat.SendTrack(SendTrackRequest(message=message), metadata=basic(key))
        assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    call = analytics.compat.SendTrack(SendTrackRequest(), metadata=basic(key))
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


@pytest.mark.parametrize("authorization", ["", "Basic", "Basic ???", "Basic bWJ3X3dyb25nOg==", "Bearer x"])
async def test_refuses_an_unknown_key(analytics: Analytics, authorization: str) -> None:
    request = SendBatchRequest(batch=[CompatMessage(type="track")])
    call = analytics.compat.SendBatch(request, metadata=(("authorization", authorization),))
    assert await refused(call) == (grpc.StatusCode.UNAUTHENTICATED, "WRITE_KEY_INVALID")


async def test_a_message_that_is_sent_again_counts_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    message = {"type": "track", "event": "e", "userId": "ada", "messageId": "m-1"}
    for _ in range(3):
        assert (await send(analytics, key, batch=[message])).accepted_count == 1
    await send(analytics, key, batch=[{**message, "messageId": "m-2"}])
    await analytics.until_count(member, source, 2)


def test_ids_of_people() -> None:
    assert event(anonymousId="a").distinct_id == "ada"
    assert event(userId=None, anonymousId="a").distinct_id == "a"
    assert event(userId="", anonymousId="a").distinct_id == "a"
    assert event(userId=17).distinct_id == "17"
    assert event(userId=1.5).distinct_id == "1.5"
    assert event(anonymousId="a").previous_id == ""


def test_identify_and_alias_link_ids() -> None:
    assert event(type="identify", anonymousId="a").previous_id == "a"
    assert event(type="identify", anonymousId="ada").previous_id == ""
    assert event(type="identify", userId=None, anonymousId="a").previous_id == ""
    assert event(type="alias", previousId=4).previous_id == "4"


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("2026-11-28T09:00:00.5Z", 1795856400.5),
        ("2026-11-28T11:00:00+02:00", 1795856400),
        ("2026-11-28T09:00:00", 1795856400),
        ("2026-11-28", 1795824000),
        (1795856400500, 1795856400.5),
    ],
)
def test_times(said: object, seconds: float) -> None:
    assert event(timestamp=said).time.ToNanoseconds() / 1e9 == seconds
    assert event(originalTimestamp=said).time.ToNanoseconds() / 1e9 == seconds


@pytest.mark.parametrize("said", ["", "now", "0001-01-01T00:00:00+14:00", 1e300, True, {}, []])
def test_no_times(said: object) -> None:
    with pytest.raises(MessageRefusedError) as caught:
        event(timestamp=said)
    assert caught.value.reason == "TIME_INVALID"


def test_what_surrounds_a_message() -> None:
    made = event(
        context={
            "ip": "192.0.2.1",
            "userAgent": FIREFOX,
            "page": {"url": "https://x.example/", "referrer": "https://y.example/", "title": "X"},
            "os": {"name": "Linux"},
            "locale": "de",
            "traits": {"email": "ada@example.org"},
            "deep": {"er": {"est": 1}},
        }
    )
    assert (made.ip, made.user_agent) == ("192.0.2.1", FIREFOX)
    assert (made.url, made.referrer) == ("https://x.example/", "https://y.example/")
    assert dict(made.properties) == {
        "context.page.title": "X",
        "context.os.name": "Linux",
        "context.locale": "de",
    }
    assert len(event(context={f"n{i}": i for i in range(300)}).properties.fields) == 100


def test_a_batch_can_say_what_surrounds_all() -> None:
    default = ParseDict({"ip": "192.0.2.1"}, Value())
    message = CompatMessage(type="track", event="e")
    assert event_of(message, "track", default).ip == "192.0.2.1"
