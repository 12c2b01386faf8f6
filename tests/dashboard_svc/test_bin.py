from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1 import (
    dashboard_service_pb2 as pb,
)
from meshboard.dashboard.v1 import (
    draft_service_pb2,
    folder_service_pb2,
    version_service_pb2,
    widget_service_pb2,
)
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Layout, Widget
from meshboard.user.v1.grant_pb2 import Grant, Subject
from meshboard.user.v1.internal_grant_service_pb2 import GetResourceGrantsRequest
from sqlalchemy import select

from services.chassis import times
from services.chassis.db import GrantRow
from services.dashboard_svc import bin, models
from tests.dashboard_svc.boards import (
    delete,
    events,
    get,
    listed,
    publish,
    start_draft,
    update,
    versions,
)
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, reason_of, refused, service_metadata

NOT_FOUND, FAILED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION


async def undelete(mesh: Mesh, member: Member, dashboard_id: str, etag: str = "") -> Dashboard:
    request = pb.UndeleteDashboardRequest(dashboard_id=dashboard_id, etag=etag)
    there: Dashboard = (await mesh.dashboards.UndeleteDashboard(request, metadata=member.metadata)).dashboard
    return there


async def purge(mesh: Mesh, member: Member, dashboard_id: str, etag: str = "") -> None:
    request = pb.PurgeDashboardRequest(dashboard_id=dashboard_id, etag=etag)
    await mesh.dashboards.PurgeDashboard(request, metadata=member.metadata)


def all_calls(mesh: Mesh, member: Member, dashboard_id: str, widget_id: str) -> dict[str, Any]:
    """All that can be done with a dashboard, but taking it out of the bin and purging it."""
    key: dict[str, Any] = {"dashboard_id": dashboard_id}
    tile: dict[str, Any] = {**key, "widget_id": widget_id}
    board, tiles, versions_, drafts = mesh.dashboards, mesh.widgets, mesh.versions, mesh.drafts
    requests = {
        board.GetDashboard: pb.GetDashboardRequest(**key),
        board.UpdateDashboard: pb.UpdateDashboardRequest(dashboard=Dashboard(**key, title="t")),
        board.MoveDashboard: pb.MoveDashboardRequest(**key),
        board.DuplicateDashboard: pb.DuplicateDashboardRequest(**key),
        board.DeleteDashboard: pb.DeleteDashboardRequest(**key),
        board.FavouriteDashboard: pb.FavouriteDashboardRequest(**key),
        board.UnfavouriteDashboard: pb.UnfavouriteDashboardRequest(**key),
        board.GetDashboardData: pb.GetDashboardDataRequest(**key),
        board.CreateDashboardGrant: pb.CreateDashboardGrantRequest(
            **key, subject=Subject(workspace=True), role="viewer"
        ),
        board.ListDashboardGrants: pb.ListDashboardGrantsRequest(**key),
        board.DeleteDashboardGrant: pb.DeleteDashboardGrantRequest(**key, grant_id=new_id()),
        board.BatchUpdateDashboardGrants: pb.BatchUpdateDashboardGrantsRequest(
            **key, delete_grant_ids=[new_id()]
        ),
        tiles.CreateWidget: widget_service_pb2.CreateWidgetRequest(
            **key, kind=Widget.TABLE, query=Query(source_ids=[new_id()])
        ),
        tiles.GetWidget: widget_service_pb2.GetWidgetRequest(**tile),
        tiles.ListWidgets: widget_service_pb2.ListWidgetsRequest(**key),
        tiles.UpdateWidget: widget_service_pb2.UpdateWidgetRequest(
            widget=Widget(**tile, layout=Layout(width=4))
        ),
        tiles.DeleteWidget: widget_service_pb2.DeleteWidgetRequest(**tile),
        drafts.StartDraft: draft_service_pb2.StartDraftRequest(**key),
        drafts.GetDraft: draft_service_pb2.GetDraftRequest(**key),
        drafts.GetDraftData: draft_service_pb2.GetDraftDataRequest(**key),
        drafts.PublishDashboard: draft_service_pb2.PublishDashboardRequest(**key),
        drafts.DiscardDraft: draft_service_pb2.DiscardDraftRequest(**key),
        versions_.ListVersions: version_service_pb2.ListVersionsRequest(**key),
        versions_.GetVersion: version_service_pb2.GetVersionRequest(**key, version_id="1"),
        versions_.DiffVersions: version_service_pb2.DiffVersionsRequest(**key),
        versions_.RestoreVersion: version_service_pb2.RestoreVersionRequest(**key, version_id="1"),
    }
    return {
        type(request).__name__: method(request, metadata=member.metadata)
        for method, request in requests.items()
    }


