"""What the domain events of other services mean here."""

from collections.abc import Sequence
from datetime import UTC, datetime

from meshboard.auth.v1.events_pb2 import AccountDiscarded, EmailChanged, SignedIn
from meshboard.user.v1.events_pb2 import MemberRemoved, ProfileUpdated, UserUpdated
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import outbox
from services.chassis.cache import CachedMessages
from services.chassis.db import fetch_at_once
from services.user_svc.convert import user_to_pb
from services.user_svc.models import PENDING, Invitation, Member, User, Workspace
from services.user_svc.rights import announce_rights, lock_rights

# In one order, so that two replicas do not wait for each other.
_SIGNED_IN = """
    WITH event AS (SELECT * FROM unnest($1::uuid[], $2::timestamptz[]) AS event (user_id, time)),
    locked AS (
        SELECT user_id, time FROM users JOIN event USING (user_id)
        WHERE sign_in_time IS NULL OR sign_in_time < time
        ORDER BY user_id FOR NO KEY UPDATE OF users
    )
    UPDATE users SET sign_in_time = time FROM locked WHERE users.user_id = locked.user_id
"""


async def on_signed_in(db: async_sessionmaker[AsyncSession], events: Sequence[SignedIn]) -> None:
    """Remembers when the users' last sessions began; events may come in any order, and again."""
    newest: dict[str, datetime] = {}
    for event in events:
        time = event.time.ToDatetime(tzinfo=UTC)
        newest[event.user_id] = max(time, newest.get(event.user_id, time))
    await fetch_at_once(db, _SIGNED_IN, list(newest), list(newest.values()))


async def on_account_discarded(session: AsyncSession, event: AccountDiscarded) -> None:
    """Takes back what a sign-up left here that was not finished: nobody has ever been able to use it."""
    await _leave_invitations_open(session, event.user_id)
    await session.execute(delete(Member).where(Member.user_id == event.user_id))
    await session.execute(
        delete(Workspace).where(
            Workspace.workspace_id == event.workspace_id, Workspace.creator_id == event.user_id
        )
    )
    await session.execute(delete(User).where(User.user_id == event.user_id))


async def _leave_invitations_open(session: AsyncSession, user_id: str) -> None:
    """Ends what an unfinished sign-up has accepted, so that the person can sign up with the invitation again."""
    accepted = await session.scalars(select(Invitation).where(Invitation.acceptor_id == user_id))
    for invitation in accepted.all():
        await lock_rights(session, invitation.workspace_id)
        newer = await session.scalar(
            select(Invitation.invitation_id).where(
                Invitation.workspace_id == invitation.workspace_id,
                Invitation.email_key == invitation.email_key,
                Invitation.state == PENDING,
            )
        )
        invitation.acceptor_id = None
        if newer is None:
            invitation.state, invitation.end_time = PENDING, None
        removed = MemberRemoved(workspace_id=invitation.workspace_id, user_id=user_id)
        outbox.add(session, removed, workspace_id=invitation.workspace_id)
        await announce_rights(session, invitation.workspace_id)


async def on_email_changed(session: AsyncSession, event: EmailChanged) -> None:
    """Follows the address, unless a newer one is here already, and emits `UserUpdated`."""
    time = event.time.ToDatetime(tzinfo=UTC)
    user = await session.scalar(
        update(User)
        .where(User.user_id == event.user_id, or_(User.email_time.is_(None), User.email_time < time))
        .values(
            email=event.email,
            email_time=time,
            version=User.version + 1,
            update_time=func.greatest(User.update_time, time),
        )
        .returning(User)
    )
    if user is not None:
        outbox.add(session, UserUpdated(user=user_to_pb(user)))


async def on_user_updated(
    cache: CachedMessages[GetMeResponse], session: AsyncSession, event: UserUpdated
) -> None:
    """Forgets what is remembered of the user: the change that an event has caused is committed by now."""
    await cache.invalidate(event.user.user_id)


async def on_profile_updated(
    cache: CachedMessages[GetMeResponse], session: AsyncSession, event: ProfileUpdated
) -> None:
    """Forgets what is remembered of the person."""
    await cache.invalidate(event.user_id)
