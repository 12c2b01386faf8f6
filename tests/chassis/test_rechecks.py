"""Streams that have the same right are checked together, and end together."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from services.chassis import errors, rechecks
from services.chassis.rechecks import Guards
from tests.conditions import eventually


class Right:
    """A right that can be lost, and how often it was asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.told = 0
        self.failure: errors.Error | None = None

    async def check(self) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.failure:
            raise self.failure

    def end(self) -> None:
        self.told += 1


LOST = errors.not_found("DASHBOARD_NOT_FOUND", "There is no such dashboard.")


@pytest.fixture(autouse=True)
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 60.0)


async def test_a_doubt_is_cleared_up_once_before_any_stream_goes_on() -> None:
    guards, right = Guards(), Right()
    with ExitStack() as stack:
        held = [stack.enter_context(guards.guard("ann", right.check, right.end)) for _ in range(100)]
        assert guards.streams == 100
        assert await asyncio.gather(*(guard.reason_to_end(1) for guard in held)) == [""] * 100
        assert right.asked == 1
        assert await held[0].reason_to_end(1) == ""
        assert right.asked == 1
        right.failure = LOST
        assert await asyncio.gather(*(guard.reason_to_end(2) for guard in held)) == ["ACCESS_LOST"] * 100
        assert (right.asked, right.told) == (2, 1)
    assert guards.streams == 0


async def test_one_right_says_nothing_of_another() -> None:
    guards, ann, bob = Guards(), Right(), Right()
    ann.failure = LOST
    with (
        guards.guard("ann", ann.check, ann.end) as of_ann,
        guards.guard("bob", bob.check, bob.end) as of_bob,
    ):
        assert await of_ann.reason_to_end(1) == "ACCESS_LOST"
        assert await of_bob.reason_to_end(1) == ""


async def test_ends_without_a_doubt_when_the_right_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 0.05)
    guards, right = Guards(), Right()
    with guards.guard("ann", right.check, right.end) as guard:
        await eventually(lambda: right.asked >= 3)
        assert await guard.reason_to_end() == ""
        right.failure = errors.unauthenticated("SESSION_REVOKED", "The session has ended.")
        await eventually(lambda: right.told == 1)
        assert await guard.reason_to_end() == "SESSION_REVOKED"


async def test_a_right_that_has_come_back_is_asked_for_anew() -> None:
    guards, right = Guards(), Right()
    right.failure = LOST
    with guards.guard("ann", right.check, right.end) as before:
        assert await before.reason_to_end(1) == "ACCESS_LOST"
        right.failure = None
        with guards.guard("ann", right.check, right.end) as after:
            assert await after.reason_to_end(1) == ""
        assert await before.reason_to_end(1) == "ACCESS_LOST"


async def test_what_a_check_fails_of_ends_the_streams() -> None:
    guards = Guards()
    right = Right()

    async def broken() -> None:
        raise RuntimeError("a fault")

    with guards.guard("ann", broken, right.end) as guard:
        with pytest.raises(errors.Error) as failure:
            await guard.reason_to_end(1)
        assert failure.value.reason == errors.internal().reason
        await eventually(lambda: right.told == 1)
