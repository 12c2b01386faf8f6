"""What time ends: memberships in teams, and the memory of invitations."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from meshboard.user.v1.events_pb2 import TeamMemberRemoved
from sqlalchemy import delete, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors, outbox
from services.user_svc.models import Invitation, TeamMember
from services.user_svc.rights import announce_rights, lock_rights

log = structlog.get_logger(__name__)

_ROUND_SECONDS = 60
_KEEP_INVITATIONS = timedelta(days=30)


async def run(db: async_sessionmaker[AsyncSession], now: Callable[[], datetime]) -> None:
    """Clears away every minute until it is cancelled; any number of replicas may do so at once."""
    while True:
        try:
            await end_team_memberships(db, now())
            await forget_invitations(db, now())
        except (OSError, TimeoutError, SQLAlchemyError, errors.Error) as error:
            log.warning("expiring_failed", error=repr(error))
        await asyncio.sleep(_ROUND_SECONDS)


async def end_team_memberships(db: async_sessionmaker[AsyncSession], now: datetime) -> None:
    """Removes expired memberships, which have counted for nothing since then, and tells of it."""
    async with db() as session:
        workspace_ids = await session.scalars(
            select(TeamMember.workspace_id).where(TeamMember.expire_time <= now).distinct()
        )
    for workspace_id in workspace_ids.all():
        async with db.begin() as session:
            await lock_rights(session, workspace_id)
            rows = await session.scalars(
                delete(TeamMember)
                .where(TeamMember.workspace_id == workspace_id, TeamMember.expire_time <= now)
                .returning(TeamMember)
            )
            for row in rows.all():
                event = TeamMemberRemoved(workspace_id=workspace_id, team_id=row.team_id, user_id=row.user_id)
                outbox.add(session, event, workspace_id=workspace_id)
            await announce_rights(session, workspace_id)


async def forget_invitations(db: async_sessionmaker[AsyncSession], now: datetime) -> None:
    """Deletes invitations long after their end, with the addresses in them."""
    old = now - _KEEP_INVITATIONS
    async with db.begin() as session:
        await session.execute(
            delete(Invitation).where(or_(Invitation.end_time < old, Invitation.expire_time < old))
        )
