"""What the domain events of other services mean here."""

from datetime import UTC

from meshboard.auth.v1.events_pb2 import SignedIn
from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.user_svc.models import User


async def on_signed_in(session: AsyncSession, event: SignedIn) -> None:
    """Remembers when the user's last session began; events may come in any order."""
    time = event.time.ToDatetime(tzinfo=UTC)
    await session.execute(
        update(User)
        .where(User.user_id == event.user_id)
        .values(sign_in_time=func.greatest(User.sign_in_time, time))
    )
