import asyncio
import os
import platform
import re
import sys
import threading
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
        nice = os.getpriority(os.PRIO_PROCESS, thread.native_id)
        assert nice > os.getpriority(os.PRIO_PROCESS, 0)
        shown = Path(f"/proc/self/task/{thread.native_id}/sched")
        slices = re.search(r"^se.slice\D+(\d+)", shown.read_text() if shown.exists() else "", re.MULTILINE)
        if nice == 5 and slices:
            assert slices[1] == "100000000"
        assert nice == (5 if _has_slices() and platform.machine() == "x86_64" else 10)
