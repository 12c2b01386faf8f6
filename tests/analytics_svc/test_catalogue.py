"""CatalogueService on the real store: what is known of names, and what people say about them."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from meshboard.analytics.v1.catalogue_pb2 import CatalogueEvent, CatalogueProperty
from meshboard.analytics.v1.catalogue_service_pb2 import (
    GetCatalogueEventRequest,
    GetCataloguePropertyRequest,
    ListCatalogueEventsRequest,
    ListCataloguePropertiesRequest,
    UpdateCatalogueEventRequest,
    UpdateCataloguePropertyRequest,
)
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import DeleteSourceRequest
from sqlalchemy import func, select

from services.analytics_svc import catalogue
from services.analytics_svc.models import CatalogueEntry
from services.analytics_svc.queries import Queries
from services.analytics_svc.summaries import Summaries
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import announced, refusal
from tests.conditions import eventually
from tests.harness import Member, new_id

Made = tuple[Member, Source, str]


@pytest.fixture
async def made(analytics: Analytics) -> Made:
    """An editor with a source and its write key."""
    member = analytics.identity.member("editor")
    return member, *await analytics.source(member)


async def collect(analytics: Analytics, made: Made, events: list[dict[str, Any]]) -> None:
    member, source, key = made
    answer = await analytics.send(key, events)
    assert not answer.refused
    await analytics.until_count(member, source, len(events))


async def list_events(analytics: Analytics, made: Made, **more: Any) -> list[CatalogueEvent]:
    member, source, _ = made
    request = ListCatalogueEventsRequest(source_id=source.source_id, **more)
    return list((await analytics.catalogue.ListCatalogueEvents(request, metadata=member.metadata)).events)


async def list_properties(analytics: Analytics, made: Made, **more: Any) -> dict[str, CatalogueProperty]:
    member, source, _ = made
    request = ListCataloguePropertiesRequest(source_id=source.source_id, **more)
    answer = await analytics.catalogue.ListCatalogueProperties(request, metadata=member.metadata)
    return {one.name: one for one in answer.properties}


async def say(analytics: Analytics, made: Made, name: str, **said: Any) -> CatalogueEvent:
    member, source, _ = made
    mask = FieldMask(paths=[field for field in said if field != "etag"])
    event = CatalogueEvent(source_id=source.source_id, name=name, **said)
    request = UpdateCatalogueEventRequest(event=event, update_mask=mask)
    return (await analytics.catalogue.UpdateCatalogueEvent(request, metadata=member.metadata)).event


async def say_of_property(analytics: Analytics, made: Made, name: str, **said: Any) -> CatalogueProperty:
    member, source, _ = made
    mask = FieldMask(paths=[field for field in said if field != "etag"])
    wanted = CatalogueProperty(source_id=source.source_id, name=name, **said)
    request = UpdateCataloguePropertyRequest(property=wanted, update_mask=mask)
    return (await analytics.catalogue.UpdateCatalogueProperty(request, metadata=member.metadata)).property


async def test_tells_volume_and_when_an_event_was_seen(analytics: Analytics, made: Made) -> None:
    recent = (datetime.now(UTC) - timedelta(days=2)).replace(microsecond=0).isoformat()
    old = "2015-05-17T10:05:03.250Z"
    await collect(
        analytics,
        made,
        [
            {"event": "signed up", "time": old},
            {"event": "purchase", "time": recent},
            {"event": "purchase", "time": old},
            {"event": "purchase", "time": "2016-01-01T00:00:00Z"},
        ],
    )
    purchase, signed_up = await list_events(analytics, made)
    assert (purchase.name, purchase.count, purchase.recent_count) == ("purchase", 3, 1)
    assert purchase.first_seen_time.ToJsonString() == old
    assert purchase.last_seen_time.ToDatetime(UTC) == datetime.fromisoformat(recent)
    assert (signed_up.name, signed_up.count, signed_up.recent_count) == ("signed up", 1, 0)
    assert (signed_up.etag, signed_up.HasField("update_time")) == ("0", False)


async def test_counts_anew_when_events_arrive(analytics: Analytics, made: Made) -> None:
    member, source, key = made

    async def shown(expected: list[tuple[str, int]]) -> bool:
        return [(one.name, one.count) for one in await list_events(analytics, made)] == expected

    assert await shown([])
    for count, names in ((1, [("a", 1)]), (2, [("a", 1), ("b", 1)])):
        await analytics.send(key, [{"event": "ab"[count - 1]}])
        await analytics.until_count(member, source, count)
        # An answer that came quickly is not kept for long.
        await eventually(lambda names=names: shown(names))


@pytest.mark.parametrize(
    ("values", "kind", "numbers"),
    [
        (["pro", "free"], "STRING", 0),
        (["", "pro"], "STRING", 0),
        ([1, 2.5, -3], "NUMBER", 3),
        ([True, False], "BOOLEAN", 0),
        ([True, "yes"], "STRING", 0),
        (["2015-05-17T10:05:03Z", "2016-02-03", "2016-02-03 10:00"], "TIME", 0),
        (["2015-05-17T10:05:03Z", "soon"], "STRING", 0),
        ([["a", 1], []], "LIST", 0),
        ([{"a": {"b": 1}}], "OBJECT", 0),
        (["[not a list", "{nor this"], "STRING", 0),
        ([1, "one"], "MIXED", 1),
    ],
)
async def test_infers_types(
    analytics: Analytics, made: Made, values: list[Any], kind: str, numbers: int
) -> None:
    await collect(analytics, made, [{"properties": {"x": value}} for value in values])
    found = (await list_properties(analytics, made))["properties.x"]
    assert CatalogueProperty.Type.Name(found.type) == kind
    assert (found.count, found.number_count) == (len(values), numbers)


async def test_shows_the_most_frequent_values_of_the_last_day(analytics: Analytics, made: Made) -> None:
    plans = ["old"] * 9 + ["free"] * 3 + ["pro"] * 2 + ["x" * 300]
    times = ["2015-05-16T12:00:00Z"] * 9 + ["2015-05-17T12:00:00Z"] * 6
    await collect(
        analytics,
        made,
        [{"time": t, "properties": {"plan": p, "n": 7}} for t, p in zip(times, plans, strict=True)],
    )
    found = await list_properties(analytics, made)
    assert list(found["properties.plan"].sample_values) == ["free", "pro", "x" * 200]
    assert list(found["properties.n"].sample_values) == ["7"]
    assert found["properties.plan"].count == 15


async def test_lists_the_properties_of_one_event(analytics: Analytics, made: Made) -> None:
    await collect(
        analytics,
        made,
        [
            {"event": "purchase", "properties": {"amount": 5, "plan": "pro"}},
            {"event": "view", "properties": {"plan": 1, "page": "/"}},
            {"event": "view", "properties": {"plan": 2}},
        ],
    )
    await say_of_property(analytics, made, "properties.never", description="Not sent yet")
    assert list(await list_properties(analytics, made)) == [
        "properties.plan",
        "properties.amount",
        "properties.page",
        "properties.never",
    ]
    found = await list_properties(analytics, made, event="view")
    assert [(p.name, p.count, p.type) for p in found.values()] == [
        ("properties.plan", 2, CatalogueProperty.NUMBER),
        ("properties.page", 1, CatalogueProperty.STRING),
    ]
    assert await list_properties(analytics, made, event="nobody sends this") == {}


async def test_keeps_what_people_say(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    await collect(analytics, made, [{"event": "purchase"}, {"event": "view"}])
    said = await say(analytics, made, "purchase", description="Someone has paid.\nTwice.", tags=["money"])
    assert said.etag != "0"
    only_tags = await say(analytics, made, "purchase", tags=["money", "funnel"], etag=said.etag)
    assert only_tags.description == said.description
    request = GetCatalogueEventRequest(source_id=source.source_id, name="purchase")
    found = (await analytics.catalogue.GetCatalogueEvent(request, metadata=member.metadata)).event
    assert (found.description, list(found.tags), found.count) == (said.description, ["money", "funnel"], 1)
    assert found.etag == only_tags.etag
    assert found.HasField("update_time")
    names = [one.name for one in await list_events(analytics, made, tag="funnel")]
    assert names == ["purchase"]
    assert (await announced(analytics, member.workspace_id))[1:] == ["CatalogueEventUpdated"] * 2


async def test_keeps_what_people_say_of_properties(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    await say_of_property(analytics, made, "browser", description="From the user agent", hidden=True)
    request = GetCataloguePropertyRequest(source_id=source.source_id, name="browser")
    found = await analytics.catalogue.GetCatalogueProperty(request, metadata=member.metadata)
    assert (found.property.description, found.property.hidden) == ("From the user agent", True)
    assert (await announced(analytics, member.workspace_id))[1:] == ["CataloguePropertyUpdated"]


async def test_hides(analytics: Analytics, made: Made) -> None:
    await collect(analytics, made, [{"event": "noise", "properties": {"x": 1}}, {"event": "view"}])
    await say(analytics, made, "noise", hidden=True)
    await say_of_property(analytics, made, "properties.x", hidden=True)
    assert [one.name for one in await list_events(analytics, made)] == ["view"]
    assert [one.name for one in await list_events(analytics, made, include_hidden=True)] == ["noise", "view"]
    assert await list_properties(analytics, made) == {}
    assert list(await list_properties(analytics, made, include_hidden=True)) == ["properties.x"]


async def test_searches_names_descriptions_and_tags(analytics: Analytics, made: Made) -> None:
    await collect(analytics, made, [{"event": name} for name in ("signed_up", "purchaseCompleted", "view")])
    await say(analytics, made, "view", description="Eine Seite wurde geöffnet", tags=["Navigation"])

    async def found(query: str) -> list[str]:
        return [one.name for one in await list_events(analytics, made, query=query)]

    assert await found("SIGNED") == ["signed_up"]
    assert await found("up sign") == ["signed_up"]
    assert await found("completed") == ["purchaseCompleted"]
    assert await found("seite geoff") == ["view"]
    assert await found("navig") == ["view"]
    assert await found("view purchase") == []
    for nothing in ("...", " ".join("abcdefghijklmnopqrstuvwxyz")):
        assert await refusal(found(nothing)) == (grpc.StatusCode.INVALID_ARGUMENT, "SEARCH_QUERY_INVALID")


async def test_pages_hold_every_name_once(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    await collect(analytics, made, [{"event": f"event {n % 7}"} for n in range(23)])
    await say(analytics, made, "planned", tags=["later"])
    names, token = [], ""
    while True:
        request = ListCatalogueEventsRequest(source_id=source.source_id, page_size=3, page_token=token)
        page = await analytics.catalogue.ListCatalogueEvents(request, metadata=member.metadata)
        names += [one.name for one in page.events]
        token = page.next_page_token
        if not token:
            break
    assert names == [*[f"event {n}" for n in range(7)], "planned"]
    request = ListCatalogueEventsRequest(source_id=source.source_id, page_token="forged")
    call = analytics.catalogue.ListCatalogueEvents(request, metadata=member.metadata)
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_profiles_a_property(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/115.0"
    await collect(
        analytics,
        made,
        [
            {"event": "purchase", "properties": {"plan": "pro"}, "userAgent": firefox},
            {"event": "purchase", "properties": {"plan": "pro"}},
            {"event": "view", "properties": {"plan": 3}},
            {"event": "view"},
        ],
    )

    async def profile(name: str) -> dict[str, Any]:
        request = GetCataloguePropertyRequest(source_id=source.source_id, name=name)
        answer = await analytics.catalogue.GetCatalogueProperty(request, metadata=member.metadata)
        return MessageToDict(answer)

    own = await profile("properties.plan")
    assert own["values"] == [{"value": "pro", "count": "2"}, {"value": "3", "count": "1"}]
    assert own["events"] == [{"name": "purchase", "count": "2"}, {"name": "view", "count": "1"}]
    assert (own["property"]["type"], own["property"]["count"]) == ("MIXED", "3")
    built_in = await profile("browser")
    assert built_in["values"] == [{"value": "Firefox", "count": "1"}]
    assert built_in["property"]["sampleValues"] == ["Firefox"]
    assert (await profile("is_robot"))["property"]["type"] == "BOOLEAN"
    assert (await profile("visit_id"))["property"]["count"] == "4"


async def test_unseen_and_unknown_names(analytics: Analytics, made: Made) -> None:
    member, source, _ = made

    async def event(name: str) -> Any:
        request = GetCatalogueEventRequest(source_id=source.source_id, name=name)
        return await analytics.catalogue.GetCatalogueEvent(request, metadata=member.metadata)

    async def prop(name: str) -> Any:
        request = GetCataloguePropertyRequest(source_id=source.source_id, name=name)
        return await analytics.catalogue.GetCatalogueProperty(request, metadata=member.metadata)

    absent = (grpc.StatusCode.NOT_FOUND, "CATALOGUE_NAME_NOT_FOUND")
    assert await refusal(event("never")) == absent
    assert await refusal(prop("properties.never")) == absent
    assert await refusal(prop("brwser")) == (grpc.StatusCode.INVALID_ARGUMENT, "PROPERTY_UNKNOWN")
    call = say_of_property(analytics, made, "brwser", hidden=True)
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "PROPERTY_UNKNOWN")
    await say(analytics, made, "never", description="Comes next month")
    found = (await event("never")).event
    assert (found.count, found.HasField("first_seen_time")) == (0, False)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"description": "x" * 2001}, "VALIDATION_FAILED"),
        ({"description": "a\0b"}, "VALIDATION_FAILED"),
        ({"tags": ["a"] * 2}, "VALIDATION_FAILED"),
        ({"tags": [str(n) for n in range(21)]}, "VALIDATION_FAILED"),
        ({"tags": ["x" * 51]}, "VALIDATION_FAILED"),
        ({"tags": [" "]}, "VALIDATION_FAILED"),
        ({"tags": ["a\u202eb"]}, "VALIDATION_FAILED"),
        ({"count": 5}, "UPDATE_MASK_INVALID"),
    ],
)
async def test_refuses_what_cannot_be_said(
    analytics: Analytics, made: Made, said: dict[str, Any], reason: str
) -> None:
    call = say(analytics, made, "purchase", **said)
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_only_one_of_two_changes_wins(analytics: Analytics, made: Made) -> None:
    await say(analytics, made, "purchase", description="First", etag="0")
    stale = say(analytics, made, "purchase", description="Second", etag="0")
    assert await refusal(stale) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    unwritten = say(analytics, made, "view", description="Second", etag="no")
    assert await refusal(unwritten) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    current = (await list_events(analytics, made))[0].etag
    answers = await asyncio.gather(
        *(say(analytics, made, "purchase", description=f"By {n}", etag=current) for n in range(8)),
        return_exceptions=True,
    )
    assert sum(not isinstance(answer, BaseException) for answer in answers) == 1


async def test_what_is_unsaid_makes_room(
    analytics: Analytics, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "MAX_ENTRIES", 2)
    await say(analytics, made, "a", hidden=True)
    await say(analytics, made, "b", hidden=True)
    full = say(analytics, made, "c", hidden=True)
    assert await refusal(full) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CATALOGUE_FULL")
    await say(analytics, made, "b", description="There is room for more words")
    gone = await say(analytics, made, "a", hidden=False)
    assert (gone.etag, gone.HasField("update_time")) == ("0", False)
    assert [one.name for one in await list_events(analytics, made, include_hidden=True)] == ["b"]
    await say(analytics, made, "c", hidden=True)


async def test_viewers_read_and_do_not_write(analytics: Analytics, made: Made) -> None:
    member, source, key = made
    await collect(analytics, made, [{"event": "purchase"}])
    viewer = analytics.identity.member("viewer", member.workspace_id)
    theirs: Made = viewer, source, key
    assert [one.name for one in await list_events(analytics, theirs)] == ["purchase"]
    call = say(analytics, theirs, "purchase", hidden=True)
    assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    stranger = analytics.identity.member("owner")
    for attempt in (
        list_events(analytics, (stranger, source, key)),
        list_properties(analytics, (stranger, source, key)),
        say(analytics, (stranger, source, key), "purchase", hidden=True),
    ):
        assert await refusal(attempt) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")


async def test_goes_with_its_source(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    await say(analytics, made, "purchase", hidden=True)
    await analytics.sources.DeleteSource(
        DeleteSourceRequest(source_id=source.source_id), metadata=member.metadata
    )
    async with analytics.db() as session:
        count = await session.scalar(select(func.count()).where(CatalogueEntry.source_id == source.source_id))
    assert count == 0


async def test_another_source_knows_nothing_of_it(analytics: Analytics, made: Made) -> None:
    member = made[0]
    await collect(analytics, made, [{"event": "purchase", "properties": {"x": 1}}])
    await say(analytics, made, "purchase", hidden=True)
    other: Made = member, *await analytics.source(member)
    assert await list_events(analytics, other, include_hidden=True) == []
    assert await list_properties(analytics, other, include_hidden=True) == {}


async def test_names_are_values_and_never_sql(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    hostile = ["'; DROP TABLE events; --", "\\", "{p0:String}", "a\tb\nc", "𝄞'\"`", "%"]
    await collect(analytics, made, [{"event": one, "properties": {one: one}} for one in hostile])
    assert {one.name for one in await list_events(analytics, made)} == set(hostile)
    for one in hostile:
        found = await list_properties(analytics, made, event=one)
        assert [(p.name, list(p.sample_values)) for p in found.values()] == [(f"properties.{one}", [one])]
        request = GetCataloguePropertyRequest(source_id=source.source_id, name=f"properties.{one}")
        answer = await analytics.catalogue.GetCatalogueProperty(request, metadata=member.metadata)
        assert [(v.value, v.count) for v in answer.values] == [(one, 1)]


async def test_asks_the_store_once_for_all(analytics: Analytics, made: Made) -> None:
    member, source, _ = made
    await collect(analytics, made, [{"event": "purchase"}])
    asked: list[str] = []

    class Counting:
        async def query(self, sql: str, *args: Any, **more: Any) -> Any:
            asked.append(sql)
            return await analytics.store.query(sql, *args, **more)

    store: Any = Counting()
    summaries = Summaries(Queries(analytics.db, store, lambda: datetime.now(UTC)))
    answers = await asyncio.gather(
        *(summaries.events(member.workspace_id, source.source_id) for _ in range(20))
    )
    assert all([one.name for one in answer] == ["purchase"] for answer in answers)
    await summaries.events(member.workspace_id, source.source_id)
    assert len(asked) == 1
    await summaries.events(member.workspace_id, new_id())
    assert len(asked) == 2
