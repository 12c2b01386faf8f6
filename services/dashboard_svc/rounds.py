"""Sends what thousands of streams are sent, in rounds: who has waited longest comes first.

None of the streams has a task that wakes up for a message: with as many, to wake up and to go back to sleep would cost
more than the message. One stream after another is asked what it sends now, so that it is always the newest; one whose
client does not read, or has not read yet, is not asked. A round takes as long as it takes: what changes meanwhile is in
the messages to those who have not had their turn.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, NamedTuple

from services.chassis.interceptor import Write

# What else the process does has its turn after so much time of sending.
SLICE_SECONDS = 0.001
# The share of the time that sending may take, as measured over so many seconds.
SHARE = 0.8
MEASURED_SECONDS = 0.25
MOST_SECONDS = 1.0
NEVER = math.inf


class Due(NamedTuple):
    """What a stream sends now, None for nothing, and whether it is the last.

    It is to be asked again at `near`, of which a stream has many, and at `far`, which only grows.
    """

    message: Any = None
    last: bool = False
    near: float = NEVER
    far: float = NEVER


class Turn:
    """A stream, in the rounds from when it is entered until it is left.

    `over` is done behind its last message, or when `due` has raised or it cannot be sent.
    """

    __slots__ = ("_coroutine", "_due", "_rounds", "_write", "asked", "far", "last", "near", "over", "writing")

    def __init__(self, rounds: Rounds, due: Callable[[float], Due], write: Write) -> None:
        self._rounds = rounds
        self._due = due
        self._write = write
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked = False  # waits for its turn, or for the end of the write to do so
        self.writing = False
        self.last = False
        self.near = self.far = NEVER

    def __enter__(self) -> Turn:
        self._rounds.enter()
        self.look()
        return self

    def __exit__(self, *_failure: object) -> None:
        if not self.over.cancel() and not self.over.cancelled():
            self.over.exception()  # noticed, also when the call has been cancelled meanwhile
        self._rounds.leave()

    def look(self) -> None:
        """Has the stream asked what it sends as soon as all those who wait have been."""
        if not self.asked:
            self.asked = True
            if not self.writing:
                self._rounds.queue(self)

    def take(self, now: float) -> None:
        """Has its turn."""
        self.asked = False
        if self.over.done():
            return
        try:
            message, self.last, near, far = self._due(now)
        except Exception as failure:
            self.over.set_exception(failure)
            return
        self._rounds.wake_at(self, near, far)
        if message is not None:
            self.writing = True
            self._coroutine = self._write(message)
            self._go_on(None)

    def _go_on(self, _done: asyncio.Future[None] | None) -> None:
        """Drives the write to its next wait, or its end, as a task would."""
        assert self._coroutine is not None
        try:
            waits_for = self._coroutine.send(None)
        except StopIteration:
            self._written()
        except asyncio.CancelledError:
            self.over.cancel()
        except Exception as failure:
            if not self.over.done():
                self.over.set_exception(failure)
        else:
            if waits_for is None:  # it only lets others go first
                asyncio.get_running_loop().call_soon(self._go_on, None, context=self._rounds.context)
                return
            waits_for._asyncio_future_blocking = False  # the answer to what `Future.__await__` asks of a task
            waits_for.add_done_callback(self._go_on, context=self._rounds.context)

    def _written(self) -> None:
        self._coroutine, self.writing = None, False
        if self.last and not self.over.done():
            self.over.set_result(None)
        elif self.asked:
            self._rounds.queue(self)


class Rounds:
    """The streams of this process."""

    def __init__(self, least_seconds: float) -> None:
        """The `pace`, seconds from one message of a stream to the next, is never below `least_seconds`."""
        self.context = Context()  # of none of the streams' calls
        self.pace = self._least_seconds = least_seconds
        self._streams = 0
        self._waiting: deque[Turn] = deque()
        self._later: list[tuple[float, int, bool, Turn]] = []  # a heap; whether the time is a near one
        self._number = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._timer_time = NEVER
        self._sending_since: float | None = None
        self._sent_seconds = 0.0
        self._measured_since = 0.0

    def turn(self, due: Callable[[float], Due], write: Write) -> Turn:
        """A stream that is asked by `due`, with the monotonic clock's time, what it sends by `write`."""
        return Turn(self, due, write)

    # Called by turns

    def enter(self) -> None:
        """Counts a stream in."""
        self._streams += 1

    def leave(self) -> None:
        """Counts it out."""
        self._streams -= 1
        if not self._streams:
            self._rest()

    def queue(self, turn: Turn) -> None:
        """Puts it behind those who wait."""
        self._waiting.append(turn)
        self._go_on_at(0.0)

    def wake_at(self, turn: Turn, near: float, far: float) -> None:
        """Has it look at these times."""
        if near < turn.near:
            turn.near = near
            heapq.heappush(self._later, (near, next(self._number), True, turn))
            self._go_on_at(near)
        if far < turn.far:
            turn.far = far
            heapq.heappush(self._later, (far, next(self._number), False, turn))
            self._go_on_at(far)

    # The work

    def _go_on_at(self, at: float) -> None:
        if at < self._timer_time:
            if self._timer is not None:
                self._timer.cancel()
            loop, seconds = asyncio.get_running_loop(), at - time.monotonic()
            if seconds > 0:
                self._timer = loop.call_later(seconds, self._go_on, context=self.context)
            else:
                self._timer = loop.call_soon(self._go_on, context=self.context)
            self._timer_time = at

    def _go_on(self) -> None:
        self._timer, self._timer_time = None, -NEVER  # it goes on already
        start = now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, near, turn = heapq.heappop(self._later)
            if near:
                turn.near = NEVER
            else:
                turn.far = NEVER
            turn.look()
        while self._waiting and now < start + SLICE_SECONDS:
            self._waiting.popleft().take(now)
            now = time.monotonic()
        self._measure(start, now)
        self._timer_time = NEVER
        if self._waiting:
            self._go_on_at(0.0)
        elif self._later:
            self._go_on_at(self._later[0][0])

    def _measure(self, start: float, now: float) -> None:
        """Sets the pace by how much of the time has gone into sending: longer rounds are further apart."""
        if self._sending_since is None:
            self._sending_since = start
        over = now >= self._measured_since + MEASURED_SECONDS
        if over or not self._waiting:
            self._sent_seconds += now - self._sending_since
            self._sending_since = now if self._waiting else None
        if over:
            share = self._sent_seconds / (now - self._measured_since)
            self.pace = min(MOST_SECONDS, max(self._least_seconds, self.pace * share / SHARE))
            self._sent_seconds, self._measured_since = 0.0, now

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_time = None, NEVER
        self._waiting.clear()
        self._later.clear()
