import asyncio
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.chassis import errors
from services.chassis.passwords import Passwords, _has_slices
from services.chassis.settings import PasswordSettings
from tests.harness import make_keys


def make_passwords(tmp_path: Path, **changes: int) -> Passwords:
    keys = make_keys(tmp_path / "keys")
    needed = {
        "redis_url": "",
        "nats_url": "",
        "listen": "",
        "private_listen": "",
        "keys_dir": keys,
        "master_key_file": keys / "master.key",
    }
    return Passwords(PasswordSettings.model_validate({**needed, **changes}))


@pytest.fixture
def passwords(tmp_path: Path) -> Iterator[Passwords]:
    pool = make_passwords(tmp_path)
    yield pool
    pool.close()


async def test_hashes_as_the_cheat_sheet_says(passwords: Passwords):
    first, second = await passwords.hash("correct horse"), await passwords.hash("correct horse")
    assert first.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert first != second
    assert await passwords.verify(first, "correct horse")
    assert not await passwords.verify(first, "correct house")
    assert not await passwords.verify("not a hash", "correct horse")


async def test_without_a_hash_nothing_is_right(passwords: Passwords):
    assert not await passwords.verify(None, "nobody's password")
    assert not await passwords.verify("", "nobody's password")


async def test_two_spellings_of_one_password_are_one(passwords: Passwords):
    composed, decomposed = "caf\u00e9 au lait", "cafe\u0301 au lait"
    assert await passwords.verify(await passwords.hash(composed), decomposed)


async def test_knows_outdated_hashes(passwords: Passwords, tmp_path: Path):
    weaker = make_passwords(tmp_path, password_passes=1)
    assert passwords.is_outdated(await weaker.hash("correct horse"))
    assert not passwords.is_outdated(await passwords.hash("correct horse"))
    weaker.close()


async def test_the_loop_goes_on_while_it_hashes(passwords: Passwords):
    hashing = asyncio.create_task(passwords.hash("correct horse"))
    turns = 0
    while not hashing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10


async def test_refuses_when_too_many_wait_and_recovers(tmp_path: Path):
    pool = make_passwords(tmp_path, password_threads=1, password_queue=2)
    outcomes = await asyncio.gather(*(pool.hash("correct horse") for _ in range(8)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, errors.Error)]
    assert [refusal.reason for refusal in refused] == ["OVERLOADED"] * 5
    assert all(refusal.retry_seconds for refusal in refused)

    # Who gives up frees their place as soon as the thread is done with it.
    giving_up = [asyncio.create_task(pool.hash("correct horse")) for _ in range(3)]
    await asyncio.sleep(0)
    for task in giving_up:
        task.cancel()
    await asyncio.gather(*giving_up, return_exceptions=True)
    async with asyncio.timeout(10):
        while True:
            # All of them, also those that wait behind one that was refused: else they would fill the queue for ever.
            outcomes = await asyncio.gather(
                *(pool.hash("correct horse") for _ in range(3)), return_exceptions=True
            )
            if not any(isinstance(outcome, errors.Error) for outcome in outcomes):
                break
    pool.close()


async def test_its_threads_make_way_for_others(passwords: Passwords):
    await passwords.hash("correct horse")
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("argon2")]
    assert ours
    for thread in ours if sys.platform == "linux" else []:
        assert thread.native_id is not None
        assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 15
        shown = Path(f"/proc/self/task/{thread.native_id}/sched")
        slices = re.search(r"^se.slice\D+(\d+)", shown.read_text() if shown.exists() else "", re.MULTILINE)
        if slices and _has_slices() and platform.machine() == "x86_64":
            assert slices[1] == "100000000"


class Storm:
    """Hashes one after the other, never none under way, and `others` calls for each of them.

    Attributes:
        seen: on which processors the loop and each thread that hashes could run while a hash was under way.
        told: what was said of whether processors are short.
    """

    def __init__(self, passwords: Passwords, *, others: int) -> None:
        self._passwords = passwords
        self._others = others
        self._calls = 0
        self._before = set(threading.enumerate())
        self.seen: list[list[set[int]]] = []
        self.told: list[bool] = []
        passwords.mind_calls(lambda: self._calls, self.told.append)

    async def last(self, seconds: float) -> None:
        """Goes on for so long, and comes to rest."""
        end = time.monotonic() + seconds
        hashes = set[asyncio.Task[str]]()
        while hashes or time.monotonic() < end:
            while len(hashes) < 2 and time.monotonic() < end:
                self._calls += 1 + self._others
                hashes.add(asyncio.create_task(self._passwords.hash("correct horse")))
            _, hashes = await asyncio.wait(hashes, return_when=asyncio.FIRST_COMPLETED)
            self.seen.append(self.allowed())

    def allowed(self) -> list[set[int]]:
        """On which processors the loop may run, and each thread that hashes."""
        begun = set(threading.enumerate()) - self._before
        hashing = [thread.native_id for thread in begun if thread.name.startswith("argon2")]
        assert hashing
        return [os.sched_getaffinity(thread) for thread in [0, *filter(None, hashing)]]


@pytest.fixture
def two_processors() -> Iterator[set[int]]:
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors of Linux")
    all_of_them = os.sched_getaffinity(0)
    two = set(sorted(all_of_them)[:2])
    os.sched_setaffinity(0, two)
    yield two
    os.sched_setaffinity(0, all_of_them)


async def test_hashes_share_the_processor_of_the_loop_while_others_call(
    two_processors: set[int], tmp_path: Path
):
    passwords = make_passwords(tmp_path, password_threads=1)
    storm = Storm(passwords, others=3)
    await storm.last(1.5)
    shared = [seen for seen in storm.seen if seen != [two_processors] * 2]
    # At first nobody knows of others, and at last no hash is under way.
    assert shared
    assert all(loop == hashing and len(loop) == 1 for loop, hashing in shared)
    assert storm.allowed() == [two_processors] * 2
    turns = len(storm.told) // 2
    assert turns
    assert storm.told == [True, False] * turns
    passwords.close()


@pytest.mark.parametrize(("threads", "others"), [(1, 0), (2, 3)])
async def test_hashes_run_where_they_want_while_nobody_else_calls_and_where_there_are_several(
    two_processors: set[int], tmp_path: Path, threads: int, others: int
):
    passwords = make_passwords(tmp_path, password_threads=threads)
    storm = Storm(passwords, others=others)
    await storm.last(1)
    assert storm.seen
    assert all(allowed == two_processors for seen in storm.seen for allowed in seen)
    assert storm.told == []
    passwords.close()


async def test_the_loop_is_set_free_although_the_hash_could_not_be_confined(
    two_processors: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passwords = make_passwords(tmp_path, password_threads=1)
    storm = Storm(passwords, others=3)
    confine, confined = os.sched_setaffinity, list[set[int]]()

    def refuse_all_but_the_loop(thread: int, processors: set[int]) -> None:
        if thread:
            raise PermissionError
        confined.append(processors)
        confine(thread, processors)

    monkeypatch.setattr(os, "sched_setaffinity", refuse_all_but_the_loop)
    await storm.last(1.5)
    assert any(len(processors) == 1 for processors in confined)
    assert storm.allowed() == [two_processors] * 2
    passwords.close()
