"""What `Guesses` counts, and by what; the policy as a whole is held in tests/security/test_guessing.py."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.auth_svc.guesses import Guesses
from services.auth_svc.origins import Origin
from services.chassis import errors
from tests.auth_svc.conftest import Services
from tests.harness import new_id
from tests.parts import Parts

HERE = Origin("192.0.2.1")


@pytest.fixture
async def redis(parts: Parts) -> AsyncIterator[Redis]:
    client = Redis.from_url(parts.redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def guesses(redis: Redis, services: Services) -> Guesses:
    return Guesses(redis, services.auth_settings, bytes(32))


async def guess(guesses: Guesses, subject: str, right: bool = False, device: str = "") -> str:
    """Nothing, or the reason why the guess was not let through."""
    try:
        async with guesses.attempt("test", subject, HERE, device) as attempt:
            attempt.settle(right)
    except errors.Error as error:
        return error.reason
    return ""


def test_a_device_token_has_one_spelling_and_one_account(guesses: Guesses):
    ann, bob = new_id(), new_id()
    token = guesses.device_token(ann)
    assert guesses.knows_device(ann, token)
    assert not guesses.knows_device(bob, token)
    middle = len(token) // 2
    others = [
        token + "=",
        token + "!",
        token.removeprefix("mbd_"),
        token[:middle] + "\n" + token[middle:],
        token[:-1],
        "",
        "mbd_",
    ]
    assert [spelling for spelling in others if guesses.knows_device(ann, spelling)] == []


async def test_a_known_device_is_counted_by_itself(guesses: Guesses):
    subject, device = new_id(), guesses.device_token(new_id())
    for _ in range(6):
        assert await guess(guesses, subject) == ""
    assert await guess(guesses, subject) == "SIGN_IN_DELAYED"
    for _ in range(6):
        assert await guess(guesses, subject, device=device) == ""
    assert await guess(guesses, subject, device=device) == "SIGN_IN_DELAYED"


async def test_who_goes_away_leaves_no_place_taken(guesses: Guesses, redis: Redis):
    subject = new_id()

    async def give_up() -> None:
        async with guesses.attempt("test", subject, HERE):
            await asyncio.Event().wait()

    for pause in (0, 0.001, 0.01):
        for _ in range(20):
            task = asyncio.create_task(give_up())
            await asyncio.sleep(pause)
            while not task.done():  # the client of Redis can lose a cancellation that comes with its answer
                task.cancel()
                await asyncio.wait([task], timeout=0.05)
    for _ in range(5):
        assert await guess(guesses, subject) == ""
    under_way = [int(await redis.get(key) or 0) async for key in redis.scan_iter("auth:guesses:*under-way")]
    assert set(under_way) <= {0}


async def test_places_that_were_forgotten_are_not_given_back(guesses: Guesses, redis: Redis):
    """As after an emptied Redis, in the middle of a guess."""
    subject = new_id()
    async with guesses.attempt("test", subject, HERE) as attempt:
        for key in [key async for key in redis.scan_iter("auth:guesses:*")]:
            await redis.delete(key)
        attempt.settle(True)
    under_way = [int(await redis.get(key) or 0) async for key in redis.scan_iter("auth:guesses:*under-way")]
    assert min(under_way, default=0) >= 0
