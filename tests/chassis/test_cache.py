import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.user.v1.user_pb2 import User
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from services.chassis import cache as chassis_cache
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from tests.conditions import eventually
from tests.parts import Parts

Users = CachedMessages[User]


class Database:
    """What the cache stands in front of: it counts its readers, who wait while the gate is closed."""

    def __init__(self) -> None:
        self.titles: dict[str, str] = {}
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, key: str) -> User | None:
        self.reads += 1
        title = self.titles.get(key)
        await self.gate.wait()
        return None if title is None else User(user_id=key, display_name=title)

    async def through(self, users: Users, key: str) -> str | None:
        user = await users.get(key, lambda: self.read(key))
        return None if user is None else user.display_name


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
async def pair(parts: Parts, bus: Bus) -> AsyncIterator[tuple[Users, Users]]:
    """The same cache in two processes of one service."""
    service = uuid4().hex
    other_bus = await Bus.connect(parts.nats_url, "other")
    caches = [await Cache.connect(parts.redis_url, each, service) for each in (bus, other_bus)]
    yield CachedMessages(caches[0], "users", User), CachedMessages(caches[1], "users", User)
    for cache in caches:
        await cache.close()
    await other_bus.close()


@pytest.fixture
def users(pair: tuple[Users, Users]) -> Users:
    return pair[0]


@pytest.fixture
def other(pair: tuple[Users, Users]) -> Users:
    return pair[1]


async def have_heard(pair: tuple[Users, Users]) -> None:
    """Returns when each process has heard of all that the other has invalidated: the bus keeps their order."""
    for speaker, hearer in (pair, pair[::-1]):
        key, database = uuid4().hex, Database()
        database.titles[key] = "heard"
        await database.through(hearer, key)
        await speaker.invalidate(key)
        await eventually(partial(_is_forgotten, hearer, key))


def _is_forgotten(users: Users, key: str) -> bool:
    return users.peek(key) is None


async def test_reads_from_the_nearest_place(users: Users, other: Users, database: Database) -> None:
    database.titles["k"] = "Ada"
    assert users.peek("k") is None
    assert [await database.through(users, "k") for _ in range(3)] == ["Ada"] * 3
    assert await database.through(other, "k") == "Ada"
    assert database.reads == 1
    assert users.peek("k") == User(user_id="k", display_name="Ada")


async def test_absence_is_not_remembered(users: Users, database: Database) -> None:
    assert await database.through(users, "k") is None
    database.titles["k"] = "Ada"
    assert await database.through(users, "k") == "Ada"


async def test_a_hundred_readers_load_once(users: Users, database: Database) -> None:
    database.titles["k"] = "Ada"
    database.gate.clear()
    readers = [asyncio.create_task(database.through(users, "k")) for _ in range(100)]
    await eventually(lambda: database.reads == 1)
    database.gate.set()
    assert await asyncio.gather(*readers) == ["Ada"] * 100
    assert database.reads == 1


