"""Dashboards with their widgets: read whole through the cache, locked for a change, loaded for a feed."""

from __future__ import annotations

from functools import partial

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1.widget_service_pb2 import ListWidgetsResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.chassis.cache import Cache, CachedMessages
from services.dashboard_svc.convert import dashboard_to_pb, widget_to_pb
from services.dashboard_svc.models import Dashboard, Widget


def absent() -> errors.Error:
    """What is said of a dashboard that is not there."""
    return errors.not_found("DASHBOARD_NOT_FOUND", "There is no such dashboard.")


async def locked(
    session: AsyncSession, workspace_id: str, dashboard_id: str, etag: str = "", *, share: bool = False
) -> Dashboard:
    """The row of a dashboard, locked against other changes; with `share`, only against its deletion.

    Raises NOT_FOUND; ABORTED (ETAG_MISMATCH) when `etag` is given and is not the current one.
    """
    row = await session.get(
        Dashboard,
        (workspace_id, dashboard_id.lower()),
        with_for_update={"read": True, "key_share": True} if share else True,
    )
    if row is None:
        raise absent()
    if etag and etag != str(row.version):
        raise errors.etag_mismatch()
    return row


class Boards:
    """Reads. The messages are shared: not to be changed. Ids are in lower case."""

    def __init__(self, db: async_sessionmaker[AsyncSession], cache: Cache) -> None:
        self._db = db
        self._dashboards = CachedMessages(cache, "dashboards", dashboard_pb2.Dashboard)
        self._widgets = CachedMessages(cache, "widgets", ListWidgetsResponse)

    async def dashboard(self, workspace_id: str, dashboard_id: str) -> dashboard_pb2.Dashboard:
        """A dashboard. Raises NOT_FOUND."""
        key = f"{workspace_id}.{dashboard_id}"
        dashboard = await self._dashboards.get(key, partial(self._load_dashboard, workspace_id, dashboard_id))
        if dashboard is None:
            raise absent()
        return dashboard

    async def widgets(self, workspace_id: str, dashboard_id: str) -> list[dashboard_pb2.Widget]:
        """The widgets of a dashboard in the order of the layout. Raises NOT_FOUND."""
        key = f"{workspace_id}.{dashboard_id}"
        widgets = await self._widgets.get(key, partial(self._load_widgets, workspace_id, dashboard_id))
        if widgets is None:
            raise absent()
        return list(widgets.widgets)

    async def changed(self, workspace_id: str, dashboard_id: str) -> None:
        """Forgets a dashboard and its widgets everywhere; to be called after the commit of a change."""
        key = f"{workspace_id}.{dashboard_id}"
        await self._dashboards.invalidate(key)
        await self._widgets.invalidate(key)

    async def load_whole(
        self, workspace_id: str, dashboard_id: str
    ) -> tuple[dashboard_pb2.Dashboard, list[dashboard_pb2.Widget]] | None:
        """The dashboard with its widgets as they are now, as `load` gives them."""
        widgets = await self.load(workspace_id, dashboard_id)
        dashboard = None if widgets is None else await self._load_dashboard(workspace_id, dashboard_id)
        return None if dashboard is None or widgets is None else (dashboard, widgets)

    async def load(self, workspace_id: str, dashboard_id: str) -> list[dashboard_pb2.Widget] | None:
        """The widgets as they are now, for who may hear of a change before the cache; None: no such dashboard."""
        async with self._db() as session:
            if await session.get(Dashboard, (workspace_id, dashboard_id)) is None:
                return None
            rows = await session.scalars(
                select(Widget)
                .where(Widget.workspace_id == workspace_id, Widget.dashboard_id == dashboard_id)
                .order_by(Widget.y, Widget.x, Widget.widget_id)
            )
            return [widget_to_pb(row) for row in rows]

    async def _load_dashboard(self, workspace_id: str, dashboard_id: str) -> dashboard_pb2.Dashboard | None:
        async with self._db() as session:
            row = await session.get(Dashboard, (workspace_id, dashboard_id))
        return dashboard_to_pb(row) if row else None

    async def _load_widgets(self, workspace_id: str, dashboard_id: str) -> ListWidgetsResponse | None:
        widgets = await self.load(workspace_id, dashboard_id)
        return None if widgets is None else ListWidgetsResponse(widgets=widgets)
