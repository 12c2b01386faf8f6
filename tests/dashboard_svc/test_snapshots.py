"""Data of one moment."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from meshboard.analytics.v1.query_pb2 import Query, TimeRange
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1 import widget_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from meshboard.dashboard.v1.share_link_pb2 import ShareLink

from services.chassis import errors
from services.dashboard_svc import shares
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.links import change, counted, data_of, delete, watching
from tests.dashboard_svc.test_shared import SHOP
from tests.harness import Member, new_id, refused

End = WatchDashboardResponse.End


async def snapshot(mesh: Mesh, member: Member, dashboard: Dashboard, **more: Any) -> tuple[ShareLink, str]:
    request = pb.CreateSnapshotRequest(dashboard_id=dashboard.dashboard_id, **more)
    response = await mesh.shares.CreateSnapshot(request, metadata=member.metadata)
    return response.share_link, response.token


async def test_shows_the_moment_and_asks_no_source(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, widget = await counted(mesh, ann, title="Then")
    broken = new_id()
    mesh.analytics.failures[broken] = errors.not_found("SOURCE_NOT_FOUND", f"No {broken}.", source_id=broken)
    lost = await mesh.widget(ann, dashboard, Query(source_ids=[broken]))
    day = TimeRange(last_seconds=86_400)
    link, token = await snapshot(mesh, ann, dashboard, filters=[SHOP], time_range=day)
    assert link.snapshot.HasField("data_time")
    assert 0 < link.snapshot.size_bytes < 1000
    query = next(asked.query for asked in mesh.analytics.asked if source_id in asked.query.source_ids)
    assert (list(query.filters), query.time_range) == ([SHOP], day)
    mesh.analytics.asked.clear()
    mesh.analytics.count[source_id] = 8
    await mesh.widgets.DeleteWidget(
        widget_service_pb2.DeleteWidgetRequest(
            dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id
        ),
        metadata=ann.metadata,
    )
    assert await data_of(mesh, token) == [7, -1]
    shown = (await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token))).dashboard
    assert [one.title for one in shown.widgets] == ["Then", ""]
    assert shown.data_time == link.snapshot.data_time
    async with watching(mesh, token) as watcher:
        assert watcher.state == {widget.widget_id: 7, lost.widget_id: -1}
        async with watching(mesh, token, cursor=watcher.cursor) as again:
            assert list(again.responses[0].changes) == []
        await delete(mesh, ann, link)
        await watcher.ended(End.LINK_ENDED, within=4)
    assert mesh.analytics.asked == []
    assert broken not in str(watcher.responses)


async def test_leaves_nothing_to_choose(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await snapshot(mesh, ann, dashboard)
    for choice in ({"choices": ["land=de"]}, {"time_range": TimeRange(last_seconds=60)}):
        assert (await refused(data_of(mesh, token, **choice)))[1] == "CHOICE_INVALID"
    assert (
        await change(mesh, ann, link, title="Then", allowed_origins=["https://a.example"])
    ).title == "Then"
    for fields in ({"filters": [SHOP]}, {"refresh_seconds": 5}, {"allow_time_range": True}):
        assert (await refused(change(mesh, ann, link, **fields)))[1] == "UPDATE_MASK_INVALID"


async def test_is_made_once_and_bounded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    first, token = await snapshot(mesh, ann, dashboard, request_id="once")
    again, nothing = await snapshot(mesh, ann, dashboard, request_id="once")
    assert (again, nothing) == (first, "")
    assert token
    monkeypatch.setattr(shares, "MAX_SNAPSHOT_BYTES", 10)
    assert await refused(snapshot(mesh, ann, dashboard)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "SNAPSHOT_TOO_LARGE",
    )
