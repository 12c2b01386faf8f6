"""The sessions of one's own account: which there are, and ending them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import grpc.aio
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.auth.v1.session_service_pb2 import (
    ListSessionsRequest,
    ListSessionsResponse,
    RevokeOtherSessionsRequest,
    RevokeOtherSessionsResponse,
    RevokeSessionRequest,
    RevokeSessionResponse,
)
from meshboard.auth.v1.session_service_pb2 import Session as SessionMessage
from meshboard.auth.v1.session_service_pb2_grpc import SessionServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from ua_parser import parse

from services.auth_svc import audit, sessions
from services.auth_svc.models import Session
from services.auth_svc.origins import origin_of
from services.chassis import auth, errors
from services.chassis.cache import CachedMessages
from services.chassis.db import fetch_at_once
from services.chassis.paging import Pages
from services.chassis.times import timestamp_of

Context = grpc.aio.ServicerContext[Any, Any]

# As text, for the driver itself: pages that show where one is signed in ask again and again. UUIDv7s sort by time.
_LIST = """
    SELECT session_id::text, user_agent, address, create_time, last_use_time, expire_time, methods,
        impersonator_id::text
    FROM sessions
    WHERE user_id = $1 AND revoke_time IS NULL AND expire_time > $2 AND session_id < $3
    ORDER BY sessions.session_id DESC LIMIT $4
"""
_AFTER_ALL = str(UUID(int=2**128 - 1))


@dataclass(frozen=True)
class SessionServicer(SessionServiceServicer):
    """`alive` remembers which sessions are alive, for CheckSession."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]

    async def ListSessions(self, request: ListSessionsRequest, context: Context) -> ListSessionsResponse:
        caller = auth.caller()
        page = self.pages.open(request, caller.user_id)
        (last,) = page.last or (_AFTER_ALL,)
        rows = await fetch_at_once(self.db, _LIST, caller.user_id, self.now(), last, page.limit)
        found, next_page_token = page.close(rows, lambda row: (row["session_id"],))
        return ListSessionsResponse(
            sessions=[_session_to_pb(row, caller.session_id) for row in found],
            next_page_token=next_page_token,
        )

    async def RevokeSession(self, request: RevokeSessionRequest, context: Context) -> RevokeSessionResponse:
        caller, origin, now = auth.caller(), origin_of(context), self.now()
        session_id = request.session_id.lower()
        async with self.db.begin() as session:
            mine = await session.scalar(
                select(Session.session_id).where(
                    Session.session_id == session_id,
                    Session.user_id == caller.user_id,
                    Session.expire_time > now,
                )
            )
            row = mine and await sessions.revoke(session, session_id, SessionRevoked.REVOKED, now)
            if not row:
                raise errors.not_found("SESSION_NOT_FOUND", "The account has no such session.")
            audit.record(
                session, "session.ended", origin, now, subject_id=row.user_id, ended_session_id=session_id
            )
        await self.alive.invalidate(session_id)
        return RevokeSessionResponse()

    async def RevokeOtherSessions(
        self, request: RevokeOtherSessionsRequest, context: Context
    ) -> RevokeOtherSessionsResponse:
        caller, origin, now = auth.caller(), origin_of(context), self.now()
        async with self.db.begin() as session:
            ended = await sessions.revoke_all(
                session, caller.user_id, SessionRevoked.REVOKED, now, but=caller.session_id
            )
            for row in ended:
                audit.record(
                    session,
                    "session.ended",
                    origin,
                    now,
                    subject_id=row.user_id,
                    ended_session_id=row.session_id,
                )
        for row in ended:
            await self.alive.invalidate(row.session_id)
        return RevokeOtherSessionsResponse(revoked_count=len(ended))


def _session_to_pb(row: Mapping[str, Any], current_id: str) -> SessionMessage:
    """The session as its person sees it, from a row of `_LIST`."""
    return SessionMessage(
        session_id=row["session_id"],
        current=row["session_id"] == current_id,
        device=device_of(row["user_agent"]),
        address=row["address"],
        create_time=timestamp_of(row["create_time"]),
        last_use_time=timestamp_of(row["last_use_time"]),
        expire_time=timestamp_of(row["expire_time"]),
        authentication_methods=row["methods"],
        impersonator_user_id=row["impersonator_id"] or "",
    )


def device_of(user_agent: str) -> str:
    """What a device says it is, such as `Firefox 143 on Linux`; its first word when that is not known."""
    found = parse(user_agent)
    if found.user_agent is None:
        return user_agent.partition(" ")[0][:100]
    name = " ".join(part for part in (found.user_agent.family, found.user_agent.major) if part)
    return (f"{name} on {found.os.family}" if found.os else name)[:100]
