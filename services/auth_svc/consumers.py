"""What the domain events of other services mean here."""

from datetime import UTC

from meshboard.user.v1.events_pb2 import MemberRemoved, UserUpdated
from sqlalchemy import or_, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc.models import Account


async def on_user_updated(session: AsyncSession, event: UserUpdated) -> None:
    """Follows the display name, unless a newer one is here already."""
    update_time = event.user.update_time.ToDatetime(tzinfo=UTC)
    await session.execute(
        update(Account)
        .where(
            Account.user_id == event.user.user_id,
            or_(Account.user_update_time.is_(None), Account.user_update_time < update_time),
        )
        .values(display_name=event.user.display_name, user_update_time=update_time)
    )


async def on_member_removed(session: AsyncSession, event: MemberRemoved) -> None:
    """Has the next sign-in not ask for a workspace that the user has left."""
    await session.execute(
        update(Account)
        .where(Account.user_id == event.user_id, Account.last_workspace_id == event.workspace_id)
        .values(last_workspace_id=None)
    )
