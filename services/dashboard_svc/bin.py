"""Dashboards that were deleted, until they are purged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

import structlog
from meshboard.dashboard.v1.events_pb2 import DashboardPurged
from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import outbox
from services.chassis.db import GrantRow
from services.dashboard_svc.models import Dashboard

log = structlog.get_logger(__name__)

_ROUND_SECONDS = 60
_AT_ONCE = 100


async def take_out(session: AsyncSession, dashboard: Dashboard) -> None:
    """Takes a dashboard out of the bin, without its name when another has taken that meanwhile."""
    try:
        async with session.begin_nested():  # which writes what is pending before it begins
            dashboard.delete_time = dashboard.purge_time = None
    except IntegrityError:  # the constraint on names
        await session.refresh(dashboard)
        dashboard.delete_time = dashboard.purge_time = dashboard.name = None


async def purge(session: AsyncSession, dashboard: Dashboard) -> None:
    """Deletes a dashboard for good: widgets, versions and marks go with its row, the grants here."""
    await session.delete(dashboard)
    await session.execute(
        delete(GrantRow).where(
            GrantRow.workspace_id == dashboard.workspace_id,
            GrantRow.resource_type == "dashboard",
            GrantRow.resource_id == dashboard.dashboard_id,
        )
    )
    gone = DashboardPurged(workspace_id=dashboard.workspace_id, dashboard_id=dashboard.dashboard_id)
    outbox.add(session, gone, workspace_id=dashboard.workspace_id)


async def run(db: async_sessionmaker[AsyncSession], now: Callable[[], datetime]) -> None:
    """Purges what is due, every minute until it is cancelled; any number of replicas may do so at once."""
    while True:
        try:
            while await purge_due(db, now()):
                pass
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            log.warning("purging_failed", error=repr(error))
        await asyncio.sleep(_ROUND_SECONDS)


async def purge_due(db: async_sessionmaker[AsyncSession], now: datetime) -> int:
    """Purges some of what is due; says how many."""
    async with db.begin() as session:
        due = await session.scalars(
            select(Dashboard)
            .where(Dashboard.purge_time <= now)
            .order_by(Dashboard.purge_time)
            .limit(_AT_ONCE)
            .with_for_update(skip_locked=True)
        )
        dashboards = due.all()
        for dashboard in dashboards:
            await purge(session, dashboard)
    return len(dashboards)
