"""Who is sent what when many streams are sent to in rounds."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest

from services.dashboard_svc.rounds import NEVER, Due, Rounds, Turn
from tests.conditions import eventually

LEAST_SECONDS = 0.001


class State:
    """What all streams show: a number that grows, and a word that ends them."""

    def __init__(self) -> None:
        self.number = 1
        self.streams: list[Stream] = []

    def change(self) -> None:
        self.number += 1
        for stream in self.streams:
            stream.turn.look()


class Stream:
    """A client: what it was sent, and whether it reads."""

    def __init__(self, state: State, rounds: Rounds, stack: ExitStack) -> None:
        self.state = state
        self.sent: list[Any] = []
        self.asked = 0
        self.reads = asyncio.Event()
        self.reads.set()
        self.failure: Exception | None = None
        self.turn: Turn = stack.enter_context(rounds.turn(self.due, self.write))
        state.streams.append(self)

    def due(self, now: float) -> Due:
        self.asked += 1
        if self.failure:
            raise self.failure
        newest = self.state.number
        return Due(None if self.sent[-1:] == [newest] else newest)

    async def write(self, message: Any) -> None:
        self.sent.append(message)
        await asyncio.sleep(0.001)
        await self.reads.wait()


async def test_all_have_their_turn_before_one_has_the_next() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)
    with ExitStack() as stack:
        streams = [Stream(state, rounds, stack) for _ in range(300)]
        for _ in range(200):  # faster than a round
            state.change()
            await asyncio.sleep(0)
        await eventually(lambda: all(stream.sent[-1:] == [state.number] for stream in streams))
        turns = [len(stream.sent) for stream in streams]
        assert max(turns) - min(turns) <= 1
        assert all(stream.sent == sorted(set(stream.sent)) for stream in streams)


async def test_who_does_not_read_is_skipped_and_then_sent_the_newest_alone() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)
    with ExitStack() as stack:
        slow, quick = (Stream(state, rounds, stack) for _ in range(2))
        slow.reads.clear()
        await eventually(lambda: slow.sent == [1])
        for _ in range(50):
            state.change()
            await eventually(lambda: quick.sent[-1] == state.number)
        assert (slow.sent, slow.asked) == ([1], 1)
        slow.reads.set()
        await eventually(lambda: len(slow.sent) == 2)
        assert slow.sent == [1, state.number]


async def test_nothing_follows_the_last_message() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)
    with ExitStack() as stack:
        stream = Stream(state, rounds, stack)
        sent: list[Any] = []

        async def write(message: Any) -> None:
            await asyncio.sleep(0)
            sent.append(message)

        last = stack.enter_context(rounds.turn(lambda _: Due("end", last=True), write))
        async with asyncio.timeout(5):
            await last.over
        last.look()
        state.change()
        await eventually(lambda: stream.sent[-1:] == [state.number])
        assert sent == ["end"]


async def test_a_stream_that_fails_ends_alone() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)
    with ExitStack() as stack:
        stays, fails, breaks = (Stream(state, rounds, stack) for _ in range(3))
        await eventually(lambda: all(stream.sent == [1] for stream in state.streams))

        async def broken(_message: Any) -> None:
            await asyncio.sleep(0)
            raise ConnectionError("gone")

        fails.failure = RuntimeError("a fault")
        breaks.turn._write = broken
        state.change()
        with pytest.raises(RuntimeError, match="a fault"):
            await fails.turn.over
        with pytest.raises(ConnectionError):
            await breaks.turn.over
        state.change()
        await eventually(lambda: stays.sent[-1] == state.number)
        assert fails.sent == [1]


async def test_who_has_left_is_asked_nothing_more() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)
    with ExitStack() as stack:
        stays = Stream(state, rounds, stack)
        with ExitStack() as inner:
            leaves = Stream(state, rounds, inner)
            await eventually(lambda: leaves.sent == [1])
            leaves.turn.look()
        asked = leaves.asked
        state.change()
        await eventually(lambda: stays.sent[-1] == state.number)
        assert leaves.asked == asked


async def test_is_asked_again_at_the_times_that_it_has_given() -> None:
    rounds, times = Rounds(LEAST_SECONDS), list[float]()

    async def write(_message: Any) -> None:
        await asyncio.sleep(0)

    def due(now: float) -> Due:
        times.append(now)
        if len(times) % 2:
            return Due(near=now + 0.05, far=now + 0.5)
        return Due("message", far=now + 0.1)

    with rounds.turn(due, write):
        await eventually(lambda: len(times) >= 4)
        steps = [after - before for before, after in pairwise(times)]
        assert min(steps[0], steps[2]) >= 0.05
        assert steps[1] >= 0.1
    asked = len(times)
    with rounds.turn(lambda _: Due(), write) as other:
        await eventually(lambda: not other.asked)
    assert len(times) == asked


async def test_long_rounds_are_further_apart() -> None:
    state, rounds = State(), Rounds(LEAST_SECONDS)

    def busy(_now: float) -> Due:
        time.sleep(0.0005)
        return Due(near=time.monotonic() + rounds.pace)

    async def write(_message: Any) -> None:
        await asyncio.sleep(0)

    with ExitStack() as stack:
        Stream(state, rounds, stack)
        with ExitStack() as inner:
            for _ in range(20):  # ten milliseconds, in all of which nothing else would be done
                inner.enter_context(rounds.turn(busy, write))
            await eventually(lambda: rounds.pace > 0.009)

        def quiet() -> bool:
            state.change()
            return rounds.pace == LEAST_SECONDS

        await eventually(quiet)
    assert rounds.pace < NEVER
