"""Clears away what is no longer of use: sign-ups that were not finished, tickets that nobody has
redeemed, and sessions long after their end."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from meshboard.auth.v1.events_pb2 import AccountDiscarded
from sqlalchemy import delete, or_
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.models import Account, EndedKey, Session, Ticket
from services.auth_svc.settings import AuthSettings
from services.chassis import outbox

log = structlog.get_logger(__name__)

_ROUND_SECONDS = 60
_KEEP_ENDED_SESSIONS = timedelta(days=7)


async def run(
    db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: Callable[[], datetime]
) -> None:
    """Reaps every minute until it is cancelled; any number of replicas may do so at once."""
    while True:
        try:
            await reap(db, settings, now())
        except (OSError, TimeoutError, SQLAlchemyError) as error:
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
            .returning(Account.user_id, Account.workspace_id)
        )
        for user_id, workspace_id in discarded:
            outbox.add(session, AccountDiscarded(user_id=user_id, workspace_id=workspace_id))
        await session.execute(
            delete(Session).where(or_(Session.expire_time < ended, Session.revoke_time < ended))
        )
        await session.execute(delete(EndedKey).where(EndedKey.revoke_time < ended))
        await session.execute(delete(Ticket).where(Ticket.expire_time <= now))
