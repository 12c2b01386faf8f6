"""Links to dashboards, and who has one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget
from meshboard.dashboard.v1.share_link_pb2 import ShareLink

from tests.conditions import eventually
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_watch import Watcher
from tests.harness import Member, new_id

NO_LINK = "SHARE_LINK_NOT_FOUND"


async def share(mesh: Mesh, member: Member, dashboard: Dashboard, **more: Any) -> tuple[ShareLink, str]:
    """A new link, and its token."""
    request = pb.CreateShareLinkRequest(dashboard_id=dashboard.dashboard_id, **more)
    response = await mesh.shares.CreateShareLink(request, metadata=member.metadata)
    return response.share_link, response.token


async def change(mesh: Mesh, member: Member, link: ShareLink, **fields: Any) -> ShareLink:
    """The link after these fields were changed."""
    wanted = ShareLink(dashboard_id=link.dashboard_id, share_link_id=link.share_link_id, **fields)
    request = pb.UpdateShareLinkRequest(share_link=wanted)
    request.update_mask.paths.extend(fields)
    changed: ShareLink = (await mesh.shares.UpdateShareLink(request, metadata=member.metadata)).share_link
    return changed


async def delete(mesh: Mesh, member: Member, link: ShareLink) -> None:
    """Ends the link."""
    request = pb.DeleteShareLinkRequest(dashboard_id=link.dashboard_id, share_link_id=link.share_link_id)
    await mesh.shares.DeleteShareLink(request, metadata=member.metadata)


async def data_of(mesh: Mesh, token: str, **more: Any) -> list[float]:
    """The number that each widget shows; -1 for an error."""
    metadata = more.pop("metadata", ())
    request = pb.GetSharedDashboardDataRequest(token=token, **more)
    response = await mesh.shares.GetSharedDashboardData(request, metadata=metadata)
    return [
        data.result.rows[0].values[0].number_value if data.HasField("result") else -1.0
        for data in response.widgets
    ]


async def counted(mesh: Mesh, member: Member, count: int = 7, **more: Any) -> tuple[Dashboard, str, Widget]:
    """A dashboard with a widget that counts a source."""
    dashboard, source_id = await mesh.dashboard(member), new_id()
    mesh.analytics.count[source_id] = count
    return dashboard, source_id, await mesh.widget(member, dashboard, Query(source_ids=[source_id]), **more)


@asynccontextmanager
async def watching(mesh: Mesh, token: str, stub: Any = None, **more: Any) -> AsyncIterator[Watcher]:
    """Watches by the link until the block ends."""
    call = (stub or mesh.shares).WatchSharedDashboard(pb.WatchSharedDashboardRequest(token=token, **more))
    watcher = Watcher(call, {})
    try:
        await eventually(lambda: bool(watcher.responses) or watcher.reading.done(), 10)
        if watcher.reading.done():
            await watcher.reading
        yield watcher
    finally:
        call.cancel()
        await asyncio.gather(watcher.reading, return_exceptions=True)
