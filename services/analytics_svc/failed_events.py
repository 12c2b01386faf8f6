"""Failed events: what a step of the pipeline has refused, until it is stored after all or discarded."""

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.analytics.v1 import events_pb2
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.failed_event_service_pb2 import (
    DiscardFailedEventsRequest,
    DiscardFailedEventsResponse,
    GetFailedEventRequest,
    GetFailedEventResponse,
    ListFailedEventsRequest,
    ListFailedEventsResponse,
    RetryFailedEventsRequest,
    RetryFailedEventsResponse,
    UpdateFailedEventRequest,
    UpdateFailedEventResponse,
)
from meshboard.analytics.v1.failed_event_service_pb2_grpc import FailedEventServiceServicer
from meshboard.analytics.v1.ingest_service_pb2 import Event
from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import failed_event_to_pb, source_to_pb
from services.analytics_svc.event_log import EventLog
from services.analytics_svc.ingest import refusal_of
from services.analytics_svc.models import FailedEvent, Source
from services.chassis import auth, errors, outbox
from services.chassis.bus import BusError
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages

Context = grpc.aio.ServicerContext[Any, Any]

MAX_PAGE_BYTES = 2 << 20
# How many failed events are in memory at once: 64 KiB each, and a little.
_RETRIED_AT_ONCE = 50


