"""Slows down who guesses passwords, without locking anyone else out.

Failures are counted by account and address together: so guesses from elsewhere cost the owner of the account nothing.
Unknown accounts count like known ones. Guesses that are under way at once all pass; the queue for hashing bounds those.
Without Redis nobody can tell, and sign-in is refused until it is back.
"""

import hashlib
import ipaddress
from typing import Any
from urllib.parse import unquote

import grpc.aio
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.auth_svc.settings import AuthSettings
from services.chassis import errors

# Set by the gateway, which removes it from what comes in.
_ADDRESS_HEADER = "x-meshboard-address"
_REMEMBER_SECONDS = 3600


class SignInDelays:
    """Counts failures in Redis."""

    def __init__(self, redis: Redis, settings: AuthSettings) -> None:
        self._redis = redis
        self._free = settings.sign_in_free_failures
        self._longest_seconds = settings.sign_in_longest_delay_seconds

    async def check(self, email_key: str, address: str) -> None:
        """Raises RESOURCE_EXHAUSTED (SIGN_IN_DELAYED) while a delay lasts, UNAVAILABLE without Redis."""
        try:
            milliseconds = await self._redis.pttl(_key(email_key, address, "delay"))
        except (RedisError, OSError, TimeoutError):
            raise errors.unavailable("Failed sign-ins cannot be counted.", peer="redis") from None
        if milliseconds > 0:
            raise errors.resource_exhausted(
                "SIGN_IN_DELAYED", "Too many failed tries: wait.", retry_seconds=milliseconds / 1000
            )

    async def failed(self, email_key: str, address: str) -> None:
        """Counts a failure; beyond the free ones each doubles the delay. Raises UNAVAILABLE."""
        count_key = _key(email_key, address, "count")
        try:
            async with self._redis.pipeline() as pipeline:
                pipeline.incr(count_key)
                pipeline.expire(count_key, _REMEMBER_SECONDS + self._longest_seconds)
                failures, _ = await pipeline.execute()
            beyond = failures - self._free
            if beyond > 0:
                # The shift stays small: the delay is at its longest long before.
                seconds = min(self._longest_seconds, 1 << min(beyond - 1, 20))
                await self._redis.set(_key(email_key, address, "delay"), 1, ex=seconds)
        except (RedisError, OSError, TimeoutError):
            raise errors.unavailable("Failed sign-ins cannot be counted.", peer="redis") from None

    async def succeeded(self, email_key: str, address: str) -> None:
        """Forgets the failures."""
        try:
            await self._redis.delete(_key(email_key, address, "count"), _key(email_key, address, "delay"))
        except (RedisError, OSError, TimeoutError):
            raise errors.unavailable("Failed sign-ins cannot be counted.", peer="redis") from None


def _key(email_key: str, address: str, what: str) -> str:
    # Hashed: addresses of people do not belong in Redis. The braces keep both keys in one slot of a cluster.
    subject = hashlib.sha256(f"{email_key}\n{address}".encode()).hexdigest()[:32]
    return f"auth:sign-in:{{{subject}}}:{what}"


def address_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where a call comes from: an IPv4 address or, because one subscriber has that many, an IPv6 network of 64 bits."""
    for key, value in context.invocation_metadata() or ():
        if key == _ADDRESS_HEADER:
            return _network(str(value))
    # "ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051" or "unix:…"
    return _network(unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]"))


def _network(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
