"""Live tails: events as they become visible, for as long as someone looks.

A tick says that a source has new events in the store; each tail then asks for those between the last sequence that it
has seen and the tick's. Ticks that come while a client is slow move one number: nothing is kept for it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta

from meshboard.analytics.v1.event_service_pb2 import TailEventsRequest, TailEventsResponse
from meshboard.analytics.v1.events_pb2 import Tick
from prometheus_client import Gauge

from services.analytics_svc import stored_events
from services.analytics_svc.queries import Queries, hashable
from services.analytics_svc.selection import Selection, invalid
from services.analytics_svc.stored_events import Row
from services.chassis import errors
from services.chassis.bus import Bus, Received
from services.chassis.rechecks import Rechecks, Span

End = TailEventsResponse.End
NEWS_SECONDS = 0.5
MAX_EVENTS = 100
# Events are looked for in what was received since then: the store's parts from before need not be read.
_REACH = timedelta(days=1)

_open = Gauge("meshboard_tails", "Streams of live events that are open.")


class Tail:
    """One client's place: it has seen what is in the store up to the sequence `since`; there is more, up to `until`."""

    def __init__(self, queries: Queries, workspace_id: str, request: TailEventsRequest) -> None:
        self._queries = queries
        self.workspace_id = workspace_id
        self.request = request
        self.source_ids = {source_id.lower() for source_id in request.source_ids}
        self.since = self.until = 0
        self.missed = False
        self.changed = asyncio.Event()
        self.sql("0", "0", self._selection())  # refuses now what cannot be asked

    @property
    def behind(self) -> bool:
        """Whether there may be events that the client has not seen."""
        return self.missed or self.until != self.since

    def tick(self, watermark: int) -> None:
        """Notes that the store has more."""
        self.until = watermark
        self._wake()

    def miss(self) -> None:
        """Notes that ticks may have been missed."""
        self.missed = True
        self._wake()

    async def start(self) -> None:
        """Takes what is in the store as seen."""
        self.since = self.until = max(self.until, await self._watermark())

    async def read(self) -> TailEventsResponse | None:
        """The events that the client has not seen; None without any. Raises what `Queries.rows` raises."""
        if self.missed:
            self.missed = False
            self.until = max(self.until, await self._watermark())
        until = self.until
        # The log was replaced, and its sequences begin again.
        since = self.since if until >= self.since else 0
        events = self._selection()
        sql = self.sql(events.bind(since, "UInt64"), events.bind(until, "UInt64"), events)
        found = await self._queries.shared(
            (sql, hashable(events.params)), lambda: self._queries.rows(sql, events.params, self.workspace_id)
        )
        self.since = until
        if not found.rows:
            return None
        rows = [Row(cells) for cells in reversed(found.rows)]
        return TailEventsResponse(
            events=[row.message() for row in rows], skipped_count=min(rows[0].found - len(rows), 2**31 - 1)
        )

    def sql(self, since: str, until: str, events: Selection) -> str:
        """What finds the events of the sequences behind `since`, up to `until`."""
        conditions = stored_events.conditions_of(events, self.request)
        if events.uses_visits:
            invalid("filters", "A visit can be told from its events only once they are all there.")
        events.check_size()
        conditions += [
            f"sequence > {since}",
            f"sequence <= {until}",
            f"receive_time >= {events.instant(self._floor())}",
        ]
        order = "sequence DESC, position DESC"
        return stored_events.select(events, conditions, order, MAX_EVENTS, count_all=True)

    def _selection(self) -> Selection:
        return Selection(self.workspace_id, self.request.source_ids, None, None)

    def _floor(self) -> int:
        # By the hour, so that tails of the same events ask the same.
        hour: datetime = self._queries.now().replace(minute=0, second=0, microsecond=0)
        return int((hour - _REACH).timestamp() * 1000)

    async def _watermark(self) -> int:
        return max(await self._queries.watermarks(self.workspace_id, sorted(self.source_ids)), default=0)

    def _wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Tails:
    """The tails of this process, and what they are told."""

    def __init__(self, queries: Queries, *, per_workspace: int, at_most: int) -> None:
        self._queries = queries
        self._per_workspace = per_workspace
        self._at_most = at_most
        self._tails: set[Tail] = set()
        self._sources: dict[str, set[Tail]] = {}

    async def listen(self, bus: Bus) -> None:
        """Follows ticks."""
        await bus.listen("tick.*", self._ticked)
        bus.on_gap(self._missed)

    @contextmanager
    def open(self, workspace_id: str, request: TailEventsRequest) -> Iterator[Tail]:
        """A tail that hears of its sources. Raises RESOURCE_EXHAUSTED (TAILS_EXHAUSTED), or INVALID_ARGUMENT."""
        of_workspace = sum(tail.workspace_id == workspace_id for tail in self._tails)
        if of_workspace >= self._per_workspace or len(self._tails) >= self._at_most:
            raise errors.resource_exhausted(
                "TAILS_EXHAUSTED", "Too many streams of live events are open.", retry_seconds=10
            )
        tail = Tail(self._queries, workspace_id, request)
        self._tails.add(tail)
        for source_id in tail.source_ids:
            self._sources.setdefault(source_id, set()).add(tail)
        _open.inc()
        try:
            yield tail
        finally:
            _open.dec()
            self._tails.discard(tail)
            for source_id in tail.source_ids:
                self._sources[source_id].discard(tail)
                if not self._sources[source_id]:
                    del self._sources[source_id]

    def _ticked(self, message: Received) -> None:
        if tails := self._sources.get(message.subject.removeprefix("tick.")):
            watermark = Tick.FromString(message.payload).watermark
            for tail in tails:
                tail.tick(watermark)

    def _missed(self) -> None:
        for tail in self._tails:
            tail.miss()


async def stream(
    tail: Tail, span: Span, rechecks: Rechecks, draining: Callable[[], bool]
) -> AsyncIterator[TailEventsResponse]:
    """What a client is sent. Ends after a message with `end`."""
    start = time.monotonic()
    next_beat, end_time, next_news = start, start + span.watch_seconds, start
    while True:
        changed = tail.changed
        news = None
        if tail.behind and time.monotonic() >= next_news:
            next_news = time.monotonic() + NEWS_SECONDS
            news = await tail.read()
        # Behind the query, so that nothing is sent that may be seen no more.
        if draining():
            yield _end(End.DRAINING)
            return
        if time.monotonic() >= end_time:
            yield _end(End.RENEW)
            return
        if reason := await rechecks.reason_to_end():
            yield _end(End.Reason.Value(reason))
            return
        if news is not None:
            yield news
        if time.monotonic() >= next_beat:
            yield TailEventsResponse(heartbeat=TailEventsResponse.Heartbeat())
            next_beat = max(next_beat + span.heartbeat_seconds, time.monotonic())
        wake = min(next_beat, end_time, rechecks.next, next_news if tail.behind else end_time)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, wake - time.monotonic())):
                await changed.wait()


def _end(reason: End.Reason.ValueType) -> TailEventsResponse:
    return TailEventsResponse(end=End(reason=reason))
