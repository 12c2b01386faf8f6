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

    def hear(self) -> None:
        self.told += 1


LOST = errors.not_found("DASHBOARD_NOT_FOUND", "There is no such dashboard.")


@pytest.fixture(autouse=True)
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 60.0)


async def test_a_doubt_is_cleared_up_once_for_all_streams() -> None:
    guards, right = Guards(), Right()
    with ExitStack() as stack:
        held = [stack.enter_context(guards.guard("ann", right.check, right.hear)) for _ in range(100)]
        for guard in held:
            guard.doubt(1)
        assert held[0].settled == 0
        await eventually(lambda: right.told == 1)
        assert {(guard.settled, guard.over, guard.reason_to_end) for guard in held} == {(1, False, "")}
        held[0].doubt(1)
        right.failure = LOST
        held[1].doubt(2)
        await eventually(lambda: held[0].over)
        assert {guard.reason_to_end for guard in held} == {"ACCESS_LOST"}
        assert right.asked == 2
        assert right.told >= 2


async def test_one_right_says_nothing_of_another() -> None:
    guards, ann, bob = Guards(), Right(), Right()
    ann.failure = LOST
    with (
        guards.guard("ann", ann.check, ann.hear) as of_ann,
        guards.guard("bob", bob.check, bob.hear) as of_bob,
    ):
        of_ann.doubt(1)
        of_bob.doubt(1)
        await eventually(lambda: of_ann.over and of_bob.settled == 1)
        assert (of_ann.reason_to_end, of_bob.reason_to_end) == ("ACCESS_LOST", "")


async def test_ends_without_a_doubt_when_the_right_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 0.05)
    guards, right = Guards(), Right()
    with guards.guard("ann", right.check, right.hear) as guard:
        await eventually(lambda: right.asked >= 3)
        assert (guard.reason_to_end, right.told) == ("", 0)
        right.failure = errors.unauthenticated("SESSION_REVOKED", "The session has ended.")
        await eventually(lambda: right.told == 1)
        assert guard.reason_to_end == "SESSION_REVOKED"


async def test_a_right_that_has_come_back_is_asked_for_anew() -> None:
    guards, right = Guards(), Right()
    right.failure = LOST
    with guards.guard("ann", right.check, right.hear) as before:
        before.doubt(1)
        await eventually(lambda: before.over)
        right.failure = None
        with guards.guard("ann", right.check, right.hear) as after:
            after.doubt(1)
            await eventually(lambda: after.settled == 1)
            assert not after.over
        assert before.reason_to_end == "ACCESS_LOST"


async def test_what_a_check_fails_of_ends_the_streams() -> None:
    guards = Guards()
    right = Right()

    async def broken() -> None:
        raise RuntimeError("a fault")

    with guards.guard("ann", broken, right.hear) as guard:
        guard.doubt(1)
        await eventually(lambda: right.told == 1)
        assert guard.over
        with pytest.raises(errors.Error) as failure:
            _ = guard.reason_to_end
        assert failure.value.reason == errors.internal().reason
