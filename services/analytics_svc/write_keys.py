"""Write keys: what they look like, and which source one belongs to."""

import base64
import hashlib
import secrets
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from google.protobuf.message import Message
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest, IngestStreamRequest
from meshboard.analytics.v1.source_pb2 import Source as SourceMessage
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import source_to_pb
from services.analytics_svc.models import Source
from services.chassis import errors
from services.chassis.cache import CachedMessages

# Lets scanners for leaked secrets recognise one.
PREFIX = "mbw_"
HEADER = "x-write-key"

_source: ContextVar[SourceMessage] = ContextVar("source")


class WriteKey(NamedTuple):
    """A new key, which is shown once, and what is kept of it."""

    secret: str
    hash: bytes
    prefix: str


def new_write_key() -> WriteKey:
    """A key of 256 random bits."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return WriteKey(secret, hash_of(secret), secret[: len(PREFIX) + 6])


def hash_of(secret: str) -> bytes:
    """SHA-256: a random key needs no slow hash."""
    return hashlib.sha256(secret.encode()).digest()


def presented(request: Message, metadata: Mapping[str, str]) -> str:
    """The key that a call carries: in the header, as the user of basic authentication, or in the body.

    The gateway limits calls by what stands in a header. So a header counts even when it is no good, and of the two only
    the one that is meant for the method: nobody gets around the limit with another one beside the true key.
    """
    if isinstance(request, IngestRequest | IngestStreamRequest):
        return metadata.get(HEADER, "") or request.write_key
    scheme, _, credentials = metadata.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        return _user_of(credentials)
    body: Any = getattr(request, "message", request)  # a message that came alone is a field of its request
    return str(body.write_key)


def _user_of(credentials: str) -> str:
    """The user of https://www.rfc-editor.org/rfc/rfc7617; empty when they cannot be read."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[0]
    except ValueError:
        return ""


def source() -> SourceMessage:
    """The source whose write key the current call carries."""
    return _source.get()


class WriteKeys:
    """Finds the source of a write key, through the cache."""

    def __init__(self, db: async_sessionmaker[AsyncSession], cache: CachedMessages[SourceMessage]) -> None:
        self.db = db
        self.cache = cache

    async def check(self, request: Message, metadata: Mapping[str, str]) -> None:
        """The access stage for methods of the holder of a write key. Raises UNAUTHENTICATED."""
        key_hash = hash_of(presented(request, metadata))

        async def load() -> SourceMessage | None:
            async with self.db() as session:
                row = await session.scalar(select(Source).where(Source.write_key_hash == key_hash))
            return source_to_pb(row) if row else None

        found = await self.cache.get(key_hash.hex(), load)
        if found is None:
            raise errors.unauthenticated("WRITE_KEY_INVALID", "No source has this write key.")
        _source.set(found)

    async def forget(self, key_hash: bytes) -> None:
        """Ends a key, or what is remembered of its source, in all processes. Call it after the commit."""
        await self.cache.invalidate(key_hash.hex())
