"""What other services ask about sessions."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import (
    CheckSessionRequest,
    CheckSessionResponse,
    GetVerifiedEmailRequest,
    GetVerifiedEmailResponse,
    ListRevocationsRequest,
    ListRevocationsResponse,
    SetAccountDisabledRequest,
    SetAccountDisabledResponse,
)
from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, sessions
from services.auth_svc.models import Account, Session
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.settings import AuthSettings
from services.chassis import errors
from services.chassis.cache import CachedMessages
from services.chassis.times import timestamp_of

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class InternalAuthServicer(InternalAuthServiceServicer):
    """`alive` holds answers of CheckSession by session: without announcements, every call of the mesh asks it."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]

    async def ListRevocations(
        self, request: ListRevocationsRequest, context: Context
    ) -> ListRevocationsResponse:
        response = ListRevocationsResponse()
        revoked = await sessions.list_revoked(self.db, self.settings, self.now())
        for session_id, revoke_time in revoked.items():
            response.revocations.add(session_id=session_id, revoke_time=timestamp_of(revoke_time))
        return response

    async def CheckSession(self, request: CheckSessionRequest, context: Context) -> CheckSessionResponse:
        session_id = request.session_id.lower()
        remembered = await self.alive.get(session_id, lambda: self._load(session_id))
        return remembered or await self._look(session_id)

    async def _load(self, session_id: str) -> CheckSessionResponse | None:
        """What may be remembered: nothing of a session of impersonation, because it ends with others."""
        async with self.db() as session:
            impersonator_id = await session.scalar(
                select(Session.impersonator_id).where(Session.session_id == session_id)
            )
        return None if impersonator_id else await self._look(session_id)

    async def _look(self, session_id: str) -> CheckSessionResponse:
        return CheckSessionResponse(alive=await sessions.is_alive(self.db, session_id, self.now()))

    async def SetAccountDisabled(
        self, request: SetAccountDisabledRequest, context: Context
    ) -> SetAccountDisabledResponse:
        now = self.now()
        async with self.db.begin() as session:
            ended = await set_disabled(session, request.user_id, request.disabled, now, origin_of(context))
            if ended is None:
                raise _no_account()
        for row in ended:
            await self.alive.invalidate(row.session_id)
        return SetAccountDisabledResponse()

    async def GetVerifiedEmail(
        self, request: GetVerifiedEmailRequest, context: Context
    ) -> GetVerifiedEmailResponse:
        async with self.db() as session:
            account = await session.get(Account, request.user_id)
        if account is None:
            raise _no_account()
        return GetVerifiedEmailResponse(email=account.email if account.verify_time else "")


def _no_account() -> errors.Error:
    return errors.not_found("RESOURCE_NOT_FOUND", "There is no such account.")


async def set_disabled(
    session: AsyncSession,
    user_id: str,
    disabled: bool,
    now: datetime,
    origin: Origin,
    *,
    actor_id: str | None = None,
) -> list[Session] | None:
    """Disables or enables an account, and gives the sessions that this has ended; None when there is no account.

    `actor_id` is who does it, the caller if nothing is said.
    """
    account = await session.get(Account, user_id, with_for_update=True)
    if account is None:
        return None
    if disabled != (account.disable_time is not None):
        account.disable_time = now if disabled else None
        kind = "account.disabled" if disabled else "account.enabled"
        audit.record(session, kind, origin, now, actor_id=actor_id, subject_id=user_id)
    return await sessions.revoke_all(session, user_id, SessionRevoked.DISABLED, now) if disabled else []
