"""The dashboards that users have marked, each for itself."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any, cast

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.user.v1.events_pb2 import MemberRemoved
from sqlalchemy import ColumnElement, CursorResult, delete, exists, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import auth, inbox
from services.chassis.erasures import Erased
from services.dashboard_svc.models import Dashboard, Favourite


def is_favourite(caller: auth.Caller) -> ColumnElement[bool]:
    """SQL: whether the caller has marked the row of `dashboards`."""
    return exists().where(
        Favourite.workspace_id == Dashboard.workspace_id,
        Favourite.user_id == caller.user_id,
        Favourite.dashboard_id == Dashboard.dashboard_id,
    )


async def for_caller(session: AsyncSession, dashboard: dashboard_pb2.Dashboard) -> dashboard_pb2.Dashboard:
    """The dashboard with the caller's mark. The message given is not changed: it may be shared."""
    copy = dashboard_pb2.Dashboard()
    copy.CopyFrom(dashboard)
    await tell_caller(session, [copy])
    return copy


async def tell_caller(session: AsyncSession, dashboards: Collection[dashboard_pb2.Dashboard]) -> None:
    """Sets the caller's marks on these dashboards."""
    caller = auth.caller()
    found = await session.scalars(
        select(Favourite.dashboard_id).where(
            Favourite.workspace_id == caller.workspace_id,
            Favourite.user_id == caller.user_id,
            Favourite.dashboard_id.in_([dashboard.dashboard_id for dashboard in dashboards]),
        )
    )
    marked = set(found)
    for dashboard in dashboards:
        dashboard.favourite = dashboard.dashboard_id in marked


async def mark(session: AsyncSession, caller: auth.Caller, dashboard_id: str, now: datetime) -> bool:
    """Marks a dashboard for the caller. Says whether it was not marked before."""
    done = await session.execute(
        insert(Favourite)
        .values(
            workspace_id=caller.workspace_id,
            user_id=caller.user_id,
            dashboard_id=dashboard_id,
            create_time=now,
        )
        .on_conflict_do_nothing()
    )
    return bool(cast("CursorResult[Any]", done).rowcount)


async def unmark(session: AsyncSession, caller: auth.Caller, dashboard_id: str) -> bool:
    """Takes the caller's mark away. Says whether there was one."""
    done = await session.execute(
        delete(Favourite).where(
            Favourite.workspace_id == caller.workspace_id,
            Favourite.user_id == caller.user_id,
            Favourite.dashboard_id == dashboard_id,
        )
    )
    return bool(cast("CursorResult[Any]", done).rowcount)


async def on_member_removed(session: AsyncSession, event: MemberRemoved) -> None:
    """Takes the member's marks away, but for those of a member who has come back before the event was heard."""
    await session.execute(
        delete(Favourite).where(
            Favourite.workspace_id == event.workspace_id,
            Favourite.user_id == event.user_id,
            Favourite.create_time <= inbox.current.get().store_time,
        )
    )


async def erase_favourites(session: AsyncSession, user_id: str) -> Erased:
    """Deletes all marks of the person, in every workspace."""
    done = await session.execute(delete(Favourite).where(Favourite.user_id == user_id))
    return Erased({"favourites": cast("CursorResult[Any]", done).rowcount})
