"""What a process remembers."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from services.chassis.kept import Kept


def test_forgets_what_was_used_longest_ago() -> None:
    kept: Kept[str, int] = Kept(100)
    for number, key in enumerate("abc"):
        kept.keep(key, number, 30)
    assert kept.get("a") == 0
    kept.keep("d", 3, 30)
    assert [kept.get(key) for key in "abcd"] == [0, None, 2, 3]


def test_what_is_larger_than_all_takes_nothing_with_it() -> None:
    kept: Kept[str, int] = Kept(100)
    kept.keep("small", 1, 10)
    kept.keep("other", 1, 90)
    kept.keep("other", 2, 101)
    assert (kept.get("small"), kept.get("other")) == (1, None)
    kept.keep("large", 3, 100)
    assert (kept.get("small"), kept.get("large")) == (None, 3)


@pytest.mark.parametrize("seed", range(20))
def test_does_as_a_slow_one_does(seed: int) -> None:
    dice = random.Random(seed)
    kept: Kept[int, int] = Kept(1_000)
    slow: OrderedDict[int, tuple[int, int]] = OrderedDict()
    for step in range(2_000):
        key = dice.randrange(30)
        if dice.random() < 0.5:
            found = slow.get(key)
            if found is not None:
                slow.move_to_end(key)
            assert kept.get(key) == (None if found is None else found[0])
        else:
            size = dice.randrange(1, 400)
            slow.pop(key, None)
            slow[key] = step, size
            while sum(one for _, one in slow.values()) > 1_000:
                slow.popitem(last=False)
            kept.keep(key, step, size)
