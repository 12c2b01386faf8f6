"""Slows down who guesses passwords and codes, without locking anyone else out.

Failures are counted three ways: by account and address together, by account, and by address. Beyond the free ones each
failure doubles a delay. A device that the account was used on before shows it by its device token, and is counted by
itself alone: so guesses from elsewhere cost the owner of the account nothing (OWASP, "Slow Down Online Guessing Attacks
with Device Cookies"). Unknown accounts count like known ones. How many guesses may be under way at once is bounded too:
one, where a delay has been reached. Without Redis nobody can tell, and guesses are refused until it is back.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.chassis import errors

DEVICE_PREFIX = "mbd_"
_NONCE_BYTES = 16
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
class _Count:
    """One way in which guesses are counted."""

    name: str
    free: int
    longest_seconds: int
    under_way: int
    # Whether a success forgives; not for an address, whose owner has an account of their own to succeed with.
    forgiven: bool

    @property
    def keys(self) -> list[str]:
        # Hashed: addresses of people do not belong in Redis. The braces keep all in one slot of a cluster.
        subject = hashlib.sha256(self.name.encode()).hexdigest()[:32]
        return [f"auth:guesses:{{{subject}}}:{what}" for what in ("count", "delay", "under-way")]


@dataclass
class Attempt:
    """A guess under way. What is not settled was no guess: something else went wrong."""

    right: bool | None = field(default=None)

    def settle(self, right: bool) -> None:
        """Says whether the guess was right."""
        self.right = right


class Guesses:
    """Counts in Redis; `key` are the 32 bytes that device tokens are signed with."""

    def __init__(self, redis: Redis, settings: AuthSettings, key: bytes) -> None:
        self._redis = redis
        self._settings = settings
        self._key = key

    @asynccontextmanager
    async def attempt(
        self, what: str, subject: str, origin: Origin, device_token: str = ""
    ) -> AsyncIterator[Attempt]:
        """Surrounds a guess at something of `subject`, which says what it was by `settle`.

        Raises RESOURCE_EXHAUSTED (SIGN_IN_DELAYED) while a delay lasts, UNAVAILABLE without Redis.
        """
        counts = self._counts(what, subject, origin, device_token)
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

    async def check_address(self, what: str, origin: Origin) -> None:
        """Raises as `attempt` does, for secrets that are too long to be guessed: only who tries many is slowed down."""
        (count,) = self._counts(what, "", origin, "")
        await self._begin([count])
        await self._finish([count], None)

    async def address_failed(self, what: str, origin: Origin) -> None:
        """Counts a failure of an address alone."""
        counts = self._counts(what, "", origin, "")
        await self._begin(counts)
        await self._finish(counts, False)

    def device_token(self, user_id: str) -> str:
        """Shows from now on that a device is known to the account."""
        return self._spell(user_id, secrets.token_bytes(_NONCE_BYTES))

    def knows_device(self, user_id: str, token: str) -> bool:
        """Whether the token was given to a device for this account."""
        try:
            raw = base64.urlsafe_b64decode(token.removeprefix(DEVICE_PREFIX) + "==")
        except (binascii.Error, ValueError):
            return False
        # To the letter: failures are counted by the token, which must not have a second spelling.
        spelled = self._spell(user_id, raw[:_NONCE_BYTES])
        return hmac.compare_digest(spelled.encode(), token.encode())

    def _spell(self, user_id: str, nonce: bytes) -> str:
        mac = hmac.digest(self._key, nonce + user_id.encode(), "sha256")
        return DEVICE_PREFIX + base64.urlsafe_b64encode(nonce + mac).rstrip(b"=").decode()

    def _counts(self, what: str, subject: str, origin: Origin, device_token: str) -> list[_Count]:
        s = self._settings
        if device_token:
            name = f"{what} {subject} device {device_token}"
            return [_Count(name, s.guess_free_failures, s.guess_longest_delay_seconds, 16, True)]
        address = _Count(
            f"{what} from {origin.address}",
            s.guess_free_failures_of_address,
            s.guess_longest_delay_seconds,
            64,
            False,
        )
        if not subject:
            return [address]
        return [
            _Count(
                f"{what} {subject} from {origin.address}",
                s.guess_free_failures,
                s.guess_longest_delay_seconds,
                16,
                True,
            ),
            _Count(
                f"{what} {subject}",
                s.guess_free_failures_of_account,
                # Who is at the second factor knows the password: that is no stranger who could harm the owner so.
                s.guess_longest_delay_seconds
                if what == "second-factor"
                else s.guess_longest_delay_of_account_seconds,
                32,
                True,
            ),
            address,
        ]

    async def _begin(self, counts: list[_Count]) -> None:
        waits = await self._run(_BEGIN, counts, lambda c: [c.free, c.under_way, _UNDER_WAY_SECONDS])
        if any(waits):
            admitted = [count for count, wait in zip(counts, waits, strict=True) if not wait]
            await self._finish(admitted, None)
            raise errors.resource_exhausted(
                "SIGN_IN_DELAYED", "Too many failed tries: wait.", retry_seconds=max(waits) / 1000
            )

    async def _finish(self, counts: list[_Count], right: bool | None) -> None:
        if right is False:
            await self._run(_FAIL, counts, lambda c: [c.free, c.longest_seconds, _REMEMBER_SECONDS])
        else:
            await self._run(_LEAVE, counts, lambda c: [int(bool(right) and c.forgiven)])

    async def _run(
        self, script: str, counts: list[_Count], arguments: Callable[[_Count], list[int]]
    ) -> list[int]:
        if not counts:
            return []
        try:
            return await self._ask([("EVAL", script, 3, *count.keys, *arguments(count)) for count in counts])
        except (RedisError, OSError, TimeoutError):
            raise errors.unavailable("Failed tries cannot be counted.", peer="redis") from None

    async def _ask(self, commands: list[tuple[object, ...]]) -> list[int]:
        """The answers, in one round trip; as a pipeline gives them, for half of what that costs."""
        connection: Any = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]  # theirs
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            return [await connection.read_response() for _ in commands]
        except BaseException:  # of its answers some may be on the way, which are nobody else's
            await connection.disconnect(nowait=True)
            raise
        finally:
            await self._redis.connection_pool.release(connection)
