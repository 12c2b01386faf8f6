"""What other services ask about sessions."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.internal_auth_service_pb2 import (
    CheckSessionRequest,
    CheckSessionResponse,
    ListRevocationsRequest,
    ListRevocationsResponse,
    Revocation,
)
from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceServicer
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import sessions
from services.auth_svc.settings import AuthSettings
from services.chassis.cache import CachedMessages

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
        for row in await sessions.list_revoked(self.db, self.settings, self.now()):
            revocation = Revocation(session_id=row.session_id)
            assert row.revoke_time is not None
            revocation.revoke_time.FromDatetime(row.revoke_time)
            response.revocations.append(revocation)
        return response

    async def CheckSession(self, request: CheckSessionRequest, context: Context) -> CheckSessionResponse:
        async def load() -> CheckSessionResponse:
            return CheckSessionResponse(
                alive=await sessions.is_alive(self.db, request.session_id, self.now())
            )

        session_id = request.session_id.lower()
        return await self.alive.get(session_id, load) or await load()
