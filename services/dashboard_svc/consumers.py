"""What the domain events of other services mean here."""

from meshboard.user.v1.events_pb2 import WorkspaceDeleted
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis.db import GrantRow
from services.dashboard_svc.models import Dashboard, Folder, LibraryWidget, WidgetKind


async def on_workspace_deleted(session: AsyncSession, event: WorkspaceDeleted) -> None:
    """Deletes the dashboards and folders of a workspace, their widgets, its library, its kinds and the grants.

    There is no event for each of them. What is remembered of them ends by itself within a minute: nobody has had rights
    in the workspace since it was deleted, so that nobody is shown it.
    """
    # The widgets go with their dashboards, and the versions of a kind with it.
    for table in (GrantRow, Dashboard, Folder, LibraryWidget, WidgetKind):
        await session.execute(delete(table).where(table.workspace_id == event.workspace_id))
