"""One watcher's stream: news of the feed, heartbeats, and an end that says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse

from services.chassis.rechecks import Rechecks, Span
from services.dashboard_svc import cursors
from services.dashboard_svc.feeds import LEAST_SECONDS, Feed
from services.dashboard_svc.snapshots import Frozen

End = WatchDashboardResponse.End


async def stream(
    feed: Feed | Frozen,
    has: cursors.Digests | None,
    span: Span,
    recheck: Callable[[], Awaitable[None]],
    draining: Callable[[], bool],
    *,
    least_seconds: float = LEAST_SECONDS,
) -> AsyncIterator[WatchDashboardResponse]:
    """What a client is sent that has this data (None: nothing). Ends after a message with `end`.

    Changes are `least_seconds` apart. `recheck` raises when the client may no longer watch. Raises UNAVAILABLE when
    that could not be told for a while.
    """
    check = Rechecks(recheck)
    start = time.monotonic()
    next_beat, end_time = start + span.heartbeat_seconds, start + span.watch_seconds
    next_news = start
    seen: asyncio.Event | None = None
    while True:
        changed = feed.changed
        if draining():
            yield _end(End.DRAINING)
            return
        if time.monotonic() >= end_time:
            yield _end(End.RENEW)
            return
        if reason := await check.reason_to_end(feed.doubts):
            yield _end(End.Reason.Value(reason))
            return
        # Until the first message the feed may still be on its way to what this client may expect.
        pending = changed is not seen and (seen is not None or feed.ready)
        if pending and time.monotonic() >= next_news:
            first, seen, pending = seen is None, changed, False
            if news := feed.news(has):
                response, has = news
                yield response
                next_news = time.monotonic() + least_seconds
            elif first:
                # Nothing differs from the client's cursor: it learns that it is up to date.
                yield WatchDashboardResponse(cursor=feed.cursor(has or {}))
        if time.monotonic() >= next_beat:
            yield WatchDashboardResponse(heartbeat=WatchDashboardResponse.Heartbeat())
            next_beat += span.heartbeat_seconds
        wake = min(next_beat, end_time, check.next, next_news if pending else end_time)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, wake - time.monotonic())):
                await changed.wait()


def _end(reason: End.Reason.ValueType) -> WatchDashboardResponse:
    return WatchDashboardResponse(end=End(reason=reason))
