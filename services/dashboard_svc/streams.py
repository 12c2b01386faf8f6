"""One watcher's stream: news of the feed, heartbeats, and an end that says why."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse

from services.chassis.interceptor import Handover, Write
from services.chassis.rechecks import Guard, Guards, Span
from services.dashboard_svc import cursors
from services.dashboard_svc.feeds import LEAST_SECONDS, Feed
from services.dashboard_svc.rounds import NEVER, Due, Rounds
from services.dashboard_svc.snapshots import Frozen

End = WatchDashboardResponse.End

_guards = Guards()
_rounds = Rounds(LEAST_SECONDS)

# What a message is sent as: what the servicer gives to gRPC.
Form = Callable[[WatchDashboardResponse], Any]


def _as_it_is(response: WatchDashboardResponse) -> WatchDashboardResponse:
    return response


async def stream(
    feed: Feed | Frozen,
    has: cursors.Digests | None,
    span: Span,
    recheck: Callable[[], Awaitable[None]],
    draining: Callable[[], bool],
    *,
    least_seconds: float = LEAST_SECONDS,
    form: Form = _as_it_is,
    key: Hashable = None,
) -> AsyncIterator[Any]:
    """Has a client that has this data (None: nothing) sent what follows, in a form. Ends after a message with `end`.

    Changes are `least_seconds` apart. `recheck` raises when the client may no longer watch; streams of the feed with an
    equal `key` have the same right, and are checked together. Raises UNAVAILABLE when that could not be told for a
    while. What it yields is for the interceptor, which has the messages sent in rounds over all streams.
    """
    yield Handover(_Watcher(feed, has, span, recheck, draining, least_seconds, form, key).watch)


@dataclass(slots=True, eq=False)
class _Watcher:
    """What one client has, and is sent."""

    feed: Feed | Frozen
    has: cursors.Digests | None
    span: Span
    recheck: Callable[[], Awaitable[None]]
    draining: Callable[[], bool]
    least_seconds: float
    form: Form
    key: Hashable
    guard: Guard = field(init=False)
    next_news: float = 0.0
    next_beat: float = field(init=False)
    end_time: float = field(init=False)
    seen: int | None = None  # which of the feed's changes

    def __post_init__(self) -> None:
        start = time.monotonic()
        self.next_beat = start + self.span.heartbeat_seconds
        self.end_time = start + self.span.watch_seconds

    async def watch(self, write: Write) -> None:
        """Returns behind the last message."""
        right = (self.feed, object() if self.key is None else self.key)
        with (
            _guards.guard(right, self._check, self.feed.wake) as self.guard,
            _rounds.turn(self.due, write) as turn,
        ):
            self.feed.told.add(turn.look)
            try:
                await turn.over
            finally:
                self.feed.told.discard(turn.look)

    async def _check(self) -> None:
        if self.draining():
            self.feed.wake()
        await self.recheck()

    def due(self, now: float) -> Due:
        """What is sent now. Raises UNAVAILABLE when it could not be told for a while whether the client may watch."""
        feed, guard = self.feed, self.guard
        if self.draining():
            return Due(self.form(_end(End.DRAINING)), last=True)
        if now >= self.end_time:
            return Due(self.form(_end(End.RENEW)), last=True)
        if reason := guard.reason_to_end:
            return Due(self.form(_end(End.Reason.Value(reason))), last=True)
        message, near = None, NEVER
        if guard.settled < feed.doubts:
            guard.doubt(feed.doubts)  # and has the feed's watchers look again
        # Until the first message the feed may still be on its way to what this client may expect.
        elif feed.changes != self.seen and (self.seen is not None or feed.ready):
            if now >= self.next_news:
                message = self._news(now)
            else:
                near = self.next_news
        if message is None and now >= self.next_beat:
            self.next_beat += self.span.heartbeat_seconds
            message = self.form(WatchDashboardResponse(heartbeat=WatchDashboardResponse.Heartbeat()))
        return Due(message, near=near, far=min(self.next_beat, self.end_time))

    def _news(self, now: float) -> Any:
        first, self.seen = self.seen is None, self.feed.changes
        if news := self.feed.news(self.has):
            self.has, self.next_news = news.has, now + max(self.least_seconds, _rounds.pace)
            return news.formed(self.form)
        if first:
            # Nothing differs from the client's cursor: it learns that it is up to date.
            return self.form(WatchDashboardResponse(cursor=self.feed.cursor(self.has or {})))
        return None


def _end(reason: End.Reason.ValueType) -> WatchDashboardResponse:
    return WatchDashboardResponse(end=End(reason=reason))
