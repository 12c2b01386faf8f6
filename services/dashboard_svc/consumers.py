"""What happens here when something happened elsewhere."""

from __future__ import annotations

from meshboard.dashboard.v1.events_pb2 import DashboardGrantDeleted
from meshboard.user.v1.events_pb2 import MemberRemoved
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import inbox, outbox, rights
from services.chassis.db import GrantRow


async def on_member_removed(session: AsyncSession, event: MemberRemoved) -> None:
    """Takes the member's grants back, so that coming back does not bring them along.

    Grants made after the event stay: then the user has come back before the event was heard.
    """
    rows = await session.scalars(
        delete(GrantRow)
        .where(
            GrantRow.workspace_id == event.workspace_id,
            GrantRow.subject_type == rights.USER,
            GrantRow.subject_id == event.user_id,
            GrantRow.create_time <= inbox.current.get().store_time,
        )
        .returning(GrantRow)
    )
    for row in rows:
        gone = DashboardGrantDeleted(
            workspace_id=row.workspace_id, dashboard_id=row.resource_id, grant_id=row.grant_id
        )
        outbox.add(session, gone, workspace_id=row.workspace_id)
