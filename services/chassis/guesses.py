"""Counts failed guesses at secrets, and slows down who makes many.

A guess is counted in several ways at once, such as by account and by address. Beyond the free failures each one
doubles a delay. How many guesses may be under way at once is bounded too: one, where a delay has been reached.
Without Redis nobody can tell, and guesses are refused until it is back.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.chassis import errors

_REMEMBER_SECONDS = 3600
_UNDER_WAY_SECONDS = 30  # after a crash in the middle of one

# KEYS: count, delay, under way. ARGV: free failures, how many may be under way before. Gives the milliseconds to wait.
_BEGIN = """
local wait = redis.call('PTTL', KEYS[2])
if wait > 0 then return wait end
local room = tonumber(ARGV[2])
if tonumber(redis.call('GET', KEYS[1]) or '0') >= tonumber(ARGV[1]) then room = 1 end
if tonumber(redis.call('GET', KEYS[3]) or '0') >= room then return 1000 end
redis.call('INCR', KEYS[3])
redis.call('EXPIRE', KEYS[3], ARGV[3])
return 0
"""
# ARGV: free failures, longest delay in seconds, how long failures are remembered.
_FAIL = """
if tonumber(redis.call('GET', KEYS[3]) or '0') > 0 then redis.call('DECR', KEYS[3]) end
local failures = redis.call('INCR', KEYS[1])
redis.call('EXPIRE', KEYS[1], tonumber(ARGV[2]) + tonumber(ARGV[3]))
local beyond = failures - tonumber(ARGV[1])
if beyond > 0 then
  redis.call('SET', KEYS[2], 1, 'EX', math.min(tonumber(ARGV[2]), 2 ^ math.min(beyond - 1, 20)))
end
return failures
"""
# ARGV: whether failures are forgiven.
_LEAVE = """
if tonumber(redis.call('GET', KEYS[3]) or '0') > 0 then redis.call('DECR', KEYS[3]) end
if ARGV[1] == '1' then redis.call('DEL', KEYS[1], KEYS[2]) end
return 0
"""


@dataclass(frozen=True, slots=True)
class Count:
    """One way in which guesses are counted.

    `free` failures cost nothing, a delay has at most `longest_seconds`, `under_way` guesses may be made at once.
    `forgiven` says whether a success forgives; not for an address, whose owner has a secret of their own.
    """

    name: str
    free: int
    longest_seconds: int
    under_way: int
    forgiven: bool


@dataclass
class Attempt:
    """A guess under way. What is not settled was no guess: something else went wrong."""

    right: bool | None = field(default=None)

    def settle(self, right: bool) -> None:
        """Says whether the guess was right."""
        self.right = right


class Counts:
    """The counts of one service, in Redis. `delayed(seconds)` makes the error for who has to wait."""

    def __init__(self, redis: Redis, service: str, delayed: Callable[[float], errors.Error]) -> None:
        self._redis = redis
        self._service = service
        self._delayed = delayed

    @asynccontextmanager
    async def attempt(self, counts: Sequence[Count]) -> AsyncIterator[Attempt]:
        """Surrounds a guess, which says what it was by `settle`.

        Raises what `delayed` makes while a delay lasts, UNAVAILABLE without Redis.
        """
        try:
            await self._begin(counts)
        except asyncio.CancelledError:
            # Who goes away while Redis is asked must not leave a place taken.
            await asyncio.shield(self._finish(counts, None))
            raise
        attempt = Attempt()
        try:
            yield attempt
        finally:
            await self._finish(counts, attempt.right)

    async def check(self, counts: Sequence[Count]) -> None:
        """Raises as `attempt` does, without a guess."""
        await self._begin(counts)
        await self._finish(counts, None)

    async def failed(self, counts: Sequence[Count]) -> None:
        """Counts a failure. Raises as `attempt` does."""
        await self._begin(counts)
        await self._finish(counts, False)

    async def _begin(self, counts: Sequence[Count]) -> None:
        waits = await self._run(_BEGIN, counts, lambda c: [c.free, c.under_way, _UNDER_WAY_SECONDS])
        if any(waits):
            admitted = [count for count, wait in zip(counts, waits, strict=True) if not wait]
            await self._finish(admitted, None)
            raise self._delayed(max(waits) / 1000)

    async def _finish(self, counts: Sequence[Count], right: bool | None) -> None:
        if right is False:
            await self._run(_FAIL, counts, lambda c: [c.free, c.longest_seconds, _REMEMBER_SECONDS])
        else:
            await self._run(_LEAVE, counts, lambda c: [int(bool(right) and c.forgiven)])

    async def _run(
        self, script: str, counts: Sequence[Count], arguments: Callable[[Count], list[int]]
    ) -> list[int]:
        if not counts:
            return []
        try:
            return await self._ask(
                [("EVAL", script, 3, *self._keys(count), *arguments(count)) for count in counts]
            )
        except (RedisError, OSError, TimeoutError):
            raise errors.unavailable("Failed tries cannot be counted.", peer="redis") from None

    async def _ask(self, commands: list[tuple[str | int, ...]]) -> list[int]:
        """The answers, in one round trip; as a pipeline gives them, for half of what that costs."""
        connection: Any = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # theirs
        try:
            await connection.send_packed_command(b"".join(map(_spelled, commands)))
            return [await connection.read_response() for _ in commands]
        except BaseException:  # of its answers some may be on the way, which are nobody else's
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._redis.connection_pool.release(connection)

    def _keys(self, count: Count) -> list[str]:
        # Hashed: addresses of people do not belong in Redis. The braces keep all in one slot of a cluster.
        subject = hashlib.sha256(count.name.encode()).hexdigest()[:32]
        return [f"{self._service}:guesses:{{{subject}}}:{what}" for what in ("count", "delay", "under-way")]


def _spelled(command: Iterable[str | int]) -> bytes:
    """A command of Redis as it is sent (RESP 2); the client itself takes several times as long for it."""
    words = [str(word).encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
