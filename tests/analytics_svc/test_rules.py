"""What a source takes, samples and hides: judged while the sender waits, and never written to a disk."""

from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import GetSourceRequest, UpdateSourceRequest

from services.analytics_svc.completion import Receipt, completed
from services.analytics_svc.event_log import STREAM
from services.analytics_svc.glance import glance
from services.analytics_svc.ingest import judge
from services.analytics_svc.rules import Rulebook, Rules
from services.analytics_svc.user_agents import AgentFields
from tests.analytics_svc.conftest import Analytics
from tests.harness import Member, new_id, reason_of, refused

KEY = b"k" * 32
ROBOT = "Googlebot/2.1 (+http://www.google.com/bot.html)"
PERSON = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"


def rules(**fields: Any) -> Rules:
    source = ParseDict({"sourceId": new_id(), **fields}, Source())
    found = Rulebook(KEY).rules_of(source)
    assert found is not None
    return found


def event(**fields: Any) -> Event:
    return ParseDict({"event": "view", "distinctId": "ada", **fields}, Event())


def redacted(found: Rules, **fields: Any) -> dict[str, Any]:
    one = event(**fields)
    found.redact(one)
    return MessageToDict(one)


async def update(analytics: Analytics, member: Member, source: Source, **fields: Any) -> Source:
    request = UpdateSourceRequest(update_mask=FieldMask(paths=["*"]))
    current = await analytics.sources.GetSource(
        GetSourceRequest(source_id=source.source_id), metadata=member.metadata
    )
    request.source.CopyFrom(current.source)
    ParseDict(fields, request.source)
    response = await analytics.sources.UpdateSource(request, metadata=member.metadata)
    changed: Source = response.source
    return changed


EVERYTHING: dict[str, Any] = {
    "title": "Shop",
    "allowedOrigins": ["https://shop.example"],
    "allowedEvents": ["view", "buy"],
    "propertyTypes": [{"name": "amount", "type": "NUMBER"}],
    "redactedProperties": ["email"],
    "redactedPatterns": [{"known": "EMAIL"}, {"regex": r"ticket-\d+"}],
    "sampleRate": 0.5,
    "robots": "DROP",
    "retentionDays": 30,
    "eventsPerDay": "1000",
    "eventsPerMonth": "10000",
}


# Settings


