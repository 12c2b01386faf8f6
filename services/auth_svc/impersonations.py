"""Seeing a workspace as one of its members does."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.impersonation_service_pb2 import StartImpersonationRequest, StartImpersonationResponse
from meshboard.auth.v1.impersonation_service_pb2_grpc import ImpersonationServiceServicer
from sqlalchemy import or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, sessions
from services.auth_svc.models import Account, ServiceAccount, Session
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.sessions import Begun
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tokens import Tokens
from services.chassis import auth, errors
from services.chassis.rights import Fetch

Context = grpc.aio.ServicerContext[Any, Any]

PERMISSION = "members.impersonate"
DEFAULT_SECONDS = 3600


@dataclass(frozen=True)
class ImpersonationServicer(ImpersonationServiceServicer):
    """`fetch_rights` asks user_svc."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    fetch_rights: Fetch
    tokens: Tokens
    now: Callable[[], datetime]

    async def StartImpersonation(
        self, request: StartImpersonationRequest, context: Context
    ) -> StartImpersonationResponse:
        user_id, origin = request.user_id.lower(), origin_of(context)
        try:
            await self._check(user_id)
            begun = await self._begin(request, user_id, origin)
            # Once more, now that whoever hears of a change of members finds the session and ends it.
            await self._check_again(user_id, begun)
        except errors.Error as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                await self._note_refusal(user_id, origin, error.reason)
            raise
        fields = await self.tokens.give(context, begun)
        del fields["device_token"]
        return StartImpersonationResponse(session_id=begun.session.session_id, **fields)

    async def _check(self, user_id: str) -> None:
        caller = auth.caller()
        async with self.db() as session:
            machine = await session.get(ServiceAccount, (caller.workspace_id, user_id))
        if user_id == caller.user_id or machine is not None:
            raise errors.invalid_argument(
                "IMPERSONATION_POINTLESS",
                "Nobody impersonates themselves or a service account.",
                field="user_id",
            )
        await self._compare(user_id)

    async def _compare(self, user_id: str) -> None:
        """Both are members, as user_svc says now, and the one has no permission that the other has not."""
        caller = auth.caller()
        own, others = await asyncio.gather(
            self.fetch_rights(caller.user_id, caller.workspace_id),
            self.fetch_rights(user_id, caller.workspace_id),
            return_exceptions=True,
        )
        if isinstance(own, BaseException):
            raise own
        if isinstance(others, errors.Error) and others.code is grpc.StatusCode.NOT_FOUND:
            raise errors.not_found("MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=user_id)
        if isinstance(others, BaseException):
            raise others
        if PERMISSION not in own.permissions:
            raise errors.permission_denied(
                "PERMISSION_MISSING", f"The call needs the permission {PERMISSION}.", permission=PERMISSION
            )
        if not others.permissions <= own.permissions:
            raise errors.permission_denied(
                "ROLE_TOO_HIGH", "The member has permissions that the caller has not.", role=others.role
            )

    async def _begin(self, request: StartImpersonationRequest, user_id: str, origin: Origin) -> Begun:
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            # Both rows stay as they are until the commit. Who then ends or disables one finds the new session.
            admin = await session.get(Session, caller.session_id, with_for_update={"read": True})
            account = await session.get(Account, user_id, with_for_update={"read": True})
            if admin is None or admin.revoke_time or admin.expire_time <= now:
                raise errors.unauthenticated("SESSION_REVOKED", "The session has ended: sign in again.")
            if account is None or account.activate_time is None:
                raise errors.not_found(
                    "MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=user_id
                )
            if account.disable_time:
                raise errors.permission_denied("ACCOUNT_DISABLED", "The account is disabled.")
            seconds = request.duration_seconds or DEFAULT_SECONDS
            seconds = min(seconds, int((admin.expire_time - now).total_seconds()))
            begun = sessions.begin(
                session,
                user_id,
                caller.workspace_id,
                origin=origin,
                methods=tuple(admin.methods),
                settings=self.settings,
                now=now,
                impersonator=admin,
                seconds=seconds,
            )
            audit.record(
                session,
                "impersonation.begun",
                origin,
                now,
                subject_id=user_id,
                why=request.reason,
                seconds=seconds,
                impersonation_session_id=begun.session.session_id,
            )
        return begun

    async def _check_again(self, user_id: str, begun: Begun) -> None:
        try:
            await self._compare(user_id)
        except errors.Error:
            async with self.db.begin() as session:
                await sessions.revoke(
                    session, begun.session.session_id, SessionRevoked.IMPERSONATION_ENDED, self.now()
                )
            raise

    async def _note_refusal(self, user_id: str, origin: Origin, reason: str) -> None:
        async with self.db.begin() as session:
            audit.record(
                session, "impersonation.begun", origin, self.now(), reason=reason, subject_id=user_id
            )


async def end_impersonations(
    session: AsyncSession, workspace_id: str, user_id: str | None, now: datetime
) -> None:
    """Ends the sessions in a workspace in which a user impersonates others or is impersonated; None: whoever does."""
    found = await session.scalars(
        select(Session.session_id)
        .where(
            Session.impersonator_session_id.is_not(None),  # as the index has it
            Session.workspace_id == workspace_id,
            or_(Session.impersonator_id == user_id, Session.user_id == user_id) if user_id else true(),
            Session.revoke_time.is_(None),
            Session.expire_time > now,
        )
        .order_by(Session.session_id)
    )
    for session_id in found.all():
        await sessions.revoke(session, session_id, SessionRevoked.IMPERSONATION_ENDED, now)
