"""Clears away what is no longer of use: sign-ups and service accounts that were not finished, tickets that nobody has
redeemed, and sessions long after their end."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from meshboard.auth.v1.events_pb2 import AccountDiscarded
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.models import Account, EndedKey, ServiceAccount, Session, Ticket
from services.auth_svc.service_accounts import clear
from services.auth_svc.settings import AuthSettings
from services.chassis import errors, outbox

log = structlog.get_logger(__name__)

_ROUND_SECONDS = 60
_KEEP_ENDED_SESSIONS = timedelta(days=7)


async def run(
    db: async_sessionmaker[AsyncSession],
    settings: AuthSettings,
    users: InternalUserServiceStub,
    now: Callable[[], datetime],
) -> None:
    """Reaps every minute until it is cancelled; any number of replicas may do so at once."""
    while True:
        try:
            await reap(db, settings, now())
            await reap_service_accounts(db, settings, users, now())
        except (OSError, TimeoutError, SQLAlchemyError, errors.Error) as error:
            log.warning("reaping_failed", error=repr(error))
        await asyncio.sleep(_ROUND_SECONDS)


async def reap(db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: datetime) -> None:
    """One round."""
    stale = now - timedelta(seconds=settings.pending_account_seconds)
    ended = now - _KEEP_ENDED_SESSIONS
    async with db.begin() as session:
        discarded = await session.execute(
            delete(Account)
            .where(Account.activate_time.is_(None), Account.try_time < stale)
            .returning(Account.user_id, Account.workspace_id, Account.managing_workspace_id)
        )
        for user_id, workspace_id, managing_workspace_id in discarded:
            # A managed user is made after its account is reserved: where there is one, its `UserCreated` is on its way.
            if managing_workspace_id is None:
                outbox.add(session, AccountDiscarded(user_id=user_id, workspace_id=workspace_id))
        await session.execute(
            delete(Session).where(or_(Session.expire_time < ended, Session.revoke_time < ended))
        )
        await session.execute(delete(EndedKey).where(EndedKey.revoke_time < ended))
        await session.execute(delete(Ticket).where(Ticket.expire_time <= now))


async def reap_service_accounts(
    db: async_sessionmaker[AsyncSession],
    settings: AuthSettings,
    users: InternalUserServiceStub,
    now: datetime,
) -> None:
    """One round of service accounts: what was not finished when it was made, or when it was deleted."""
    stale = now - timedelta(seconds=settings.pending_account_seconds)
    pending = ServiceAccount.activate_time.is_(None)
    async with db.begin() as session:
        # Nobody resumes them from here on.
        await session.execute(
            update(ServiceAccount)
            .where(pending, ServiceAccount.update_time < stale)
            .values(disable_time=now, request_id=None)
        )
        left = await session.scalars(
            select(ServiceAccount).where(pending, ServiceAccount.disable_time.is_not(None))
        )
    for account in left.all():
        await clear(db, users, account)
