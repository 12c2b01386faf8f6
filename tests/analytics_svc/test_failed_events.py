"""Failed events: seen, fixed, retried and discarded, while nothing is lost and nothing counted twice."""

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.analytics.v1.failed_event_pb2 import FailedEvent
from meshboard.analytics.v1.failed_event_service_pb2 import (
    DiscardFailedEventsRequest,
    GetFailedEventRequest,
    ListFailedEventsRequest,
    RetryFailedEventsRequest,
    UpdateFailedEventRequest,
)
from meshboard.analytics.v1.ingest_service_pb2 import Event
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import DeleteSourceRequest

from services.analytics_svc.models import FailedEvent as Row
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import announced, refusal
from tests.conditions import eventually
from tests.harness import Member, new_id

POISON = {"event": "indigestible", "properties": {"n": 1}}
GOOD = {"event": "good"}


async def listed(analytics: Analytics, member: Member, source: Source) -> list[FailedEvent]:
    request = ListFailedEventsRequest(source_id=source.source_id)
    return list(
        (await analytics.failed_events.ListFailedEvents(request, metadata=member.metadata)).failed_events
    )


async def send(analytics: Analytics, write_key: str, *events: dict[str, Any]) -> None:
    """Sends events that ingest leaves to the pipeline: too many of their user agents are new."""
    await analytics.send(write_key, [{"userAgent": new_id(), **event} for event in events])


