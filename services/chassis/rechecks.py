"""Whether the client of a stream may still have it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import grpc
import structlog
from sqlalchemy.exc import SQLAlchemyError

from services.chassis import errors

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


def _next_check(now: float) -> float:
    # All streams of a process check at the same instants, so that one statement reads the grants of all.
    return (now // CHECK_SECONDS + 1) * CHECK_SECONDS