async def test_all_who_wait_get_the_loaders_error(users: Users) -> None:
    async def fail() -> User | None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    outcomes = await asyncio.gather(*(users.get("k", fail) for _ in range(5)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * 5


async def test_a_cancelled_reader_does_not_spoil_the_others(users: Users, database: Database) -> None:
    database.titles["k"] = "Ada"
    database.gate.clear()
    first, second = (asyncio.create_task(database.through(users, "k")) for _ in range(2))
    await eventually(lambda: database.reads == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    database.gate.set()
    assert await second == "Ada"
    assert database.reads == 1


async def test_the_last_cancelled_reader_cancels_the_load(users: Users, database: Database) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def load() -> User | None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return None

    reader = asyncio.create_task(users.get("k", load))
    await asyncio.wait_for(began.wait(), 5)
    reader.cancel()
    with suppress(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(cancelled.wait(), 5)
    database.titles["k"] = "Ada"
    assert await database.through(users, "k") == "Ada"


async def test_a_change_is_seen_everywhere(users: Users, other: Users, database: Database) -> None:
    database.titles["k"] = "Ada"
    assert [await database.through(each, "k") for each in (users, other)] == ["Ada", "Ada"]
    database.titles["k"] = "Grace"
    await users.invalidate("k")
    assert await database.through(users, "k") == "Grace"
    await eventually(lambda: other.peek("k") is None, seconds=1)  # the bus is faster than the recheck
    assert await database.through(other, "k") == "Grace"
    assert database.reads == 2


@pytest.mark.parametrize("writer", [0, 1])
async def test_a_late_reader_does_not_put_the_old_value_back(
    pair: tuple[Users, Users], database: Database, writer: int
) -> None:
    """It has read the old row, and is slow to store it; the writer is in its own or in another process."""
    late, fast = pair[0], pair[writer]
    database.titles["k"] = "old"
    database.gate.clear()
    reading = asyncio.create_task(database.through(late, "k"))
    await eventually(lambda: database.reads == 1)
    database.titles["k"] = "new"
    await fast.invalidate("k")
    await have_heard(pair)
    database.gate.set()
    assert await reading == "old"  # it began before the change
    assert [await database.through(each, "k") for each in pair] == ["new", "new"]


async def test_who_comes_after_a_change_does_not_join_an_older_load(users: Users, database: Database) -> None:
    database.titles["k"] = "old"
    database.gate.clear()
    before = asyncio.create_task(database.through(users, "k"))
    await eventually(lambda: database.reads == 1)
    database.titles["k"] = "new"
    await users.invalidate("k")
    after = asyncio.create_task(database.through(users, "k"))
    await eventually(lambda: database.reads == 2)
    database.gate.set()
    assert (await before, await after) == ("old", "new")
    assert await database.through(users, "k") == "new"


steps = st.lists(
    st.tuples(st.sampled_from(["read", "write", "forget", "finish"]), st.integers(0, 1)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
async def test_in_any_order_the_last_write_is_what_stays(
    pair: tuple[Users, Users], steps: list[tuple[str, int]]
) -> None:
    """Reads begin, hang in the loader and end in any order between writes and losses of memory."""
    key, database = uuid4().hex, Database()
    database.titles[key] = "0"
    reading: list[tuple[asyncio.Task[str | None], asyncio.Event]] = []
    for number, (step, process) in enumerate(steps):
        if step == "read":
            database.gate = asyncio.Event()
            task = asyncio.create_task(database.through(pair[process], key))
            reading.append((task, database.gate))
            await asyncio.sleep(0.002)
        elif step == "write":
            database.titles[key] = str(number + 1)
            await pair[process].invalidate(key)
        elif step == "forget":
            pair[process].forget_all()
        elif reading:
            reading.pop(process % len(reading))[1].set()
    for _, gate in reading:
        gate.set()
    database.gate = asyncio.Event()
    database.gate.set()
    await asyncio.gather(*(task for task, _ in reading))
    await have_heard(pair)
    for users in pair:
        assert await database.through(users, key) == database.titles[key]
    for users in pair:
        users.forget_all()
        assert await database.through(users, key) == database.titles[key]  # and in Redis


async def test_without_the_bus_memory_is_rechecked(
    users: Users, other: Users, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chassis_cache, "RECHECK_SECONDS", 0.3)
    database.titles["k"] = "old"
    assert await database.through(other, "k") == "old"

    async def lose(_name: str, _key: str) -> None:
        return

    monkeypatch.setattr(users._cache, "tell", lose)
    database.titles["k"] = "new"
    await users.invalidate("k")
    began = time.monotonic()
    while await database.through(other, "k") == "old":
        assert time.monotonic() - began < 0.5
    assert database.reads == 2


async def test_a_recheck_that_finds_the_same_version_loads_nothing(
    users: Users, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chassis_cache, "RECHECK_SECONDS", 0.0)
    database.titles["k"] = "Ada"
    for _ in range(5):
        assert await database.through(users, "k") == "Ada"
        assert users.peek("k") is None
    assert database.reads == 1


async def test_values_expire(parts: Parts, bus: Bus, database: Database) -> None:
    cache = await Cache.connect(parts.redis_url, bus, uuid4().hex)
    users = CachedMessages(cache, "users", User, ttl_seconds=0.2)
    database.titles["k"] = "Ada"
    await database.through(users, "k")
    assert database.reads == 1
    await eventually(lambda: users.peek("k") is None, seconds=1)
    redis = Redis.from_url(parts.redis_url)
    await eventually(lambda: is_absent(redis, users._value_key("k")), seconds=1)
    await redis.aclose()
    await database.through(users, "k")
    assert database.reads == 2
    await cache.close()


async def is_absent(redis: Redis, key: str) -> bool:
    return not await redis.exists(key)


async def test_memory_is_bounded_and_keeps_what_is_used(parts: Parts, bus: Bus, database: Database) -> None:
    cache = await Cache.connect(parts.redis_url, bus, uuid4().hex)
    users = CachedMessages(cache, "users", User, max_entries=3)
    for key in ("a", "b", "c"):
        database.titles[key] = key
        await database.through(users, key)
    users.peek("a")
    database.titles["d"] = "d"
    await database.through(users, "d")
    assert [key for key in "abcd" if users.peek(key)] == ["a", "c", "d"]
    await cache.close()


async def test_a_value_that_cannot_be_read_is_loaded(
    parts: Parts, users: Users, other: Users, database: Database
) -> None:
    database.titles["k"] = "Ada"
    await database.through(users, "k")
    redis = Redis.from_url(parts.redis_url)
    stored = await redis.get(users._value_key("k"))
    assert isinstance(stored, bytes)
    await redis.set(users._value_key("k"), stored[:16] + b"\xff")
    await redis.aclose()
    assert await database.through(other, "k") == "Ada"
    assert database.reads == 2


async def test_without_redis_values_are_loaded(parts: Parts, users: Users, database: Database) -> None:
    database.titles["k"] = "old"
    await database.through(users, "k")
    await parts.supervisor.stop("valkey")
    database.titles["k"] = "new"
    await users.invalidate("k")
    assert await database.through(users, "k") == "new"
    database.titles["l"] = "other"
    assert await database.through(users, "l") == "other"
    await parts.supervisor.start("valkey")
    await eventually(lambda: not users._cache.is_behind(users._version_key("k")))
    assert await database.through(users, "k") == "new"


async def test_a_redis_that_hangs_costs_little(parts: Parts, users: Users, database: Database) -> None:
    database.titles |= {str(n): "x" for n in range(20)}
    await database.through(users, "0")
    parts.supervisor.kill("valkey", signal.SIGSTOP)
    began = time.monotonic()
    for n in range(1, 20):
        assert await database.through(users, str(n)) == "x"
    assert time.monotonic() - began < 1.5
    parts.supervisor.kill("valkey", signal.SIGCONT)


async def test_a_change_that_redis_does_not_take_reaches_it_later(
    parts: Parts, users: Users, other: Users, database: Database
) -> None:
    """It still answers with the old version meanwhile: the writer does not believe it."""
    database.titles["k"] = "old"
    await database.through(other, "k")
    redis = Redis.from_url(parts.redis_url)
    await redis.client_pause(60_000, all=False)  # writes wait, reads do not
    database.titles["k"] = "new"
    await users.invalidate("k")
    users._cache._away_until = 0.0
    assert await database.through(users, "k") == "new"
    await redis.client_unpause()
    await eventually(lambda: not users._cache.is_behind(users._version_key("k")))
    for each in (users, other):
        each.forget_all()
        assert await database.through(each, "k") == "new"
    await redis.aclose()


async def test_a_change_is_seen_although_its_call_was_cancelled(
    parts: Parts, users: Users, other: Users, database: Database
) -> None:
    database.titles["k"] = "old"
    assert [await database.through(each, "k") for each in (users, other)] == ["old", "old"]
    redis = Redis.from_url(parts.redis_url)
    await redis.client_pause(100, all=False)
    database.titles["k"] = "new"
    call = asyncio.create_task(users.invalidate("k"))
    await asyncio.sleep(0.03)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await eventually(lambda: other.peek("k") is None, seconds=1)
    assert [await database.through(each, "k") for each in (users, other)] == ["new", "new"]
    assert not users._cache.is_behind(users._version_key("k"))
    await redis.aclose()


async def test_a_gap_of_the_bus_empties_memory(parts: Parts, users: Users, database: Database) -> None:
    database.titles["k"] = "Ada"
    await database.through(users, "k")
    await parts.supervisor.stop("nats")
    await eventually(lambda: users.peek("k") is None, seconds=1)
    assert await database.through(users, "k") == "Ada"
    assert database.reads == 1  # Redis has it
    await parts.supervisor.start("nats")


async def test_reads_are_counted_by_layer(parts: Parts, bus: Bus, database: Database) -> None:
    cache = await Cache.connect(parts.redis_url, bus, uuid4().hex)
    name = uuid4().hex
    users = CachedMessages(cache, name, User)
    database.titles["k"] = "Ada"
    for _ in range(3):
        await database.through(users, "k")
    users.forget_all()
    await database.through(users, "k")

    def reads(layer: str) -> float | None:
        return REGISTRY.get_sample_value("meshboard_cache_reads_total", {"name": name, "layer": layer})

    assert (reads("loader"), reads("process"), reads("redis")) == (1, 2, 1)
    await cache.close()


async def test_a_name_is_taken_once(users: Users) -> None:
    with pytest.raises(ValueError, match="users"):
        CachedMessages(users._cache, "users", User)
