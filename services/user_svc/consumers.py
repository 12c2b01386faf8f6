"""What the domain events of other services mean here."""

from datetime import UTC

from meshboard.auth.v1.events_pb2 import AccountDiscarded, SignedIn
from sqlalchemy import delete, func, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.user_svc.models import Member, User, Workspace


async def on_signed_in(session: AsyncSession, event: SignedIn) -> None:
    """Remembers when the user's last session began; events may come in any order."""
    time = event.time.ToDatetime(tzinfo=UTC)
    await session.execute(
        update(User)
        .where(User.user_id == event.user_id)
        .values(sign_in_time=func.greatest(User.sign_in_time, time))
    )


async def on_account_discarded(session: AsyncSession, event: AccountDiscarded) -> None:
    """Takes back what a sign-up left here that was not finished: nobody has ever been able to use it."""
    await session.execute(delete(Member).where(Member.user_id == event.user_id))
    await session.execute(
        delete(Workspace).where(
            Workspace.workspace_id == event.workspace_id, Workspace.creator_id == event.user_id
        )
    )
    await session.execute(delete(User).where(User.user_id == event.user_id))