class FailedEventServicer(FailedEventServiceServicer):
    """The access stage has decided about the source."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        log: EventLog,
        pages: Pages,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self.db = db
        self.log = log
        self.pages = pages
        self.now = now
        self.new_id = new_id

    async def GetFailedEvent(
        self, request: GetFailedEventRequest, context: Context
    ) -> GetFailedEventResponse:
        async with self.db() as session:
            row = await session.scalar(
                select(FailedEvent).where(*_of(request.source_id, [request.failed_event_id]))
            )
        if row is None:
            raise _absent(request.failed_event_id)
        return GetFailedEventResponse(failed_event=failed_event_to_pb(row))

    async def ListFailedEvents(
        self, request: ListFailedEventsRequest, context: Context
    ) -> ListFailedEventsResponse:
        page = self.pages.open(request, auth.caller().workspace_id)
        newest_first = FailedEvent.failed_event_id.desc()
        async with self.db() as session:
            sizes = await session.execute(
                select(FailedEvent.failed_event_id, func.octet_length(FailedEvent.batch))
                .where(*_of(request.source_id), page.after(FailedEvent.failed_event_id, descending=True))
                .order_by(newest_first)
                .limit(page.limit)
            )
            found = [(failed_event_id, size) for failed_event_id, size in sizes]
            ids = list(_with_room([*found[: page.size]]))
            rows = await session.scalars(
                select(FailedEvent).where(*_of(request.source_id, ids)).order_by(newest_first)
            )
        return ListFailedEventsResponse(
            failed_events=map(failed_event_to_pb, rows),
            next_page_token=page.token([ids[-1]]) if len(ids) < len(found) else "",
        )

    async def UpdateFailedEvent(
        self, request: UpdateFailedEventRequest, context: Context
    ) -> UpdateFailedEventResponse:
        new, now = request.failed_event, self.now()
        changed = changed_fields(new, request.update_mask, {"event"})
        async with self.db.begin() as session:
            row = await session.scalar(
                select(FailedEvent).where(*_of(request.source_id, [new.failed_event_id])).with_for_update()
            )
            if row is None:
                raise _absent(new.failed_event_id)
            if new.etag and new.etag != str(row.version):
                raise errors.etag_mismatch()
            if row.retry_id is not None:
                raise errors.failed_precondition(
                    "FAILED_EVENT_RETRYING",
                    "The event is on its way to the store: wait until it is gone, or refused again.",
                )
            if changed:
                row.batch = _fixed(row.batch, new.event, now)
                row.version += 1
                row.update_time = now
                event = events_pb2.FailedEventUpdated(
                    workspace_id=auth.caller().workspace_id,
                    source_id=request.source_id,
                    failed_event_id=row.failed_event_id,
                )
                outbox.add(session, event, workspace_id=event.workspace_id)
        return UpdateFailedEventResponse(failed_event=failed_event_to_pb(row))

    async def RetryFailedEvents(
        self, request: RetryFailedEventsRequest, context: Context
    ) -> RetryFailedEventsResponse:
        ids = sorted(request.failed_event_ids)
        count = 0
        for start in range(0, len(ids), _RETRIED_AT_ONCE):
            count += await self._retry(request.source_id, ids[start : start + _RETRIED_AT_ONCE])
        return RetryFailedEventsResponse(retried_count=count)

    async def DiscardFailedEvents(
        self, request: DiscardFailedEventsRequest, context: Context
    ) -> DiscardFailedEventsResponse:
        async with self.db.begin() as session:
            gone = await session.scalars(
                delete(FailedEvent)
                .where(*_of(request.source_id, request.failed_event_ids))
                .returning(FailedEvent.failed_event_id)
            )
            event = events_pb2.FailedEventsDiscarded(
                workspace_id=auth.caller().workspace_id,
                source_id=request.source_id,
                failed_event_ids=gone,
            )
            if event.failed_event_ids:
                outbox.add(session, event, workspace_id=event.workspace_id)
        return DiscardFailedEventsResponse(discarded_count=len(event.failed_event_ids))

    async def _retry(self, source_id: str, ids: Sequence[str]) -> int:
        async with self.db.begin() as session:
            source = await session.get_one(Source, (auth.caller().workspace_id, source_id))
            rows = (
                await session.scalars(
                    select(FailedEvent)
                    .where(*_of(source_id, ids))
                    .order_by(FailedEvent.failed_event_id)
                    .with_for_update()
                )
            ).all()
            for row in rows:
                row.retry_id = self.new_id()
                row.version += 1
                row.update_time = self.now()
            event = events_pb2.FailedEventsRetried(
                workspace_id=source.workspace_id,
                source_id=source_id,
                failed_event_ids=[row.failed_event_id for row in rows],
            )
            if rows:
                outbox.add(session, event, workspace_id=source.workspace_id)
        batch = LoggedBatch(retry_ids=[row.retry_id for row in rows if row.retry_id])
        for row in rows:
            batch.events.extend(LoggedBatch.FromString(row.batch).events)
        try:
            if rows:
                await self.log.append(source_to_pb(source), batch.SerializeToString())
        except BusError as error:
            raise errors.unavailable("The event log takes no events now.") from error
        return len(rows)


def _of(source_id: str, ids: Sequence[str] | None = None) -> Iterator[ColumnElement[bool]]:
    """Conditions of a source of the caller's workspace, and of these of its failed events."""
    yield FailedEvent.workspace_id == auth.caller().workspace_id
    yield FailedEvent.source_id == source_id
    if ids is not None:
        yield FailedEvent.failed_event_id.in_(ids)


def _with_room(found: Sequence[tuple[str, int]]) -> Iterator[str]:
    """The ids of those that have room on one page; of the first one in any case."""
    room = MAX_PAGE_BYTES
    for index, (failed_event_id, size) in enumerate(found):
        room -= size
        if index and room < 0:
            return
        yield failed_event_id


def _fixed(stored: bytes, event: Event, now: datetime) -> bytes:
    """The batch with this event in place of its own. Raises INVALID_ARGUMENT for one that `Ingest` would refuse."""
    batch = LoggedBatch.FromString(stored)
    (old,) = batch.events
    event.insert_id = old.insert_id
    event.ClearField("ip")
    event.DiscardUnknownFields()
    if not event.HasField("time"):
        event.time.CopyFrom(old.time)
    if refusal := refusal_of(event, int(now.timestamp())):
        field, _, description = refusal[1].partition(": ")
        raise errors.invalid_fields([(f"failed_event.event.{field}", description)])
    batch.events[0].CopyFrom(LoggedEvent.FromString(event.SerializeToString()))
    return batch.SerializeToString()


def _absent(failed_event_id: str) -> errors.Error:
    return errors.not_found(
        "FAILED_EVENT_NOT_FOUND", "There is no such failed event.", failed_event_id=failed_event_id
    )
