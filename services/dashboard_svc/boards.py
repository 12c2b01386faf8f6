"""Dashboards with their widgets as viewers see them: read through the cache, loaded for a feed; locked for changes.

While a dashboard has a draft, viewers see the version that was the present one when the draft began. What is in the bin
is absent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1.widget_service_pb2 import ListWidgetsResponse
from sqlalchemy import select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.chassis.cache import Cache, CachedMessages
from services.chassis.times import timestamp_of
from services.dashboard_svc.convert import dashboard_to_pb, widget_to_pb
from services.dashboard_svc.library import shown_widgets
from services.dashboard_svc.models import Dashboard, Version, Widget


def absent() -> errors.Error:
    """What is said of a dashboard that is not there."""
    return errors.not_found("DASHBOARD_NOT_FOUND", "There is no such dashboard.")


async def locked(
    session: AsyncSession,
    workspace_id: str,
    dashboard_id: str,
    etag: str = "",
    *,
    share: bool = False,
    in_bin: bool = False,
) -> Dashboard:
    """The row of a dashboard, locked against other changes; with `share`, only against its deletion.

    Raises NOT_FOUND; ABORTED (ETAG_MISMATCH) when `etag` is given and is not the current one. With `in_bin` the
    dashboard has to be in the bin, and FAILED_PRECONDITION (DASHBOARD_NOT_IN_BIN) is raised when it is not; else what
    is in the bin is absent.
    """
    row = await session.get(
        Dashboard,
        (workspace_id, dashboard_id.lower()),
        with_for_update={"read": True, "key_share": True} if share else True,
    )
    if row is None or (row.delete_time and not in_bin):
        raise absent()
    if etag and etag != str(row.version):
        raise errors.etag_mismatch()
    if in_bin and not row.delete_time:
        raise errors.failed_precondition("DASHBOARD_NOT_IN_BIN", "The dashboard is not in the bin.")
    return row


async def published(session: AsyncSession, rows: Sequence[Dashboard]) -> Mapping[str, Version]:
    """What viewers see of those dashboards that have a draft, by their ids."""
    keys = [
        (row.workspace_id, row.dashboard_id, row.published_version)
        for row in rows
        if row.published_version is not None
    ]
    if not keys:
        return {}
    key = tuple_(Version.workspace_id, Version.dashboard_id, Version.number)
    versions = await session.scalars(select(Version).where(key.in_(keys)))
    return {version.dashboard_id: version for version in versions}


async def shown(session: AsyncSession, rows: Sequence[Dashboard]) -> list[dashboard_pb2.Dashboard]:
    """The dashboards as viewers see them."""
    versions = await published(session, rows)
    return [dashboard_to_pb(row, versions.get(row.dashboard_id)) for row in rows]


async def seen_widgets(
    session: AsyncSession, rows: Sequence[Dashboard]
) -> Mapping[str, list[dashboard_pb2.Widget]]:
    """The widgets that viewers see, by dashboard, in the order of the layout."""
    versions = await published(session, rows)
    present = await _widgets_of(session, [row for row in rows if row.dashboard_id not in versions])
    found = {}
    for row in rows:
        version = versions.get(row.dashboard_id)
        widgets = published_widgets(version) if version else present.get(row.dashboard_id, [])
        found[row.dashboard_id] = await shown_widgets(session, row.workspace_id, widgets)
    return found


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

    async def load(
        self, workspace_id: str, dashboard_id: str
    ) -> tuple[dashboard_pb2.Dashboard, list[dashboard_pb2.Widget]] | None:
        """The dashboard with its widgets as they are now, for who may hear of a change before the cache.

        None: there is no such dashboard.
        """
        async with self._db() as session:
            row = await session.get(Dashboard, (workspace_id, dashboard_id))
            if row is None or row.delete_time:
                return None
            (dashboard,) = await shown(session, [row])
            return dashboard, (await seen_widgets(session, [row]))[row.dashboard_id]

    async def _load_dashboard(self, workspace_id: str, dashboard_id: str) -> dashboard_pb2.Dashboard | None:
        async with self._db() as session:
            row = await session.get(Dashboard, (workspace_id, dashboard_id))
            if row is None or row.delete_time:
                return None
            (dashboard,) = await shown(session, [row])
            return dashboard

    async def _load_widgets(self, workspace_id: str, dashboard_id: str) -> ListWidgetsResponse | None:
        loaded = await self.load(workspace_id, dashboard_id)
        return None if loaded is None else ListWidgetsResponse(widgets=loaded[1])


async def widgets_of(session: AsyncSession, dashboard: Dashboard) -> list[dashboard_pb2.Widget]:
    """The widgets as editors have them, in the order of the layout."""
    widgets = (await _widgets_of(session, [dashboard])).get(dashboard.dashboard_id, [])
    return await shown_widgets(session, dashboard.workspace_id, widgets)


async def _widgets_of(
    session: AsyncSession, rows: Sequence[Dashboard]
) -> Mapping[str, list[dashboard_pb2.Widget]]:
    widgets: dict[str, list[dashboard_pb2.Widget]] = defaultdict(list)
    if keys := [(row.workspace_id, row.dashboard_id) for row in rows]:
        found = await session.scalars(
            select(Widget)
            .where(tuple_(Widget.workspace_id, Widget.dashboard_id).in_(keys))
            .order_by(Widget.y, Widget.x, Widget.widget_id)
        )
        for row in found:
            widgets[row.dashboard_id].append(widget_to_pb(row))
    return widgets


def published_widgets(version: Version) -> list[dashboard_pb2.Widget]:
    """The widgets of a version. It holds no times and etags of theirs: they have the version's."""
    widgets = list(dashboard_pb2.DashboardContent.FromString(version.content).widgets)
    for widget in widgets:
        widget.dashboard_id = version.dashboard_id
        widget.etag = f"v{version.number}"
        widget.update_time.CopyFrom(timestamp_of(version.create_time))
    return widgets
