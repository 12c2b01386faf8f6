"""Messages that are read often: from the process, else from Redis, else from whoever can load them.

Beside each value Redis holds the version of its key, a random token. A reader notes the version before it loads,
and what it stores counts only under that version; `invalidate` replaces the version. So a slow reader cannot put
back what a writer has just replaced, and an expired or evicted version only makes values unreachable.

A process answers from its own memory for 2 s, then it asks Redis whether the version still holds. Invalidations
also travel over the bus and are normally heard at once; what is lost with a connection costs those 2 s at most.
Without Redis values come from the loader. Nothing here raises because Redis or the bus is away.
"""

import asyncio
import contextlib
import os
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message
from prometheus_client import Counter
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.chassis import telemetry
from services.chassis.bus import Bus, Received

log = structlog.get_logger(__name__)

RECHECK_SECONDS = 2.0

_REDIS_SECONDS = 0.25
_REDIS_PAUSE_SECONDS = 1.0
_VERSION_BYTES = 16
_VERSION_SECONDS = 86_400

_reads = Counter("meshboard_cache_reads", "Reads by the layer that answered.", ["name", "layer"])

T = TypeVar("T", bound=Message)


class RedisAway(Exception):
    """Redis does not answer, or did not a moment ago."""


class Cache:
    """The caches of one service, in one process. Redis may serve several services."""

    def __init__(self, redis: Redis, bus: Bus, service: str) -> None:
        self.service = service
        self._redis = redis
        self._bus = bus
        self._away_until = 0.0
        self._named: dict[str, CachedMessages[Any]] = {}
        self._unsaved: dict[str, bytes] = {}  # versions that Redis has not taken yet
        self._saving: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, redis_url: str, bus: Bus, service: str) -> "Cache":
        """`redis_url` is `redis://host:port` or `unix:///path`; nobody need answer there yet."""
        redis = Redis.from_url(
            redis_url,
            socket_timeout=_REDIS_SECONDS,
            socket_connect_timeout=_REDIS_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        cache = cls(redis, bus, service)
        await bus.listen(f"cache.{service}.*", cache._hear)
        bus.on_gap(cache._forget)
        return cache

    async def close(self) -> None:
        """Disconnects from Redis."""
        if self._saving is not None:
            self._saving.cancel()
        await self._redis.aclose()

    def register(self, messages: "CachedMessages[Any]") -> None:
        """Has invalidations from other processes passed on to `messages`. Raises ValueError for a second name."""
        if messages.name in self._named:
            raise ValueError(f"there is a cache named {messages.name}")
        self._named[messages.name] = messages

    def is_behind(self, version_key: str) -> bool:
        """Whether Redis still has a version that was replaced."""
        return version_key in self._unsaved

    async def ask(self, *command: str | bytes | int) -> Any:
        """Runs a command in Redis. Raises RedisAway, after a failure at once for a second."""
        if time.monotonic() < self._away_until:
            raise RedisAway
        try:
            with telemetry.span(f"redis {command[0]!s}", "CLIENT"):
                return await self._redis.execute_command(*command)  # type: ignore[no-untyped-call]  # theirs
        except (OSError, TimeoutError, RedisError) as error:
            log.warning("redis_away", service=self.service, error=repr(error))
            self._away_until = time.monotonic() + _REDIS_PAUSE_SECONDS
            raise RedisAway from error

    async def replace_version(self, version_key: str) -> None:
        """Gives a key a new version, sooner or later: when Redis is away, as soon as it is back."""
        self._unsaved[version_key] = os.urandom(_VERSION_BYTES)
        try:
            await self._save_version(version_key)
        except RedisAway:
            if self._saving is None or self._saving.done():
                self._saving = asyncio.create_task(self._save_versions())

    async def tell(self, name: str, key: str) -> None:
        """Tells the other processes that the value of a key has changed."""
        await self._bus.emit(f"cache.{self.service}.{name}", key.encode())

    async def _save_version(self, version_key: str) -> None:
        version = self._unsaved[version_key]
        await self.ask("SET", version_key, version, "EX", _VERSION_SECONDS)
        if self._unsaved.get(version_key) == version:
            del self._unsaved[version_key]

    async def _save_versions(self) -> None:
        while self._unsaved:
            try:
                await self._save_version(next(iter(self._unsaved)))
            except RedisAway:
                await asyncio.sleep(_REDIS_PAUSE_SECONDS / 2)

    def _hear(self, message: Received) -> None:
        messages = self._named.get(message.subject.rpartition(".")[2])
        if messages is not None:
            messages.forget(message.payload.decode())

    def _forget(self) -> None:
        for messages in self._named.values():
            messages.forget_all()


@dataclass(slots=True)
class _Entry(Generic[T]):
    value: T
    version: bytes | None  # None: loaded while Redis was away
    usable_until: float
    expires: float


@dataclass(eq=False, slots=True)
class _Flight(Generic[T]):
    """A read under way for all who want the key now."""

    task: "asyncio.Task[T | None]"
    waiting: int = 0
    outdated: bool = False  # the key was invalidated meanwhile: give the result, but do not keep it


class CachedMessages(Generic[T]):
    """Messages of one type by key.

    The messages are shared by all readers in the process: copy one before changing it.
    """

    def __init__(
        self,
        cache: Cache,
        name: str,
        message_type: type[T],
        *,
        ttl_seconds: float = 60,
        max_entries: int = 10_000,
    ) -> None:
        """`name` is unique in the service. A value lives for `ttl_seconds`, give or take a tenth."""
        self.name = name
        self._cache = cache
        self._message_type = message_type
        self._ttl_seconds = ttl_seconds
        self._max_entries = max_entries
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._flights: dict[str, _Flight[T]] = {}
        self._invalidations: set[asyncio.Task[None]] = set()
        self._process_reads = _reads.labels(name, "process")
        self._redis_reads = _reads.labels(name, "redis")
        self._loader_reads = _reads.labels(name, "loader")
        cache.register(self)

    def peek(self, key: str) -> T | None:
        """The value if this process may answer at once, else None."""
        entry = self._entries.get(key)
        if entry is None or time.monotonic() >= entry.usable_until:
            return None
        self._entries.move_to_end(key)
        self._process_reads.inc()
        return entry.value

    async def get(self, key: str, load: Callable[[], Awaitable[T | None]]) -> T | None:
        """The value of `key`, from the nearest place that has it; `load` gives None for what does not exist.

        Absence is not remembered. At most one `load` per key runs at a time, for all who wait, until the last
        of them is cancelled; so it must not depend on who asks. What it raises, all of them get.
        """
        value = self.peek(key)
        if value is not None:
            return value
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = self._take_off(key, load)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                flight.task.cancel()
                self._land(key, flight)

    async def invalidate(self, key: str) -> None:
        """Forgets a value everywhere. Call it after the commit of the change.

        Once this returns, this process never gives the old value; others learn of it within milliseconds, or,
        cut off from the bus, in 2 s. Only where Redis does not take the new version may another process find
        the old value there, until Redis answers again or `ttl_seconds` have passed.
        """
        # Once begun it is done to the end, also when the call that it belongs to is cancelled.
        task = asyncio.create_task(self._invalidate(key))
        self._invalidations.add(task)
        task.add_done_callback(self._invalidations.discard)
        await asyncio.shield(task)

    async def _invalidate(self, key: str) -> None:
        await self._cache.replace_version(self._version_key(key))
        self.forget(key)
        await self._cache.tell(self.name, key)

    def forget(self, key: str) -> None:
        """Forgets what this process knows of a key."""
        self._entries.pop(key, None)
        flight = self._flights.pop(key, None)
        if flight is not None:
            flight.outdated = True

    def forget_all(self) -> None:
        """Forgets what this process knows."""
        self._entries.clear()
        for key in list(self._flights):
            self.forget(key)

    def _take_off(self, key: str, load: Callable[[], Awaitable[T | None]]) -> "_Flight[T]":
        async def fly() -> T | None:
            try:
                entry = await self._read(key, load)
                if entry is None:
                    return None
                if not flight.outdated:
                    self._keep(key, entry)
                return entry.value
            finally:
                self._land(key, flight)

        flight: _Flight[T] = _Flight(asyncio.create_task(fly()))
        return flight

    def _land(self, key: str, flight: "_Flight[T]") -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _keep(self, key: str, entry: _Entry[T]) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def _read(self, key: str, load: Callable[[], Awaitable[T | None]]) -> _Entry[T] | None:
        begun = time.monotonic()  # what is read from here on was true at this time
        try:
            version, entry = await self._read_redis(key, begun)
        except RedisAway:
            version, entry = None, None
        if entry is not None:
            self._redis_reads.inc()
            return entry
        self._loader_reads.inc()
        value = await load()
        if value is None:
            return None
        ttl_seconds = self._ttl_seconds * random.uniform(0.9, 1.1)  # noqa: S311 - spreads expiry, no secret
        if version is not None:
            with contextlib.suppress(RedisAway):
                await self._cache.ask(
                    "SET",
                    self._value_key(key),
                    version + value.SerializeToString(),
                    "PX",
                    max(1, int(ttl_seconds * 1000)),
                )
        return _entry(value, version, begun, begun + ttl_seconds)

    async def _read_redis(self, key: str, begun: float) -> tuple[bytes, _Entry[T] | None]:
        version_key = self._version_key(key)
        if self._cache.is_behind(version_key):
            raise RedisAway
        known = self._entries.get(key)
        if known is not None and begun < known.expires:
            version = await self._cache.ask("GET", version_key)
            if version is not None and version == known.version:
                return version, _entry(known.value, version, begun, known.expires)
        version, stored = await self._cache.ask("MGET", version_key, self._value_key(key))
        if version is None:
            version = os.urandom(_VERSION_BYTES)
            # NX and GET: of several who find no version, the first one's counts.
            taken = await self._cache.ask("SET", version_key, version, "NX", "GET", "EX", _VERSION_SECONDS)
            return taken or version, None
        if stored is None or stored[:_VERSION_BYTES] != version:
            return version, None
        try:
            value = self._message_type.FromString(stored[_VERSION_BYTES:])
        except DecodeError:  # another release wrote it
            return version, None
        return version, _entry(value, version, begun, begun + self._ttl_seconds)

    def _version_key(self, key: str) -> str:
        # Braces put both keys into one slot of a Redis Cluster.
        return f"{self._cache.service}.{self.name}.{{{key}}}.version"

    def _value_key(self, key: str) -> str:
        return f"{self._cache.service}.{self.name}.{{{key}}}.value"


def _entry(value: T, version: bytes | None, begun: float, expires: float) -> _Entry[T]:
    return _Entry(value, version, min(begun + RECHECK_SECONDS, expires), expires)
