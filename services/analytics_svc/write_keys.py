"""Write keys: what they look like, which source one belongs to, and the servicer that manages them."""

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import grpc.aio
import structlog
from google.protobuf.message import Message
from meshboard.analytics.v1 import events_pb2
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest, IngestStreamRequest
from meshboard.analytics.v1.source_pb2 import Source as SourceMessage
from meshboard.analytics.v1.write_key_pb2 import WriteKey as WriteKeyMessage
from meshboard.analytics.v1.write_key_service_pb2 import (
    CreateWriteKeyRequest,
    CreateWriteKeyResponse,
    DeleteWriteKeyRequest,
    DeleteWriteKeyResponse,
    ListWriteKeysRequest,
    ListWriteKeysResponse,
    UpdateWriteKeyRequest,
    UpdateWriteKeyResponse,
)
from meshboard.analytics.v1.write_key_service_pb2_grpc import WriteKeyServiceServicer
from sqlalchemy import delete, exc, func, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import source_to_pb, write_key_to_pb
from services.analytics_svc.models import Source, WriteKey
from services.chassis import auth, errors, outbox
from services.chassis.cache import Cache, CachedMessages
from services.chassis.masks import changed_fields
from services.chassis.origins import ADDRESS_HEADER, is_allowed
from services.chassis.paging import Pages
from services.chassis.times import time_of

Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger(__name__)

# Lets scanners for leaked secrets recognise one.
PREFIX = "mbw_"
HEADER = "x-write-key"
MAX_KEYS = 50
# How often it is written down which keys were used.
NOTE_SECONDS = 15.0

_source: ContextVar[SourceMessage] = ContextVar("source")
_address: ContextVar[str] = ContextVar("address")


class NewKey(NamedTuple):
    """A new key, which is shown once, and what is kept of it."""

    secret: str
    hash: bytes
    prefix: str


def new_write_key() -> NewKey:
    """A key of 256 random bits."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return NewKey(secret, hash_of(secret), secret[: len(PREFIX) + 6])


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


def address() -> str:
    """The address that the current call comes from, as the gateway has it; empty when it came past the gateway."""
    return _address.get()


class WriteKeys:
    """Finds the source of a write key, through the cache. `run` must run beside the calls."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], cache: Cache, now: Callable[[], datetime]
    ) -> None:
        self.db = db
        self.now = now
        self._keys = CachedMessages(cache, "keys", WriteKeyMessage)
        self._sources = CachedMessages(cache, "sources", SourceMessage)
        self._used: set[tuple[str, str, str]] = set()

    async def check(self, request: Message, metadata: Mapping[str, str]) -> None:
        """The access stage for methods of the holder of a write key. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        _source.set(await self.admit(presented(request, metadata), metadata.get("origin", "")))
        _address.set(metadata.get(ADDRESS_HEADER, ""))

    async def admit(self, secret: str, origin: str) -> SourceMessage:
        """The source of a key that may be used from an origin. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        key_hash = hash_of(secret)
        key = await self._keys.get(key_hash.hex(), partial(self._load_key, key_hash))
        found = key and await self._sources.get(key.source_id, partial(self._load_source, key))
        if key is None or found is None:
            raise errors.unauthenticated("WRITE_KEY_INVALID", "No source has this write key.")
        if key.HasField("expire_time") and key.expire_time.ToNanoseconds() <= self.now().timestamp() * 1e9:
            raise errors.unauthenticated("WRITE_KEY_EXPIRED", "The write key has expired.")
        if origin and found.allowed_origins and not is_allowed(origin, found.allowed_origins):
            raise errors.permission_denied(
                "ORIGIN_NOT_ALLOWED",
                "The source takes no events from pages of this origin.",
                origin=origin[:256],
            )
        self._used.add((key.workspace_id, key.source_id, key.write_key_id))
        return found

    async def forget(self, *key_hashes: bytes) -> None:
        """Ends keys, or what is remembered of them, in all processes. Call it after the commit."""
        for key_hash in key_hashes:
            await self._keys.invalidate(key_hash.hex())

    async def forget_source(self, source_id: str) -> None:
        """Ends what is remembered of a source in all processes. Call it after the commit."""
        await self._sources.invalidate(source_id)

    async def run(self) -> None:
        """Writes down now and then which keys were used, until it is cancelled."""
        while True:
            await asyncio.sleep(NOTE_SECONDS)
            try:
                await self.note_uses()
            except (OSError, exc.SQLAlchemyError) as error:
                log.warning("uses_of_keys_not_noted", error=str(error)[:300])

    async def note_uses(self) -> None:
        """Writes down which keys were used since the last time, a key once a minute."""
        used, self._used = self._used, set()
        if not used:
            return
        minute = self.now().replace(second=0, microsecond=0)
        # What another process is writing it writes as well: rows that are locked are left to it.
        stale = (
            select(WriteKey.workspace_id, WriteKey.source_id, WriteKey.write_key_id)
            .where(
                tuple_(WriteKey.workspace_id, WriteKey.source_id, WriteKey.write_key_id).in_(sorted(used)),
                or_(WriteKey.last_use_time.is_(None), WriteKey.last_use_time < minute),
            )
            .with_for_update(skip_locked=True)
        )
        async with self.db.begin() as session:
            await session.execute(
                update(WriteKey)
                .where(tuple_(WriteKey.workspace_id, WriteKey.source_id, WriteKey.write_key_id).in_(stale))
                .values(last_use_time=minute)
            )

    async def _load_key(self, key_hash: bytes) -> WriteKeyMessage | None:
        async with self.db() as session:
            row = await session.scalar(select(WriteKey).where(WriteKey.key_hash == key_hash))
        return write_key_to_pb(row) if row else None

    async def _load_source(self, key: WriteKeyMessage) -> SourceMessage | None:
        async with self.db() as session:
            row = await session.get(Source, (key.workspace_id, key.source_id))
        return source_to_pb(row) if row else None


