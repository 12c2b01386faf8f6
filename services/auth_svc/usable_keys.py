"""Which API keys may be exchanged, when each was exchanged last, and how one ends."""

import asyncio
from collections.abc import Iterable
from contextvars import Context
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.auth.v1.usable_key_pb2 import UsableKey
from sqlalchemy import or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, sessions
from services.auth_svc.models import ApiKey, EndedKey, ServiceAccount
from services.auth_svc.origins import Origin
from services.auth_svc.refresh_tokens import fingerprint
from services.chassis.cache import CachedMessages
from services.chassis.db import new_id
from services.chassis.times import timestamp_of

log = structlog.get_logger(__name__)

# So short that a process which hears nothing gives up an ended key within two seconds. Redis keeps a value for this
# long and a tenth, and who reads it there at the last moment keeps it as long again. What is signed meanwhile for the
# ended session stays within what `sessions.list_revoked` looks back.
REMEMBER_SECONDS = 0.8


@dataclass(frozen=True, slots=True)
class Ended:
    """A key that has ended: what its tokens said, and where it is remembered."""

    session_id: str
    key_hash: bytes


def end_key(session: AsyncSession, key: ApiKey, now: datetime) -> Ended:
    """Has the tokens of a key refused everywhere; `UsableKeys.forget` what this gives after the commit.

    What the key gives from here on is of another session, because processes remember ended ones for ever.
    """
    ended = Ended(key.session_id, key.key_hash)
    session.add(EndedKey(session_id=key.session_id, revoke_time=now))
    sessions.announce_end(session, key.service_account_id, key.session_id, SessionRevoked.DISABLED, now)
    key.session_id = new_id()
    return ended


async def end_keys(session: AsyncSession, account: ServiceAccount, now: datetime) -> list[Ended]:
    """Does so with all keys of a service account, whose row the caller has locked."""
    keys = await session.scalars(
        select(ApiKey).where(
            ApiKey.workspace_id == account.workspace_id,
            ApiKey.service_account_id == account.service_account_id,
        )
    )
    return [end_key(session, key, now) for key in keys]


class UsableKeys:
    """Finds keys through `cache`; `alive` is what CheckSession remembers of sessions."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        cache: CachedMessages[UsableKey],
        alive: CachedMessages[CheckSessionResponse],
    ) -> None:
        self._db = db
        self._cache = cache
        self._alive = alive
        self._minute = datetime.min.replace(tzinfo=UTC)
        self._noted: set[str] = set()
        self._writing: set[asyncio.Task[None]] = set()

    async def find(self, api_key: str, now: datetime) -> UsableKey | None:
        """The key, if it may be exchanged now."""
        key_hash = fingerprint(api_key)
        found = await self._cache.get(key_hash.hex(), lambda: self._load(key_hash))
        if found is None or (found.HasField("expire_time") and found.expire_time.ToDatetime(UTC) <= now):
            return None
        return found

    async def forget(self, ended: Iterable[Ended]) -> None:
        """Forgets keys that have ended, in all processes. Call it after the commit."""
        for key in ended:
            await self._cache.invalidate(key.key_hash.hex())
            await self._alive.invalidate(key.session_id)

    def is_due(self, key: UsableKey, now: datetime) -> bool:
        """Whether this process has not noted a use of the key in this minute."""
        minute = now.replace(second=0, microsecond=0)
        if minute != self._minute:
            self._minute, self._noted = minute, set()
        return key.api_key_id not in self._noted

    def note(self, key: UsableKey, origin: Origin, now: datetime) -> None:
        """Notes a use, in the background: no exchange waits for it, and none fails because of it."""
        self._noted.add(key.api_key_id)
        # In an empty context: it has not the call's deadline.
        task = asyncio.create_task(self._write(key, origin, now), context=Context())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def close(self) -> None:
        """Waits for what is being written."""
        await asyncio.gather(*self._writing, return_exceptions=True)

    async def _load(self, key_hash: bytes) -> UsableKey | None:
        async with self._db() as session:
            row = await session.scalar(
                select(ApiKey)
                .join(ServiceAccount, ServiceAccount.service_account_id == ApiKey.service_account_id)
                .where(ApiKey.key_hash == key_hash, ServiceAccount.disable_time.is_(None))
            )
        return _usable_key(row) if row else None

    async def _write(self, key: UsableKey, origin: Origin, now: datetime) -> None:
        minute = now.replace(second=0, microsecond=0)
        try:
            async with self._db.begin() as session:
                # By the first process that gets here in this minute.
                noted = await session.scalar(
                    update(ApiKey)
                    .where(
                        ApiKey.workspace_id == key.workspace_id,
                        ApiKey.service_account_id == key.service_account_id,
                        ApiKey.api_key_id == key.api_key_id,
                        or_(ApiKey.last_use_time.is_(None), ApiKey.last_use_time < minute),
                    )
                    .values(last_use_time=minute)
                    .returning(ApiKey.api_key_id)
                )
                if noted is not None:
                    audit.record(
                        session,
                        "api_key.exchanged",
                        origin,
                        now,
                        actor_id=key.service_account_id,
                        subject_id=key.service_account_id,
                        workspace_id=key.workspace_id,
                        session_id=key.session_id,
                        api_key_id=key.api_key_id,
                    )
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            self._noted.discard(key.api_key_id)
            log.warning("use_not_noted", api_key_id=key.api_key_id, error=repr(error))


def _usable_key(row: ApiKey) -> UsableKey:
    return UsableKey(
        workspace_id=row.workspace_id,
        service_account_id=row.service_account_id,
        api_key_id=row.api_key_id,
        session_id=row.session_id,
        scopes=row.scopes,
        expire_time=timestamp_of(row.expire_time) if row.expire_time else None,
    )
