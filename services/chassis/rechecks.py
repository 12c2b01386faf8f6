"""Whether the client of a stream may still have it."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import grpc
import structlog
from sqlalchemy.exc import SQLAlchemyError

from services.chassis import errors
from services.chassis.deadline import set_deadline

log = structlog.get_logger(__name__)

CHECK_SECONDS = 1.0
# A right that cannot be checked for this long is lost.
BLIND_SECONDS = 2.0
_LOST = {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED}

# Why a stream must end, by the names that contracts have for it; "" when it may go on.
Reason = Literal["", "TOKEN_EXPIRED", "SESSION_REVOKED", "ACCESS_LOST"]


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds between heartbeats, and how long a stream lives at most."""

    heartbeat_seconds: float
    watch_seconds: float


class Rechecks:
    """Checks every CHECK_SECONDS, and at once when there is doubt, that the client may still have its stream.

    `recheck` raises when it may not; `next` is when the next check is due, by the monotonic clock.
    """

    def __init__(self, recheck: Callable[[], Awaitable[None]]) -> None:
        self._recheck = recheck
        self._doubts = 0
        self._good = time.monotonic()
        self.next = _next_check(self._good)

    async def reason_to_end(self, doubts: int = 0) -> Reason:
        """Why the stream must end. `doubts` counts what has happened that may have ended the right.

        Raises UNAVAILABLE when for BLIND_SECONDS it could not be told.
        """
        start = time.monotonic()
        if start < self.next and doubts == self._doubts:
            return ""
        self._doubts = doubts
        self.next = _next_check(start)
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._recheck()
        except errors.Error as error:
            if error.code is grpc.StatusCode.UNAUTHENTICATED:
                return "SESSION_REVOKED" if error.reason == "SESSION_REVOKED" else "TOKEN_EXPIRED"
            if error.code in _LOST:
                return "ACCESS_LOST"
            self._tolerate(error)
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            self._tolerate(error)
        else:
            self._good = start
        return ""

    def _tolerate(self, error: Exception) -> None:
        if time.monotonic() - self._good >= BLIND_SECONDS:
            raise errors.unavailable("It cannot be told whether you may still watch.") from error
        log.info("recheck_failed", error=repr(error))
        self.next = time.monotonic() + CHECK_SECONDS / 4


class Guard:
    """The checks of all streams that have the same right: one for all, and no stream wakes for it.

    `told` is called when a doubt has been cleared up, and when the streams must end. Each stream enters it; when the
    last has left, it ends and calls `left`.
    """

    def __init__(
        self,
        recheck: Callable[[], Awaitable[None]],
        told: Callable[[], None],
        left: Callable[["Guard"], None],
    ) -> None:
        self._streams = 0
        self._left = left
        self.settled = 0  # doubts that have been cleared up
        self._told = told
        self._checks = Rechecks(recheck)
        self._doubts = 0
        self._doubted = asyncio.Event()
        self._reason: Reason = ""
        self._failure: errors.Error | None = None
        self._task = asyncio.create_task(self._run())

    def doubt(self, doubts: int) -> None:
        """Has it checked at once, when these are more doubts than before."""
        if doubts > self._doubts:
            self._doubts = doubts
            self._doubted.set()

    @property
    def over(self) -> bool:
        """Whether its streams must end."""
        return bool(self._reason or self._failure)

    @property
    def reason_to_end(self) -> Reason:
        """Why. Raises UNAVAILABLE when for BLIND_SECONDS it could not be told whether they may go on."""
        if self._failure is not None:
            raise self._failure
        return self._reason

    def __enter__(self) -> "Guard":
        self._streams += 1
        return self

    def __exit__(self, *_failure: object) -> None:
        self._streams -= 1
        if not self._streams:
            self._task.cancel()
            self._left(self)

    async def _run(self) -> None:
        set_deadline(math.inf)  # it runs for several calls, and has none's
        try:
            while not self._reason:
                doubts = self._doubts
                self._doubted.clear()
                self._reason = await self._checks.reason_to_end(doubts)
                if self.settled < doubts:
                    self.settled = doubts
                    self._told()
                if not self._reason:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(max(0.0, self._checks.next - time.monotonic())):
                            await self._doubted.wait()
        except Exception as failure:
            if isinstance(failure, errors.Error):
                self._failure = failure
            else:
                log.error("guard_failed", exc_info=failure)
                self._failure = errors.internal()
        self._told()


class Guards:
    """The guards of this process."""

    def __init__(self) -> None:
        self._guards: dict[Hashable, Guard] = {}

    def guard(self, key: Hashable, recheck: Callable[[], Awaitable[None]], told: Callable[[], None]) -> Guard:
        """For a stream to enter at once. Those with equal keys have the same right, and share what is given."""
        guard = self._guards.get(key)
        if guard is None or guard.over:  # the right may have come back
            guard = self._guards[key] = Guard(recheck, told, partial(self._forget, key))
        return guard

    def _forget(self, key: Hashable, guard: Guard) -> None:
        if self._guards.get(key) is guard:
            del self._guards[key]


def _next_check(now: float) -> float:
    # All streams of a process check at the same instants, so that one statement reads the grants of all.
    return (now // CHECK_SECONDS + 1) * CHECK_SECONDS
