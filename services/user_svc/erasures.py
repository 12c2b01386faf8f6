"""Deleting people, and the receipt that says what was erased.

A deleted user loses every right in one transaction; what services know of them is erased by each service on its own, as
an event tells it to. The last answer completes the receipt.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import structlog
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.erasure_service_pb2 import (
    DeleteManagedUserRequest,
    DeleteManagedUserResponse,
    DeleteUserRequest,
    DeleteUserResponse,
    Erasure,
    GetErasureRequest,
    GetErasureResponse,
    GetManagedErasureRequest,
    GetManagedErasureResponse,
)
from meshboard.user.v1.erasure_service_pb2_grpc import ErasureServiceServicer
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.erasures import Erased
from services.chassis.times import timestamp_of
from services.user_svc.convert import erasure_to_pb
from services.user_svc.memberships import Membership, lock_user, require_owners, require_seniority
from services.user_svc.models import (
    ERASING,
    Avatar,
    ErasureRow,
    Member,
    ProfileRow,
    ServiceErasureRow,
    User,
)
from services.user_svc.rights import announce_rights
from services.user_svc.users import user_not_found
from services.user_svc.workspaces import delete_workspace

Context = grpc.aio.ServicerContext[Any, Any]

RECEIPT_TYPE = "erasure-receipt+jwt"
TOKEN_PREFIX = "mbe_"  # noqa: S105 - the beginning of tokens

_ASK_AGAIN = timedelta(hours=1)
_ROUND_SECONDS = 60
_BATCH = 100

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ErasureServicer(ErasureServiceServicer):
    """`me` holds the answers of GetMe by user."""

    db: async_sessionmaker[AsyncSession]
    me: CachedMessages[GetMeResponse]
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def DeleteUser(self, request: DeleteUserRequest, context: Context) -> DeleteUserResponse:
        user_id = auth.caller().user_id
        if request.user_id.lower() != user_id:
            raise user_not_found(request.user_id)
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        async with self.db.begin() as session:
            user, memberships = await lock_user(session, user_id)
            erasure = await session.scalar(select(ErasureRow).where(ErasureRow.user_id == user_id))
            if erasure is None:
                if user is None:
                    raise user_not_found(user_id)
                require_owners(memberships)
                erasure = await self._begin(session, user, memberships)
            erasure.token_hash = _hash(token)
        await self.me.invalidate(user_id)
        return DeleteUserResponse(erasure=erasure_to_pb(erasure), erasure_token=token)

    async def DeleteManagedUser(
        self, request: DeleteManagedUserRequest, context: Context
    ) -> DeleteManagedUserResponse:
        user_id, workspace_id = request.user_id.lower(), auth.caller().workspace_id
        async with self.db.begin() as session:
            user, memberships = await lock_user(session, user_id)
            erasure = await session.scalar(
                select(ErasureRow).where(
                    ErasureRow.user_id == user_id, ErasureRow.managing_workspace_id == workspace_id
                )
            )
            if erasure is None:
                if user is None or user.managing_workspace_id != workspace_id:
                    raise user_not_found(user_id)
                await require_seniority(session, user_id)
                require_owners(memberships, named_in=workspace_id)
                erasure = await self._begin(session, user, memberships)
        await self.me.invalidate(user_id)
        return DeleteManagedUserResponse(erasure=erasure_to_pb(erasure))

    async def GetErasure(self, request: GetErasureRequest, context: Context) -> GetErasureResponse:
        return GetErasureResponse(
            erasure=await self._load(
                ErasureRow.erasure_id == request.erasure_id,
                ErasureRow.token_hash == _hash(request.erasure_token),
            )
        )

    async def GetManagedErasure(
        self, request: GetManagedErasureRequest, context: Context
    ) -> GetManagedErasureResponse:
        return GetManagedErasureResponse(
            erasure=await self._load(
                ErasureRow.erasure_id == request.erasure_id,
                ErasureRow.managing_workspace_id == auth.caller().workspace_id,
            )
        )

    async def _begin(self, session: AsyncSession, user: User, memberships: list[Membership]) -> ErasureRow:
        """Takes all rights, and has all services erase the user."""
        now = self.now()
        await leave(session, user.user_id, memberships)
        user.state, user.version, user.update_time = ERASING, user.version + 1, now
        erasure = ErasureRow(
            erasure_id=self.new_id(),
            user_id=user.user_id,
            managing_workspace_id=user.managing_workspace_id,
            create_time=now,
            request_time=now,
        )
        session.add(erasure)
        _request(session, erasure)
        return erasure

    async def _load(self, *conditions: ColumnElement[bool]) -> Erasure:
        async with self.db() as session:
            erasure = await session.scalar(select(ErasureRow).where(*conditions))
            if erasure is None:
                raise errors.not_found("ERASURE_NOT_FOUND", "There is no such erasure.")
            return erasure_to_pb(erasure, await _services(session, erasure.erasure_id))


def _request(session: AsyncSession, erasure: ErasureRow) -> None:
    """Asks every service to erase the user."""
    requested = events_pb2.UserErasureRequested(
        erasure_id=erasure.erasure_id, user_id=erasure.user_id, time=timestamp_of(erasure.create_time)
    )
    outbox.add(session, requested)


async def ask_again(db: async_sessionmaker[AsyncSession], now: datetime) -> int:
    """Asks anew for the erasures that are not done after an hour; gives how many those are.

    So a service hears of them that was away for longer than JetStream keeps events, or has given up after its last
    attempt. Who has answered before answers again, and that changes nothing.
    """
    async with db.begin() as session:
        rows = await session.scalars(
            select(ErasureRow)
            .where(ErasureRow.complete_time.is_(None), ErasureRow.request_time < now - _ASK_AGAIN)
            .limit(_BATCH)
            .with_for_update(skip_locked=True)
        )
        running = list(rows)
        for erasure in running:
            erasure.request_time = now
            _request(session, erasure)
    return len(running)


async def keep_asking(db: async_sessionmaker[AsyncSession], now: Callable[[], datetime]) -> None:
    """Asks again every minute until it is cancelled; any number of replicas may do so at once."""
    while True:
        try:
            if count := await ask_again(db, now()):
                log.warning("erasures_not_done", count=count)
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            log.warning("erasures_wait_for_postgres", error=repr(error))
        await asyncio.sleep(_ROUND_SECONDS)


async def leave(session: AsyncSession, user_id: str, memberships: list[Membership]) -> int:
    """Ends the user's memberships, and the workspaces where no other person is; gives how many of both."""
    for membership in memberships:
        if membership.is_alone:
            await delete_workspace(session, membership.workspace_id)
            continue
        await session.execute(
            delete(Member).where(Member.workspace_id == membership.workspace_id, Member.user_id == user_id)
        )
        removed = events_pb2.MemberRemoved(workspace_id=membership.workspace_id, user_id=user_id)
        outbox.add(session, removed, workspace_id=membership.workspace_id)
        await announce_rights(session, membership.workspace_id)
    return len(memberships)


