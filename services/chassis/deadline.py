"""The time that a call has left."""

from __future__ import annotations

import time
from contextvars import ContextVar

_deadline: ContextVar[float] = ContextVar("deadline")


def set_deadline(seconds: float) -> None:
    """Notes that the call this code runs for has this many seconds."""
    _deadline.set(time.monotonic() + seconds)


def seconds_left() -> float:
    """Seconds until the call's deadline; infinite outside of a call. Never negative."""
    deadline = _deadline.get(float("inf"))
    return max(0.0, deadline - time.monotonic())
