"""Dashboards that get another place."""

from __future__ import annotations

from datetime import datetime

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1.events_pb2 import DashboardMoved
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import outbox
from services.dashboard_svc.contents import touch
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.folders import held_folder
from services.dashboard_svc.models import Dashboard


async def move(
    session: AsyncSession, dashboard: Dashboard, folder_id: str, now: datetime
) -> dashboard_pb2.Dashboard:
    """Puts a dashboard, whose row is locked, into a folder; "" for none. Raises NOT_FOUND when that is gone."""
    before = dashboard.folder_id
    dashboard.folder_id = await held_folder(session, dashboard.workspace_id, folder_id)
    touch(dashboard, now)
    moved = dashboard_to_pb(dashboard)
    event = DashboardMoved(dashboard=moved, from_folder_id=before or "")
    outbox.add(session, event, workspace_id=dashboard.workspace_id)
    return moved