async def erase_user(session: AsyncSession, user_id: str) -> Erased:
    """Erases what user_svc knows of a person. What they have made in workspaces stays, and names them by the id."""
    user, memberships = await lock_user(session, user_id)
    if user is None:
        return Erased({})
    erased = {
        "users": 1,
        "memberships": await leave(session, user_id, memberships),
        "profiles": await _count(session, ProfileRow.user_id == user_id),
        "avatars": await _count(session, Avatar.user_id == user_id),
    }
    await session.execute(delete(User).where(User.user_id == user_id))
    return Erased(erased)


async def _count(session: AsyncSession, condition: ColumnElement[bool]) -> int:
    return await session.scalar(select(func.count()).where(condition)) or 0


@dataclass(frozen=True)
class Receipts:
    """Collects what the services answer, and signs for all of them as user_svc."""

    tokens: auth.ServiceTokens
    now: Callable[[], datetime]

    async def on_user_erased(self, session: AsyncSession, event: events_pb2.UserErased) -> None:
        """Notes what a service has done; the last one completes the erasure."""
        # Locked, so that of two answers at once one is the last.
        erasure = await session.get(ErasureRow, event.erasure_id, with_for_update=True)
        if erasure is None or erasure.complete_time is not None:
            return
        await session.execute(
            insert(ServiceErasureRow)
            .values(
                erasure_id=event.erasure_id,
                service=event.service,
                erased=dict(event.erased),
                kept=dict(event.kept),
                complete_time=event.time.ToDatetime(tzinfo=UTC),
            )
            .on_conflict_do_nothing()
        )
        done = await _services(session, erasure.erasure_id)
        if {each.service for each in done} < set(auth.SERVICES):
            return
        erasure.complete_time = self.now()
        erasure.receipt = self._sign(erasure, done)
        completed = events_pb2.UserErasureCompleted(
            erasure_id=erasure.erasure_id,
            user_id=erasure.user_id,
            time=timestamp_of(erasure.complete_time),
        )
        outbox.add(session, completed)

    def _sign(self, erasure: ErasureRow, done: list[ServiceErasureRow]) -> str:
        assert erasure.complete_time is not None
        return self.tokens.sign(
            RECEIPT_TYPE,
            {
                "iss": self.tokens.service,
                "sub": erasure.user_id,
                "jti": erasure.erasure_id,
                "iat": int(erasure.complete_time.timestamp()),
                "requested_at": int(erasure.create_time.timestamp()),
                "services": {
                    each.service: {
                        "completed_at": int(each.complete_time.timestamp()),
                        "erased": each.erased,
                        "kept": each.kept,
                    }
                    for each in done
                },
            },
        )


async def _services(session: AsyncSession, erasure_id: str) -> list[ServiceErasureRow]:
    rows = await session.scalars(
        select(ServiceErasureRow)
        .where(ServiceErasureRow.erasure_id == erasure_id)
        .order_by(ServiceErasureRow.service)
    )
    return list(rows)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
