"""What other services ask about accounts."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.internal_account_service_pb2 import ReserveAccountRequest, ReserveAccountResponse
from meshboard.auth.v1.internal_account_service_pb2_grpc import InternalAccountServiceServicer
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.models import Account
from services.chassis import errors
from services.chassis.emails import email_key

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class InternalAccountServicer(InternalAccountServiceServicer):
    """Keeps addresses; `accounts_of_users` begins the accounts."""

    db: async_sessionmaker[AsyncSession]
    now: Callable[[], datetime]

    async def ReserveAccount(
        self, request: ReserveAccountRequest, context: Context
    ) -> ReserveAccountResponse:
        now = self.now()
        async with self.db.begin() as session:
            user_id = await session.scalar(
                insert(Account)
                .values(
                    user_id=request.user_id,
                    email=request.email,
                    email_key=email_key(request.email),
                    password_hash="",
                    display_name=request.display_name,
                    workspace_id=request.workspace_id,
                    managing_workspace_id=request.workspace_id,
                    create_time=now,
                    try_time=now,
                )
                .on_conflict_do_update(
                    index_elements=[Account.email_key],
                    set_={"try_time": now},  # keeps the reaper away
                    where=(Account.managing_workspace_id == request.workspace_id)
                    & Account.activate_time.is_(None),
                )
                .returning(Account.user_id)
            )
        if user_id is None:
            raise errors.already_exists("EMAIL_TAKEN", "The address has an account.")
        return ReserveAccountResponse(user_id=user_id)
