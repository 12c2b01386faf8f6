from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from sqlalchemy import select

from services.chassis.db import GrantRow, OutboxRow
from services.dashboard_svc.models import Widget
from tests.dashboard_svc.conftest import Mesh
from tests.harness import new_id, reason_of


async def test_creates_with_an_owner_grant_and_an_event(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Shop")
    assert (dashboard.title, dashboard.workspace_id, dashboard.creator_id) == (
        "Shop",
        ann.workspace_id,
        ann.user_id,
    )
    async with mesh.db() as session:
        grant = (
            await session.scalars(select(GrantRow).where(GrantRow.resource_id == dashboard.dashboard_id))
        ).one()
        assert (grant.subject_id, grant.role, grant.effect) == (ann.user_id, "owner", "ALLOW")
        events = await session.scalars(
            select(OutboxRow).where(OutboxRow.headers["Workspace-Id"].astext == ann.workspace_id)
        )
        assert [event.subject for event in events] == ["meshboard.dashboard.v1.DashboardCreated"]
    got = await mesh.dashboards.GetDashboard(
        pb.GetDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
    )
    assert got.dashboard == dashboard


async def test_repeat_of_a_create_returns_the_first(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("editor"), mesh.identity.member("editor")
    request = pb.CreateDashboardRequest(title="Shop", request_id="once")
    responses = await asyncio.gather(
        *(mesh.dashboards.CreateDashboard(request, metadata=ann.metadata) for _ in range(5))
    )
    assert len({response.dashboard.dashboard_id for response in responses}) == 1
    others = await mesh.dashboards.CreateDashboard(request, metadata=bob.metadata)
    assert others.dashboard.dashboard_id != responses[0].dashboard.dashboard_id
    async with mesh.db() as session:
        grants = await session.scalars(select(GrantRow).where(GrantRow.workspace_id == ann.workspace_id))
        assert len(grants.all()) == 1


async def test_refuses_text_that_cannot_be_stored(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboard(ann, "a\0b")
    assert reason_of(failure.value) == "VALIDATION_FAILED"


async def test_viewer_may_not_create(mesh: Mesh) -> None:
    viewer = mesh.identity.member("viewer")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboard(viewer)
    assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert reason_of(failure.value) == "PERMISSION_MISSING"


async def test_is_absent_for_another_workspace(mesh: Mesh) -> None:
    ann, stranger = mesh.identity.member("editor"), mesh.identity.member("owner")
    dashboard = await mesh.dashboard(ann)
    answers = []
    for dashboard_id in (dashboard.dashboard_id, new_id()):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await mesh.dashboards.GetDashboard(
                pb.GetDashboardRequest(dashboard_id=dashboard_id), metadata=stranger.metadata
            )
        assert reason_of(failure.value) == "DASHBOARD_NOT_FOUND"
        answers.append((failure.value.code(), failure.value.details()))
    assert answers[0] == answers[1] == (grpc.StatusCode.NOT_FOUND, "There is no such dashboard.")


async def test_updates_what_the_mask_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    wanted = Dashboard(dashboard_id=dashboard.dashboard_id.upper(), title="New", description="Told")

    async def update(*paths: str, **fields: str) -> Dashboard:
        request = pb.UpdateDashboardRequest(dashboard=wanted, update_mask=FieldMask(paths=paths))
        request.dashboard.MergeFrom(Dashboard(**fields))  # type: ignore[arg-type]  # text fields only
        response = await mesh.dashboards.UpdateDashboard(request, metadata=ann.metadata)
        changed: Dashboard = response.dashboard
        return changed

    read = pb.GetDashboardRequest(dashboard_id=dashboard.dashboard_id)
    await mesh.dashboards.GetDashboard(read, metadata=ann.metadata)
    one = await update("description")
    assert (one.title, one.description) == ("Traffic", "Told")
    assert one.etag != dashboard.etag
    assert one.update_time.ToDatetime() > dashboard.update_time.ToDatetime()
    two = await update()
    assert (two.title, two.description) == ("New", "Told")
    # The change is read at once, though reads are cached.
    got = await mesh.dashboards.GetDashboard(
        pb.GetDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
    )
    assert got.dashboard == two
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await update(etag=one.etag)
    assert (failure.value.code(), reason_of(failure.value)) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert (await update(etag=two.etag)).etag != two.etag
    for path in ("etag", "creator_id", "nonsense", "title.x"):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await update(path)
        assert reason_of(failure.value) == "UPDATE_MASK_INVALID"
    wanted.ClearField("title")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await update("title")
    assert reason_of(failure.value) == "VALIDATION_FAILED"


async def test_of_concurrent_updates_with_one_etag_one_wins(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    outcomes = await asyncio.gather(
        *(
            mesh.dashboards.UpdateDashboard(
                pb.UpdateDashboardRequest(
                    dashboard=Dashboard(
                        dashboard_id=dashboard.dashboard_id, title=f"{n}", etag=dashboard.etag
                    )
                ),
                metadata=ann.metadata,
            )
            for n in range(5)
        ),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert [reason_of(refusal) for refusal in refused] == ["ETAG_MISMATCH"] * 4


async def test_deletes_into_the_bin_with_widgets_and_grants(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    await mesh.widget(admin, dashboard)
    request = pb.DeleteDashboardRequest(dashboard_id=dashboard.dashboard_id, etag=dashboard.etag)
    with pytest.raises(grpc.aio.AioRpcError) as failure:  # the widget has changed it
        await mesh.dashboards.DeleteDashboard(request, metadata=admin.metadata)
    assert reason_of(failure.value) == "ETAG_MISMATCH"
    request.etag = ""
    await mesh.dashboards.DeleteDashboard(request, metadata=admin.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboards.DeleteDashboard(request, metadata=admin.metadata)
    assert reason_of(failure.value) == "DASHBOARD_NOT_FOUND"
    async with mesh.db() as session:
        for table in (GrantRow, Widget):
            rows = await session.scalars(select(table).where(table.workspace_id == admin.workspace_id))
            assert len(rows.all()) == 1


async def test_pages_newest_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    made = [(await mesh.dashboard(ann, f"{n}")).dashboard_id for n in range(5)]
    listed: list[str] = []
    request = pb.ListDashboardsRequest(page_size=2)
    sizes = []
    while True:
        page = await mesh.dashboards.ListDashboards(request, metadata=ann.metadata)
        listed += [dashboard.dashboard_id for dashboard in page.dashboards]
        sizes.append(len(page.dashboards))
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == made[::-1]
    assert sizes == [2, 2, 1]
    other = mesh.identity.member("editor")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboards.ListDashboards(request, metadata=other.metadata)
    assert reason_of(failure.value) == "PAGE_TOKEN_INVALID"
