"""Rows of dashboards that are being made."""

from __future__ import annotations

from datetime import datetime

from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import auth, errors
from services.chassis.db import new_id
from services.chassis.grants import Grants
from services.dashboard_svc.contents import kept_of
from services.dashboard_svc.folders import held_folder
from services.dashboard_svc.models import Dashboard


async def insert_dashboard(
    session: AsyncSession,
    grants: Grants,
    content: DashboardContent,
    *,
    folder_id: str,
    now: datetime,
    request_id: str = "",
    name: str = "",
) -> Dashboard | None:
    """The new dashboard, without widgets, and the caller's grant on it; None: something like it is there."""
    caller = auth.caller()
    dashboard = await session.scalar(
        insert(Dashboard)
        .values(
            workspace_id=caller.workspace_id,
            dashboard_id=new_id(),
            folder_id=await held_folder(session, caller.workspace_id, folder_id),
            title=content.title,
            description=content.description,
            tags=list(content.tags),
            content=kept_of(content),
            name=name or None,
            version=1,
            creator_id=caller.user_id,
            request_id=request_id or None,
            create_time=now,
            update_time=now,
        )
        .on_conflict_do_nothing()
        .returning(Dashboard)
    )
    if dashboard is not None:
        grants.own(session, dashboard.dashboard_id)
    return dashboard


async def made_before(session: AsyncSession, request_id: str) -> Dashboard | None:
    """The dashboard that an earlier call of the caller made under this request id."""
    caller = auth.caller()
    found: Dashboard | None = await session.scalar(
        select(Dashboard).where(
            Dashboard.workspace_id == caller.workspace_id,
            Dashboard.creator_id == caller.user_id,
            Dashboard.request_id == request_id,
        )
    )
    return found


def name_taken(name: str) -> errors.Error:
    """What is said of a name that another dashboard has."""
    return errors.already_exists(
        "DASHBOARD_NAME_TAKEN", "Another dashboard of the workspace has this name.", name=name
    )
