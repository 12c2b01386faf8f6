"""One watcher's stream: news of the feed, heartbeats, and an end that says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import grpc
import structlog
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from sqlalchemy.exc import SQLAlchemyError

from services.chassis import errors
from services.dashboard_svc import cursors
from services.dashboard_svc.feeds import LEAST_SECONDS, Feed

log = structlog.get_logger(__name__)

End = WatchDashboardResponse.End
CHECK_SECONDS = 1.0
# A right that cannot be checked for this long is lost.
BLIND_SECONDS = 2.0
_LOST = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED}


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds between heartbeats, and how long a stream lives at most."""

    heartbeat_seconds: float
    watch_seconds: float


async def stream(
    feed: Feed,
    has: cursors.Digests | None,
    span: Span,
    recheck: Callable[[], Awaitable[None]],
    draining: Callable[[], bool],
) -> AsyncIterator[WatchDashboardResponse]:
    """What a client is sent that has this data (None: nothing). Ends after a message with `end`.

    `recheck` raises when the client may no longer watch. Raises UNAVAILABLE when for BLIND_SECONDS it could not tell.
    """
    check = _Check(recheck)
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
            yield _end(reason)
            return
        # Until the first message the feed may still be on its way to what this client may expect.
        pending = changed is not seen and (seen is not None or feed.ready)
        if pending and time.monotonic() >= next_news:
            first, seen, pending = seen is None, changed, False
            if news := feed.news(has):
                response, has = news
                yield response
                next_news = time.monotonic() + LEAST_SECONDS
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


class _Check:
    """Checks every CHECK_SECONDS, and at once when the feed doubts, that the client may still watch."""

    def __init__(self, recheck: Callable[[], Awaitable[None]]) -> None:
        self._recheck = recheck
        self._doubts = 0
        self._good = time.monotonic()
        self.next = _next_check(self._good)

    async def reason_to_end(self, doubts: int) -> End.Reason.ValueType:
        """Why the stream must end; REASON_UNSPECIFIED when it may go on."""
        start = time.monotonic()
        if start < self.next and doubts == self._doubts:
            return End.REASON_UNSPECIFIED
        self._doubts = doubts
        self.next = _next_check(start)
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._recheck()
        except errors.Error as error:
            if error.code is grpc.StatusCode.UNAUTHENTICATED:
                return End.SESSION_REVOKED if error.reason == "SESSION_REVOKED" else End.TOKEN_EXPIRED
            if error.code in _LOST:
                return End.ACCESS_LOST
            self._tolerate(error)
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            self._tolerate(error)
        else:
            self._good = start
        return End.REASON_UNSPECIFIED

    def _tolerate(self, error: Exception) -> None:
        if time.monotonic() - self._good >= BLIND_SECONDS:
            raise errors.unavailable("It cannot be told whether you may still watch.") from error
        log.info("recheck_failed", error=repr(error))
        self.next = time.monotonic() + CHECK_SECONDS / 4


def _next_check(now: float) -> float:
    # All streams of a process check at the same instants, so that one statement reads the grants of all.
    return (now // CHECK_SECONDS + 1) * CHECK_SECONDS


def _end(reason: End.Reason.ValueType) -> WatchDashboardResponse:
    return WatchDashboardResponse(end=End(reason=reason))
