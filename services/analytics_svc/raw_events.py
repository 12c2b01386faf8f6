"""EventService: pages of stored events, and a stream of those that arrive."""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.analytics.v1.event_service_pb2 import (
    ListEventsRequest,
    ListEventsResponse,
    TailEventsRequest,
    TailEventsResponse,
)
from meshboard.analytics.v1.event_service_pb2_grpc import EventServiceServicer

from services.analytics_svc import stored_events, tails
from services.analytics_svc.memberships import check_visible
from services.analytics_svc.queries import Queries
from services.analytics_svc.selection import Selection, resolve_range
from services.analytics_svc.stored_events import Row
from services.analytics_svc.tails import Tails
from services.chassis import auth
from services.chassis.paging import Pages
from services.chassis.rechecks import Rechecks, Span

Context = grpc.aio.ServicerContext[Any, Any]

_PLACE = ("time", "sequence", "position", "source_id", "insert_id")
# How far back the latest events are looked for, in milliseconds, before all of the range is.
_WINDOWS = (86_400_000, 32 * 86_400_000)


class EventServicer(EventServiceServicer):
    """The access stage has checked `sources.query` on each source."""

    def __init__(
        self, queries: Queries, pages: Pages, tails: Tails, span: Span, draining: Callable[[], bool]
    ) -> None:
        self.queries = queries
        self.pages = pages
        self.tails = tails
        self.span = span
        self.draining = draining

    async def ListEvents(self, request: ListEventsRequest, context: Context) -> ListEventsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        start, end, *last = page.last or resolve_range(request.time_range, self.queries.now())
        check_visible(request)
        cohorts = await self.queries.cohorts(request, workspace_id)
        events = Selection(workspace_id, request.source_ids, start, end, cohorts)
        conditions = stored_events.conditions_of(events, request)
        events.check_size()
        rows = await self._page(events, conditions, last, page.size, oldest_first=request.oldest_first)
        more = bool(rows) and rows[0].found > len(rows)
        return ListEventsResponse(
            events=[row.message() for row in rows],
            next_page_token=page.token([start, end, *rows[-1].place]) if more else "",
        )

    async def TailEvents(
        self, request: TailEventsRequest, context: Context
    ) -> AsyncIterator[TailEventsResponse]:
        with self.tails.open(auth.caller().workspace_id, request) as tail:
            await tail.start()
            async for response in tails.stream(tail, self.span, Rechecks(auth.recheck), self.draining):
                yield response

    async def _page(
        self,
        events: Selection,
        conditions: Sequence[str],
        last: Sequence[Any],
        size: int,
        *,
        oldest_first: bool,
    ) -> list[Row]:
        """The events behind the last one of the page before."""
        if last:
            time, sequence, position, source_id, insert_id = last
            place = (
                events.instant(time),
                events.bind(sequence, "UInt64"),
                events.bind(position, "UInt32"),
                events.bind(source_id, "UUID"),
                events.bind(insert_id, "String"),
            )
            comparison = ">" if oldest_first else "<"
            conditions = [*conditions, f"({', '.join(_PLACE)}) {comparison} ({', '.join(place)})"]
            events = replace(events, start=time) if oldest_first else replace(events, end=time + 1)
        order = ", ".join(f"{column} {'ASC' if oldest_first else 'DESC'}" for column in _PLACE)
        rows: list[Row] = []
        for window in [events] if oldest_first else windows(events, self.queries.now()):
            sql = stored_events.select(window, conditions, order, size, count_all=False)
            found = await self.queries.rows(sql, window.params, events.workspace_id)
            rows = [Row(cells) for cells in found.rows]
            if rows and rows[0].found > size:
                break
        return rows


def windows(events: Selection, now: datetime) -> Iterator[Selection]:
    """Ranges that end where this one does, each longer than the one before; the last is the range itself."""
    # An event is at most a day ahead.
    end = int(now.timestamp() * 1000) + 86_400_000
    end = end if events.end is None else min(events.end, end)
    for window in _WINDOWS:
        if events.start is None or end - window > events.start:
            yield replace(events, start=end - window)
    yield events
