"""One watcher's stream: news of the feed, heartbeats, and an end that says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import suppress
from typing import Any

from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse

from services.chassis.rechecks import Guards, Span
from services.dashboard_svc import cursors
from services.dashboard_svc.feeds import LEAST_SECONDS, Feed
from services.dashboard_svc.snapshots import Frozen

End = WatchDashboardResponse.End

# Sending costs the process time for each stream: with many, changes are further apart.
_SECONDS_A_STREAM = 50e-6
_MOST_SECONDS = 0.25

_guards = Guards()

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
    """What a client is sent that has this data (None: nothing), in a form. Ends after a message with `end`.

    Changes are `least_seconds` apart. `recheck` raises when the client may no longer watch; streams of the feed with an
    equal `key` have the same right, and are checked together. Raises UNAVAILABLE when that could not be told for a
    while.
    """

    async def check() -> None:
        if draining():
            _wake(feed)
        await recheck()

    with _guards.guard((feed, object() if key is None else key), check, lambda: _wake(feed)) as guard:
        start = time.monotonic()
        next_beat, end_time = start + span.heartbeat_seconds, start + span.watch_seconds
        next_news = start
        seen: asyncio.Event | None = None
        while True:
            changed = feed.changed
            if draining():
                yield form(_end(End.DRAINING))
                return
            if time.monotonic() >= end_time:
                yield form(_end(End.RENEW))
                return
            if reason := await guard.reason_to_end(feed.doubts):
                yield form(_end(End.Reason.Value(reason)))
                return
            # Until the first message the feed may still be on its way to what this client may expect.
            pending = changed is not seen and (seen is not None or feed.ready)
            if pending and time.monotonic() >= next_news:
                first, seen, pending = seen is None, changed, False
                if news := feed.news(has):
                    has = news.has
                    yield news.formed(form)
                    next_news = time.monotonic() + _pace(least_seconds)
                elif first:
                    # Nothing differs from the client's cursor: it learns that it is up to date.
                    yield form(WatchDashboardResponse(cursor=feed.cursor(has or {})))
            if time.monotonic() >= next_beat:
                yield form(WatchDashboardResponse(heartbeat=WatchDashboardResponse.Heartbeat()))
                next_beat += span.heartbeat_seconds
            wake = min(next_beat, end_time, next_news if pending else end_time)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wake - time.monotonic())):
                    await changed.wait()


def _end(reason: End.Reason.ValueType) -> WatchDashboardResponse:
    return WatchDashboardResponse(end=End(reason=reason))


def _wake(feed: Feed | Frozen) -> None:
    """Has all streams of the feed look whether they must end."""
    changed, feed.changed = feed.changed, asyncio.Event()
    changed.set()


def _pace(least_seconds: float) -> float:
    crowded = LEAST_SECONDS + _guards.streams * _SECONDS_A_STREAM
    return max(least_seconds, min(_MOST_SECONDS, crowded))