class WriteKeyServicer(WriteKeyServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        write_keys: WriteKeys,
        pages: Pages,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self.db = db
        self.write_keys = write_keys
        self.pages = pages
        self.now = now
        self.new_id = new_id

    async def CreateWriteKey(
        self, request: CreateWriteKeyRequest, context: Context
    ) -> CreateWriteKeyResponse:
        caller = auth.caller()
        key = new_write_key()
        expires = time_of(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        async with self.db.begin() as session:
            found = await lock_source(session, request.source_id)
            row = await session.scalar(
                insert(WriteKey)
                .values(
                    workspace_id=caller.workspace_id,
                    source_id=request.source_id,
                    write_key_id=self.new_id(),
                    title=request.title,
                    prefix=key.prefix,
                    key_hash=key.hash,
                    expire_time=expires,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=self.now(),
                )
                .on_conflict_do_nothing(constraint="write_keys_request_once")
                .returning(WriteKey)
            )
            if row is None:
                return CreateWriteKeyResponse(write_key=write_key_to_pb(await _repeated(session, request)))
            await check_room(session, request.source_id)
            await show_newest(session, found, self.now())
            event = events_pb2.WriteKeyCreated(write_key=write_key_to_pb(row))
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return CreateWriteKeyResponse(write_key=write_key_to_pb(row), secret=key.secret)

    async def ListWriteKeys(self, request: ListWriteKeysRequest, context: Context) -> ListWriteKeysResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, f"{workspace_id} {request.source_id}")
        async with self.db() as session:
            rows = await session.scalars(
                select(WriteKey)
                .where(
                    WriteKey.workspace_id == workspace_id,
                    WriteKey.source_id == request.source_id,
                    page.after(WriteKey.create_time, WriteKey.write_key_id),
                )
                .order_by(WriteKey.create_time, WriteKey.write_key_id)
                .limit(page.limit)
            )
        keys, next_page_token = page.close(rows.all(), lambda key: (key.create_time, key.write_key_id))
        return ListWriteKeysResponse(write_keys=map(write_key_to_pb, keys), next_page_token=next_page_token)

    async def UpdateWriteKey(
        self, request: UpdateWriteKeyRequest, context: Context
    ) -> UpdateWriteKeyResponse:
        wanted = request.write_key
        workspace_id = auth.caller().workspace_id
        fields = changed_fields(wanted, request.update_mask, {"title", "expire_time"})
        changes: dict[str, Any] = {"title": wanted.title} if "title" in fields else {}
        if changes.get("title") == "":
            raise errors.invalid_fields([("write_key.title", "must have at least 1 character")])
        if "expire_time" in fields:
            expires = wanted.HasField("expire_time")
            changes["expire_time"] = time_of(wanted.expire_time, "write_key.expire_time") if expires else None
        async with self.db.begin() as session:
            row = await session.get(
                WriteKey, (workspace_id, wanted.source_id, wanted.write_key_id), with_for_update=True
            )
            if row is None:
                raise _absent(wanted.write_key_id)
            for field, value in changes.items():
                setattr(row, field, value)
            event = events_pb2.WriteKeyUpdated(write_key=write_key_to_pb(row))
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget(row.key_hash)
        return UpdateWriteKeyResponse(write_key=write_key_to_pb(row))

    async def DeleteWriteKey(
        self, request: DeleteWriteKeyRequest, context: Context
    ) -> DeleteWriteKeyResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            found = await lock_source(session, request.source_id)
            key_hash = await session.scalar(
                delete(WriteKey)
                .where(
                    WriteKey.workspace_id == workspace_id,
                    WriteKey.source_id == request.source_id,
                    WriteKey.write_key_id == request.write_key_id,
                )
                .returning(WriteKey.key_hash)
            )
            if key_hash is None:
                raise _absent(request.write_key_id)
            if found.write_key_hash == key_hash:
                found.write_key_hash = None
            await show_newest(session, found, self.now())
            event = events_pb2.WriteKeyDeleted(
                workspace_id=workspace_id, source_id=request.source_id, write_key_id=request.write_key_id
            )
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget(key_hash)
        return DeleteWriteKeyResponse()


async def lock_source(session: AsyncSession, source_id: str) -> Source:
    """The source of the caller's workspace; whoever else changes its keys waits. Raises NOT_FOUND."""
    found = await session.get(Source, (auth.caller().workspace_id, source_id), with_for_update=True)
    if found is None:
        raise errors.not_found("SOURCE_NOT_FOUND", "There is no such source.", source_id=source_id)
    return found


async def check_room(session: AsyncSession, source_id: str) -> None:
    """Counts the keys, with the new one among them; the lock on the source has others wait."""
    count = await session.scalar(
        select(func.count())
        .select_from(WriteKey)
        .where(WriteKey.workspace_id == auth.caller().workspace_id, WriteKey.source_id == source_id)
    )
    if (count or 0) > MAX_KEYS:
        raise errors.failed_precondition(
            "WRITE_KEY_LIMIT", f"The source has {MAX_KEYS} write keys: delete one first."
        )


async def show_newest(session: AsyncSession, found: Source, now: datetime) -> None:
    """Has a source whose keys have changed show the prefix of the newest one."""
    prefix = await session.scalar(
        select(WriteKey.prefix)
        .where(WriteKey.workspace_id == found.workspace_id, WriteKey.source_id == found.source_id)
        .order_by(WriteKey.create_time.desc(), WriteKey.write_key_id.desc())
        .limit(1)
    )
    found.write_key_prefix = prefix or ""
    found.version += 1
    found.update_time = now


async def _repeated(session: AsyncSession, request: CreateWriteKeyRequest) -> WriteKey:
    caller = auth.caller()
    rows = await session.scalars(
        select(WriteKey).where(
            WriteKey.workspace_id == caller.workspace_id,
            WriteKey.source_id == request.source_id,
            WriteKey.creator_id == caller.user_id,
            WriteKey.request_id == request.request_id,
        )
    )
    return rows.one()


def _absent(write_key_id: str) -> errors.Error:
    return errors.not_found(
        "WRITE_KEY_NOT_FOUND", "The source has no such write key.", write_key_id=write_key_id
    )