async def test_what_is_in_the_bin_is_absent(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", workspace_id=admin.workspace_id)
    dashboard = await mesh.dashboard(admin)
    widget = await mesh.widget(admin, dashboard)
    await get(mesh, admin, dashboard.dashboard_id)
    await delete(mesh, admin, dashboard.dashboard_id)
    assert await listed(mesh, admin) == await listed(mesh, editor) == []
    for member in (admin, editor):
        for name, call in all_calls(mesh, member, dashboard.dashboard_id, widget.widget_id).items():
            assert (name, await refused(call)) == (name, (NOT_FOUND, "DASHBOARD_NOT_FOUND"))
        watch = mesh.dashboards.WatchDashboard(
            pb.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=member.metadata
        )
        assert await refused(watch.read()) == (NOT_FOUND, "DASHBOARD_NOT_FOUND")
    asked = await mesh.internal_grants.GetResourceGrants(
        GetResourceGrantsRequest(
            workspace_id=admin.workspace_id,
            resource_type="dashboard",
            resource_ids=[dashboard.dashboard_id],
            user_id=admin.user_id,
        ),
        metadata=service_metadata(mesh.identity.keys, "auth", "dashboard"),
    )
    assert not asked.resources


async def test_comes_back_with_all_that_it_had(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    viewer = mesh.identity.member("viewer", workspace_id=admin.workspace_id)
    dashboard = await mesh.dashboard(admin, "Shop")
    dashboard_id = dashboard.dashboard_id
    await mesh.widget(admin, dashboard, title="Kept")
    await mesh.dashboards.FavouriteDashboard(
        pb.FavouriteDashboardRequest(dashboard_id=dashboard_id), metadata=admin.metadata
    )
    await update(mesh, admin, dashboard_id, name="shop")
    await start_draft(mesh, admin, dashboard_id)
    await update(mesh, admin, dashboard_id, title="Draft")
    before = await get(mesh, admin, dashboard_id)
    kept = await versions(mesh, admin, dashboard_id)
    await delete(mesh, admin, dashboard_id)
    (binned,) = await listed(mesh, viewer, deleted=True)
    assert (binned.title, binned.dashboard_id) == ("Shop", dashboard_id)
    stay = binned.purge_time.ToDatetime() - binned.delete_time.ToDatetime()
    assert stay == timedelta(days=30)
    assert await refused(undelete(mesh, viewer, dashboard_id)) == (
        NOT_FOUND,
        "DASHBOARD_NOT_FOUND",
    )  # may not, and learns nothing
    there = await undelete(mesh, admin, dashboard_id)
    assert there == await get(mesh, admin, dashboard_id)
    assert not there.HasField("delete_time")
    for field in ("title", "name", "has_draft", "favourite", "etag"):
        assert getattr(there, field) == getattr(before, field), field
    assert await versions(mesh, admin, dashboard_id) == kept
    assert (await publish(mesh, admin, dashboard_id)).title == "Draft"
    assert await listed(mesh, admin, deleted=True) == []
    told = await events(mesh, admin)
    assert [each for each in told if "eleted" in each] == ["DashboardDeleted", "DashboardUndeleted"]


async def test_only_what_is_in_the_bin_is_taken_out_or_purged(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    for call in (undelete, purge):
        assert await refused(call(mesh, admin, dashboard.dashboard_id)) == (FAILED, "DASHBOARD_NOT_IN_BIN")
        assert await refused(call(mesh, admin, dashboard.dashboard_id, "no")) == (
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
        )
        assert await refused(call(mesh, admin, new_id())) == (NOT_FOUND, "DASHBOARD_NOT_FOUND")
    await delete(mesh, admin, dashboard.dashboard_id)
    outcomes = await asyncio.gather(
        *(undelete(mesh, admin, dashboard.dashboard_id) for _ in range(4)), return_exceptions=True
    )
    failures = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert [reason_of(failure) for failure in failures] == ["DASHBOARD_NOT_IN_BIN"] * 3


async def test_gives_up_its_name(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    await update(mesh, admin, dashboard.dashboard_id, name="shop")
    await delete(mesh, admin, dashboard.dashboard_id)
    other = await mesh.dashboard(admin)
    await update(mesh, admin, other.dashboard_id, name="shop")
    there = await undelete(mesh, admin, dashboard.dashboard_id)
    assert there.name == ""
    assert [each.dashboard_id for each in await listed(mesh, admin, name="shop")] == [other.dashboard_id]


async def rows_of(mesh: Mesh, dashboard_id: str) -> int:
    found = 0
    async with mesh.db() as session:
        for table in (models.Dashboard, models.Widget, models.Version, models.Favourite):
            found += len((await session.scalars(select(table).filter_by(dashboard_id=dashboard_id))).all())
        grants = await session.scalars(select(GrantRow).where(GrantRow.resource_id == dashboard_id))
        return found + len(grants.all())


async def test_purging_leaves_nothing(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    await mesh.widget(admin, dashboard)
    await mesh.dashboards.FavouriteDashboard(
        pb.FavouriteDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=admin.metadata
    )
    await delete(mesh, admin, dashboard.dashboard_id)
    assert await rows_of(mesh, dashboard.dashboard_id) == 5
    await purge(mesh, admin, dashboard.dashboard_id)
    assert await rows_of(mesh, dashboard.dashboard_id) == 0
    assert (await events(mesh, admin))[-1] == "DashboardPurged"
    assert await refused(undelete(mesh, admin, dashboard.dashboard_id)) == (NOT_FOUND, "DASHBOARD_NOT_FOUND")


async def test_is_purged_when_its_time_has_come(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    due, later, alive = [await mesh.dashboard(admin) for _ in range(3)]
    for dashboard in (due, later):
        await delete(mesh, admin, dashboard.dashboard_id)
    async with mesh.db.begin() as session:
        row = await session.get_one(models.Dashboard, (admin.workspace_id, later.dashboard_id))
        assert row.purge_time
        row.purge_time += timedelta(days=1)
    in_thirty_days = times.now() + timedelta(days=30, minutes=1)
    while await bin.purge_due(mesh.db, in_thirty_days):
        pass
    assert await rows_of(mesh, due.dashboard_id) == 0
    assert [each.dashboard_id for each in await listed(mesh, admin, deleted=True)] == [later.dashboard_id]
    assert [each.dashboard_id for each in await listed(mesh, admin)] == [alive.dashboard_id]
    assert (await events(mesh, admin))[-1] == "DashboardPurged"


async def test_a_folder_is_not_deleted_under_what_is_in_the_bin(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    dashboard = await mesh.dashboard(admin, folder=folder)
    await delete(mesh, admin, dashboard.dashboard_id)
    request = folder_service_pb2.DeleteFolderRequest(folder_id=folder.folder_id)
    assert await refused(mesh.folders.DeleteFolder(request, metadata=admin.metadata)) == (
        FAILED,
        "FOLDER_NOT_EMPTY",
    )
    await purge(mesh, admin, dashboard.dashboard_id)
    await mesh.folders.DeleteFolder(request, metadata=admin.metadata)


async def test_lists_of_the_bin_are_filtered_by_rights(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    viewer = mesh.identity.member("viewer", workspace_id=admin.workspace_id)
    made = [await mesh.dashboard(admin, f"{number}") for number in range(5)]
    for dashboard in made[:4]:
        if dashboard is made[1]:
            await mesh.dashboards.CreateDashboardGrant(
                pb.CreateDashboardGrantRequest(
                    dashboard_id=dashboard.dashboard_id,
                    subject=Subject(workspace=True),
                    role="viewer",
                    effect=Grant.DENY,
                ),
                metadata=admin.metadata,
            )
        await delete(mesh, admin, dashboard.dashboard_id)
    assert [each.title for each in await listed(mesh, viewer, deleted=True)] == ["3", "2", "0"]
    assert [each.title for each in await listed(mesh, admin, deleted=True)] == ["3", "2", "1", "0"]
    assert [each.title for each in await listed(mesh, viewer)] == ["4"]


async def test_a_stream_ends_when_its_dashboard_goes_into_the_bin(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    await mesh.widget(admin, dashboard)
    call = mesh.dashboards.WatchDashboard(
        pb.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=admin.metadata
    )
    assert (await call.read()).HasField("snapshot")
    await delete(mesh, admin, dashboard.dashboard_id)
    assert (await call.read()).end.reason == pb.WatchDashboardResponse.End.ACCESS_LOST
