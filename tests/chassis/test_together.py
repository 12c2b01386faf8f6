import asyncio
from collections.abc import Sequence

import pytest

from services.chassis import together as together_module
from services.chassis.together import Together


class Work:
    """Doubles numbers; each batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = asyncio.Semaphore(0)
        self.let_go = asyncio.Semaphore(0)

    async def __call__(self, asked: Sequence[int]) -> list[int]:
        self.batches.append(list(asked))
        self.begun.release()
        await self.let_go.acquire()
        if 0 in asked:
            raise ValueError("nothing to double")
        return [2 * number for number in asked]


def asking(together: Together[int, int], *numbers: int) -> "list[asyncio.Task[int]]":
    return [asyncio.create_task(together.ask(number)) for number in numbers]


async def test_who_asks_meanwhile_is_in_the_next_batch():
    work = Work()
    together = Together(work, seconds=30)
    first = asking(together, 1)
    await work.begun.acquire()
    others = asking(together, 2, 3, 4)
    for _ in range(2):
        work.let_go.release()
    assert await asyncio.gather(*first, *others) == [2, 4, 6, 8]
    assert work.batches == [[1], [2, 3, 4]]


async def test_after_a_pause_one_is_alone_again():
    work = Work()
    together = Together(work, seconds=30)
    for number in (1, 2):
        work.let_go.release()
        assert await together.ask(number) == 2 * number
    assert work.batches == [[1], [2]]


async def test_a_batch_is_bounded():
    work = Work()
    together = Together(work, seconds=30)
    asked = asking(together, *range(1, 251))
    for _ in range(3):
        work.let_go.release()
    assert await asyncio.gather(*asked) == [2 * number for number in range(1, 251)]
    assert [len(batch) for batch in work.batches] == [100, 100, 50]


async def test_a_failure_is_that_of_its_batch():
    work = Work()
    together = Together(work, seconds=30)
    failing = asking(together, 0, 1)
    await work.begun.acquire()
    good = asking(together, 2)
    for _ in range(2):
        work.let_go.release()
    outcomes = await asyncio.gather(*failing, *good, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError, ValueError, int]


async def test_who_goes_away_takes_nobody_along():
    work = Work()
    together = Together(work, seconds=30)
    gone, staying = asking(together, 1, 2)
    await work.begun.acquire()
    gone.cancel()
    work.let_go.release()
    assert await staying == 4
    assert work.batches == [[1, 2]]
    assert gone.cancelled()


async def test_work_that_hangs_is_given_up():
    work = Work()
    together = Together(work, seconds=0.01)
    with pytest.raises(TimeoutError):
        await together.ask(1)
    work.let_go.release()
    assert await together.ask(2) == 4


async def test_company_is_waited_for_until_as_many_are_there_as_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(together_module, "_GATHER_SECONDS", 30)
    work = Work()
    together = Together(work, seconds=30)
    first = asking(together, 1, 2)
    await work.begun.acquire()
    waiting = asking(together, 3)
    work.let_go.release()
    await asyncio.gather(*first)
    waiting += asking(together, 4)
    for _ in range(20):  # rounds of the loop, in which a batch would begin
        await asyncio.sleep(0)
    assert len(work.batches) == 1  # there were three
    waiting += asking(together, 5)
    work.let_go.release()
    assert await asyncio.gather(*waiting) == [6, 8, 10]
    assert work.batches == [[1, 2], [3, 4, 5]]


async def test_few_are_not_kept_waiting():
    work = Work()
    together = Together(work, seconds=30)
    first = asking(together, 1, 2, 3, 4)
    await work.begun.acquire()
    second = asking(together, 5)
    for _ in range(2):
        work.let_go.release()
    assert await asyncio.gather(*first, *second) == [2, 4, 6, 8, 10]
    assert work.batches == [[1, 2, 3, 4], [5]]