async def test_a_source_keeps_what_it_is_told_and_can_forget_it(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    changed = await update(analytics, member, source, **EVERYTHING)
    found = await analytics.sources.GetSource(
        GetSourceRequest(source_id=source.source_id), metadata=member.metadata
    )
    assert found.source == changed
    assert {name: MessageToDict(changed)[name] for name in EVERYTHING} == EVERYTHING
    request = UpdateSourceRequest(
        source=Source(source_id=source.source_id, title="Shop"), update_mask=FieldMask(paths=["*"])
    )
    bare = (await analytics.sources.UpdateSource(request, metadata=member.metadata)).source
    assert not set(EVERYTHING) - {"title"} & set(MessageToDict(bare))


@pytest.mark.parametrize(
    ("fields", "reason", "where"),
    [
        ({"redactedPatterns": [{"known": "EMAIL"}, {"regex": "("}]}, "REDACTED_PATTERN_INVALID", "[1].regex"),
        ({"redactedPatterns": [{"regex": "a*"}]}, "REDACTED_PATTERN_INVALID", "[0].regex"),
        ({"redactedPatterns": [{}]}, "VALIDATION_FAILED", ""),
        ({"redactedPatterns": [{"regex": "x" * 501}]}, "VALIDATION_FAILED", ""),
        ({"redactedPatterns": [{"known": "EMAIL"}] * 21}, "VALIDATION_FAILED", ""),
        ({"propertyTypes": [{"name": "a", "type": "NUMBER"}] * 2}, "VALIDATION_FAILED", "property_types"),
        ({"propertyTypes": [{"name": "a"}]}, "VALIDATION_FAILED", ""),
        ({"sampleRate": 1.1}, "VALIDATION_FAILED", ""),
        ({"sampleRate": "NaN"}, "VALIDATION_FAILED", ""),
        ({"retentionDays": -1}, "VALIDATION_FAILED", ""),
        ({"eventsPerDay": -1}, "VALIDATION_FAILED", ""),
        ({"allowedEvents": ["a", "a"]}, "VALIDATION_FAILED", ""),
        ({"robots": 9}, "VALIDATION_FAILED", ""),
    ],
)
async def test_refuses_what_cannot_be_meant(
    analytics: Analytics, fields: dict[str, Any], reason: str, where: str
) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    request = UpdateSourceRequest(source=ParseDict({"sourceId": source.source_id, **fields}, Source()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await analytics.sources.UpdateSource(request, metadata=member.metadata)
    assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert where in str(caught.value.trailing_metadata())


# Events and types


async def test_refuses_events_and_types_one_by_one(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await update(
        analytics,
        member,
        source,
        allowedEvents=["view"],
        propertyTypes=[{"name": "amount", "type": "NUMBER"}, {"name": "tags", "type": "LIST"}],
    )
    answer = await analytics.send(
        key,
        [
            {"properties": {"amount": 1, "tags": ["a"], "other": True}},
            {"event": "spam"},
            {"properties": {"amount": "1"}},
            {"properties": {"amount": None}},
            {"properties": {"tags": {"a": 1}}},
        ],
    )
    assert (answer.accepted_count, answer.dropped_count) == (2, 0)
    assert [(one.index, one.reason) for one in answer.refused] == [
        (1, "EVENT_NOT_ALLOWED"),
        (2, "PROPERTY_TYPE_WRONG"),
        (4, "PROPERTY_TYPE_WRONG"),
    ]
    assert answer.refused[1].message == "properties.amount: must be NUMBER"
    await analytics.until_count(member, source, 2)


@pytest.mark.parametrize(
    ("wanted", "good"),
    [("STRING", "x"), ("NUMBER", 1.5), ("BOOLEAN", False), ("LIST", []), ("OBJECT", {})],
)
def test_each_type_is_only_itself(wanted: str, good: object) -> None:
    found = rules(propertyTypes=[{"name": "p", "type": wanted}])
    values: list[object] = ["x", 1.5, False, [], {}]
    for value in values:
        refusal = found.refusal_of(event(properties={"p": value}))
        assert (refusal is None) is (value == good and type(value) is type(good))


# Samples


def test_a_sample_is_of_people_and_part_of_a_larger_one() -> None:
    source_id = new_id()
    people = [f"person {number}" for number in range(4000)]
    samples = []
    for rate in (0.1, 0.5, 0.9):
        found = rules(sourceId=source_id, sampleRate=rate)
        samples.append({one for one in people if found.keeps(one)})
        assert abs(len(samples[-1]) / len(people) - rate) < 0.04
    assert samples[0] < samples[1] < samples[2]
    other = rules(sampleRate=0.5)
    assert {one for one in people if other.keeps(one)} != samples[1]


async def test_who_is_not_in_the_sample_is_left_out(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    changed = await update(analytics, member, source, sampleRate=0.5)
    found = analytics.ingester.rulebook.rules_of(changed)
    assert found is not None
    people = [f"person {number}" for number in range(100)]
    kept = {one for one in people if found.keeps(one)}
    events = [{"distinctId": one} for one in people for _ in range(2)]
    answer = await analytics.send(key, [*events, {"event": ""}])
    assert answer.accepted_count == 2 * len(kept)
    assert answer.dropped_count == 200 - 2 * len(kept)
    assert [one.index for one in answer.refused] == [200]
    await analytics.until_count(member, source, answer.accepted_count)
    result = await analytics.ask(member, source, breakdowns=[{"property": "distinct_id"}])
    assert {row[0] for row in result["rows"]} == kept


# Redaction


def test_hides_properties_by_name_wherever_they_are() -> None:
    found = rules(redactedProperties=["Email", "token"])
    assert redacted(
        found,
        url="https://x.example/?email=a&page=1&user[email]=b&EMAIL=c&a%65mail=d#token=e",
        referrer="https://x.example/?%65mail=a",
        properties={
            "email": "a",
            "EMAIL": "a",
            "user.email": "a",
            "emails": "kept",
            "user": {"email": "a", "name": "kept", "list": [{"token": "a", "n": 1}]},
        },
    ) == {
        "event": "view",
        "distinctId": "ada",
        "url": "https://x.example/?email=[redacted]&page=1&user[email]=[redacted]&EMAIL=[redacted]&a%65mail=d"
        "#token=[redacted]",
        "referrer": "https://x.example/?%65mail=[redacted]",
        "properties": {"emails": "kept", "user": {"name": "kept", "list": [{"n": 1.0}]}},
    }


def test_hides_patterns_wherever_they_are() -> None:
    found = rules(redactedPatterns=[{"known": "EMAIL"}, {"known": "PAYMENT_CARD"}])
    assert redacted(
        found,
        event="mail to a@b.example",
        url="https://x.example/?m=a%40b.example",
        referrer="https://x.example/a@b.example",
        userAgent="me (a@b.example)",
        properties={
            "text": "ask a@b.example",
            "number": 4111111111111111,
            "other": 17.5,
            "a@b.example": 1,
            "yes": True,
            "deep": {"list": ["a@b.example", 4111111111111111, {"a@b.example": 1, "n": 2}]},
        },
    ) == {
        "event": "mail to [redacted]",
        "distinctId": "ada",
        "url": "https://x.example/?m=[redacted]",
        "referrer": "https://x.example/[redacted]",
        "userAgent": "me ([redacted])",
        "properties": {
            "text": "ask [redacted]",
            "other": 17.5,
            "yes": True,
            "deep": {"list": ["[redacted]", {"n": 2.0}]},
        },
    }


SECRETS = {
    "ada.l@mail.example": "ada.l",
    "4111 1111 1111 1111": "4111",
    "192.0.2.77": "192.0.2",
    "+49 30 9876543": "9876543",
    "DE89 3704 0044 0532 0130 00": "0532",
    "ticket-7777": "7777",
}
FIELDS = ("event", "distinctId", "insertId", "previousId", "url", "referrer")
marks = ["", " ", "?a=", "&b=", "#", "/", '"', "(", "[", "\n", "%20", "+"]


@settings(deadline=None)
@given(
    st.sampled_from(list(SECRETS)),
    st.sampled_from([*FIELDS, "text", "name", "list", "object", "deep"]),
    st.sampled_from([*marks, "x ", "é "]),
    st.sampled_from([*marks, " y", "."]),
    st.booleans(),
)
def test_no_place_is_forgotten(secret: str, place: str, before: str, behind: str, encoded: bool) -> None:
    """Wherever it stands, nothing of it is in what is logged."""
    text = before + (quote(secret) if encoded else secret) + behind
    properties: dict[str, Any] = {
        "text": {"p": text},
        "name": {text: 1},
        "list": {"p": [1, text]},
        "object": {"p": {"q": text}},
        "deep": {"p": [{text: [{"q": [text]}]}]},
    }
    found = rules(
        redactedPatterns=[*({"known": known} for known in range(1, 6)), {"regex": r"(?i)ticket-\d+"}]
    )
    # With an id of its own: one that is made has digits by chance.
    fields = {"insertId": "one", **({place: text} if place in FIELDS else {"properties": properties[place]})}
    request = IngestRequest(events=[event(**fields)])
    assert judge(request, 1_700_000_000, found) == ([], 0)
    receipt = Receipt(Timestamp(seconds=1_700_000_000))
    logged = completed(request, glance(request.SerializeToString()), Source(), receipt, AgentFields())
    assert SECRETS[secret].encode() not in logged


def test_a_version_is_no_address() -> None:
    found = rules(redactedPatterns=[{"known": "IP_ADDRESS"}])
    agent = "Mozilla/5.0 Chrome/126.0.0.0 Safari/537.36"
    result = redacted(found, userAgent=agent, properties={"from": "192.0.2.7"})
    assert (result["userAgent"], result["properties"]) == (agent, {"from": "[redacted]"})


def test_a_person_stays_one_under_a_pseudonym() -> None:
    source_id = new_id()
    found = rules(sourceId=source_id, redactedPatterns=[{"known": "EMAIL"}])
    first = redacted(found, distinctId="a@b.example", previousId="anon", insertId="a@b.example 1")
    second = redacted(found, distinctId="anon", previousId="a@b.example", insertId="a@b.example 2")
    assert first["distinctId"] == second["previousId"]
    assert first["distinctId"].startswith("redacted-")
    assert (first["previousId"], second["distinctId"]) == ("anon", "anon")
    assert first["insertId"] != second["insertId"]
    elsewhere = rules(redactedPatterns=[{"known": "EMAIL"}])
    assert redacted(elsewhere, distinctId="a@b.example")["distinctId"] != first["distinctId"]
    source = ParseDict({"sourceId": source_id, "redactedPatterns": [{"known": "EMAIL"}]}, Source())
    assert redacted(Rules(source, b"j" * 32), distinctId="a@b.example")["distinctId"] != first["distinctId"]


async def test_what_is_hidden_reaches_neither_log_nor_store(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await update(
        analytics,
        member,
        source,
        redactedPatterns=[{"known": "EMAIL"}],
        redactedProperties=["password"],
        allowedEvents=["view", "mail secret@mail.example"],
    )
    answer = await analytics.send(
        key,
        [
            {"distinctId": "secret@mail.example", "ip": "203.0.113.77"},
            {"event": "mail secret@mail.example", "url": "https://x.example/?m=secret%40mail.example"},
            {
                "properties": {
                    "password": "secret",
                    "user": {"password": "secret", "mail": "secret@mail.example"},
                }
            },
            {"insertId": "secret@mail.example", "previousId": "secret@mail.example"},
        ],
    )
    assert answer.accepted_count == 4
    logged = await analytics.bus.last(STREAM, f"events.{source.workspace_id}.{source.source_id}")
    assert logged is not None
    assert len(LoggedBatch.FromString(logged.payload).events) == 4
    assert b"secret" not in logged.payload
    assert b"203.0.113.77" not in logged.payload
    await analytics.until_count(member, source, 4)
    user = await analytics.ask(member, source, breakdowns=[{"property": "properties.user"}])
    assert '{"mail":"[redacted]"}' in [row[0] for row in user["rows"]]


async def test_rules_hold_for_what_comes_after_them(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    assert (await analytics.send(key, [{"event": "a"}])).accepted_count == 1
    await update(analytics, member, source, allowedEvents=["b"])
    assert (await analytics.send(key, [{"event": "a"}])).refused[0].reason == "EVENT_NOT_ALLOWED"
    await update(analytics, member, source, allowedEvents=["a"])
    assert (await analytics.send(key, [{"event": "a"}])).accepted_count == 1


def test_an_event_that_is_refused_takes_no_place() -> None:
    """What is gone from the request are those that are refused and those that are not in the sample, and no others."""
    found = rules(sampleRate=0.5, allowedEvents=["view"])
    request = IngestRequest()
    for number in range(200):
        request.events.append(event(distinctId=str(number), event="view" if number % 3 else "other"))
    kept = [str(n) for n in range(200) if n % 3 and found.keeps(str(n))]
    refused_ones, dropped = judge(request, 1_700_000_000, found)
    assert [one.distinct_id for one in request.events] == kept
    assert [one.index for one in refused_ones] == list(range(0, 200, 3))
    assert len(kept) + dropped + len(refused_ones) == 200


def test_a_source_without_rules_costs_nothing() -> None:
    book = Rulebook(KEY)
    assert book.rules_of(Source(source_id="s", etag="1", sample_rate=1, robots=Source.DROP)) is None
    assert book.rules_of(Source(source_id="s", etag="2", allowed_events=["a"])) is not None
    assert book.rules_of(Source(source_id="s", etag="3")) is None


# Robots


@pytest.mark.parametrize(
    ("robots", "rows"),
    [
        ("ROBOTS_UNSPECIFIED", [["false", 2], ["true", 1]]),
        ("KEEP", [["false", 3]]),
        ("MARK", [["false", 2], ["true", 1]]),
        ("DROP", [["false", 2]]),
    ],
)
async def test_robots_are_kept_marked_or_dropped(
    analytics: Analytics, robots: str, rows: list[list[Any]]
) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await update(analytics, member, source, robots=robots)
    answer = await analytics.send(key, [{"userAgent": ROBOT}, {"userAgent": PERSON}, {}])
    assert (answer.accepted_count, answer.dropped_count) == (3, 0)
    await analytics.send(key, [{"event": "last"}])
    await analytics.until_count(member, source, sum(row[1] for row in rows) + 1)
    views = [{"property": "event", "values": ["view"]}]
    result = await analytics.ask(member, source, breakdowns=[{"property": "is_robot"}], filters=views)
    assert sorted(result["rows"]) == rows


async def test_what_a_source_says_of_robots_holds_for_events_of_then(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await update(analytics, member, source, robots="DROP")
    await analytics.send(key, [{"userAgent": ROBOT}])
    await update(analytics, member, source, robots="MARK")
    await analytics.send(key, [{"userAgent": ROBOT}])
    await analytics.until_count(member, source, 1)


async def test_viewers_change_nothing(analytics: Analytics) -> None:
    editor = analytics.identity.member("editor")
    source, _ = await analytics.source(editor)
    viewer = analytics.identity.member("viewer", editor.workspace_id)
    request = UpdateSourceRequest(source=Source(source_id=source.source_id, retention_days=1))
    call = analytics.sources.UpdateSource(request, metadata=viewer.metadata)
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