async def failing(
    analytics: Analytics, *events: dict[str, Any]
) -> tuple[Member, Source, str, list[FailedEvent]]:
    """A source, its write key, and the failed events that these have become, in their order."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await send(analytics, key, *events, GOOD)
    await analytics.until_count(member, source, 1)
    return member, source, key, (await listed(analytics, member, source))[::-1]


async def retry(analytics: Analytics, member: Member, source: Source, *ids: str) -> int:
    request = RetryFailedEventsRequest(source_id=source.source_id, failed_event_ids=ids)
    response = await analytics.failed_events.RetryFailedEvents(request, metadata=member.metadata)
    return int(response.retried_count)


async def fix(
    analytics: Analytics, member: Member, source: Source, failed: FailedEvent, **event: Any
) -> FailedEvent:
    new = FailedEvent(failed_event_id=failed.failed_event_id, etag=failed.etag, event=Event(**event))
    request = UpdateFailedEventRequest(source_id=source.source_id, failed_event=new)
    return (await analytics.failed_events.UpdateFailedEvent(request, metadata=member.metadata)).failed_event


async def test_says_what_failed_and_why(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(
        analytics, {**POISON, "insertId": "a", "time": "2026-01-02T03:04:05Z", "previousId": "b"}
    )
    assert failed.workspace_id == member.workspace_id
    assert failed.source_id == source.source_id
    assert (failed.event.event, failed.event.insert_id, failed.event.previous_id) == (
        "indigestible",
        "a",
        "b",
    )
    assert failed.event.time.ToJsonString() == "2026-01-02T03:04:05Z"
    assert failed.event.properties["n"] == 1
    assert (failed.step, failed.error) == (FailedEvent.ENRICH, "RuntimeError: cannot swallow a")
    assert (failed.attempt_count, failed.retrying) == (1, False)
    assert failed.receive_time.seconds <= failed.create_time.seconds
    request = GetFailedEventRequest(source_id=source.source_id, failed_event_id=failed.failed_event_id)
    found = await analytics.failed_events.GetFailedEvent(request, metadata=member.metadata)
    assert found.failed_event == failed


async def test_a_fixed_one_is_stored_once_however_often_it_is_retried(analytics: Analytics) -> None:
    member, source, key, (failed,) = await failing(analytics, {**POISON, "insertId": "a"})
    fixed = await fix(analytics, member, source, failed, event="mended", distinct_id="ada", insert_id="other")
    assert (fixed.event.event, fixed.event.insert_id) == ("mended", "a")
    assert fixed.event.time == failed.event.time
    assert fixed.etag != failed.etag
    for _ in range(3):
        assert await retry(analytics, member, source, failed.failed_event_id) <= 1
    await analytics.until_count(member, source, 2)

    async def gone() -> bool:
        return not await listed(analytics, member, source)

    await eventually(gone)
    await analytics.send(key, [{"event": "mended", "insertId": "a"}, {"event": "last"}])
    await analytics.until_count(member, source, 3)
    names = await announced(analytics, member.workspace_id)
    assert "FailedEventUpdated" in names
    assert "FailedEventsRetried" in names


async def test_what_fails_again_stays_with_the_new_error(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(analytics, {**POISON, "insertId": "a"})
    assert await retry(analytics, member, source, failed.failed_event_id, new_id()) == 1

    async def refused_again() -> bool:
        (now,) = await listed(analytics, member, source)
        return now.attempt_count == 2 and not now.retrying

    await eventually(refused_again)
    assert await analytics.count(member, source) == 1


async def test_what_an_application_sends_again_fails_once_and_undoes_no_fix(analytics: Analytics) -> None:
    twice = {**POISON, "insertId": "a"}
    member, source, key, failed = await failing(analytics, twice, twice)
    assert len(failed) == 1
    fixed = await fix(analytics, member, source, failed[0], event="mended", distinct_id="ada")
    await send(analytics, key, twice, GOOD)
    await analytics.until_count(member, source, 2)
    assert await listed(analytics, member, source) == [fixed]


async def test_a_fix_must_be_what_ingest_takes(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(analytics, POISON)
    call = fix(analytics, member, source, failed, event="", distinct_id="ada")
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    stale = FailedEvent(failed_event_id=failed.failed_event_id, etag="0")
    call = fix(analytics, member, source, stale, event="mended", distinct_id="ada")
    assert await refusal(call) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    request = UpdateFailedEventRequest(
        source_id=source.source_id, failed_event=failed, update_mask=FieldMask(paths=["error"])
    )
    update = analytics.failed_events.UpdateFailedEvent(request, metadata=member.metadata)
    assert await refusal(update) == (grpc.StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")
    assert await listed(analytics, member, source) == [failed]


async def test_what_is_being_retried_is_not_fixed(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(analytics, POISON)
    async with analytics.db.begin() as session:
        (await session.get_one(Row, failed.failed_event_id)).retry_id = new_id()
    call = fix(analytics, member, source, failed, event="mended", distinct_id="ada")
    assert await refusal(call) == (grpc.StatusCode.FAILED_PRECONDITION, "FAILED_EVENT_RETRYING")
    assert await retry(analytics, member, source, failed.failed_event_id) == 1  # an answer may have got lost


async def test_the_discarded_are_gone(analytics: Analytics) -> None:
    member, source, _, failed = await failing(analytics, POISON, POISON)
    request = DiscardFailedEventsRequest(
        source_id=source.source_id, failed_event_ids=[failed[0].failed_event_id, new_id()]
    )
    gone = await analytics.failed_events.DiscardFailedEvents(request, metadata=member.metadata)
    assert gone.discarded_count == 1
    assert await listed(analytics, member, source) == failed[1:]
    assert "FailedEventsDiscarded" in await announced(analytics, member.workspace_id)


async def test_pages_have_each_once_and_end_before_they_are_too_large(analytics: Analytics) -> None:
    large = {**POISON, "properties": {"text": "x" * 60_000}}
    member, source, _, failed = await failing(analytics, *([large] * 50))
    assert len(failed) < 50
    seen, token = [], ""
    while True:
        request = ListFailedEventsRequest(source_id=source.source_id, page_size=40, page_token=token)
        page = await analytics.failed_events.ListFailedEvents(request, metadata=member.metadata)
        assert page.ByteSize() < 2_200_000
        seen += [failed.failed_event_id for failed in page.failed_events]
        if not (token := page.next_page_token):
            break
    assert len(set(seen)) == len(seen) == 50
    assert seen == sorted(seen, reverse=True)


async def test_who_may_not_see_the_source_learns_nothing(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(analytics, POISON)
    stranger = analytics.identity.member("owner")
    request = GetFailedEventRequest(source_id=source.source_id, failed_event_id=failed.failed_event_id)
    call = analytics.failed_events.GetFailedEvent(request, metadata=stranger.metadata)
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    # Nor by way of another source of one's own.
    other, _ = await analytics.source(member)
    request = GetFailedEventRequest(source_id=other.source_id, failed_event_id=failed.failed_event_id)
    call = analytics.failed_events.GetFailedEvent(request, metadata=member.metadata)
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "FAILED_EVENT_NOT_FOUND")
    assert await retry(analytics, member, other, failed.failed_event_id) == 0
    viewer = analytics.identity.member("viewer", member.workspace_id)
    assert await listed(analytics, viewer, source) == [failed]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await retry(analytics, viewer, source, failed.failed_event_id)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_those_of_a_deleted_source_are_gone(analytics: Analytics) -> None:
    member, source, _, (failed,) = await failing(analytics, POISON)
    await analytics.sources.DeleteSource(
        DeleteSourceRequest(source_id=source.source_id), metadata=member.metadata
    )
    async with analytics.db() as session:
        assert await session.get(Row, failed.failed_event_id) is None
