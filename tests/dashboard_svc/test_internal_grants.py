"""What auth_svc is told of grants."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import grpc
from meshboard.dashboard.v1 import dashboard_service_pb2
from meshboard.user.v1 import internal_grant_service_pb2 as pb
from meshboard.user.v1.grant_pb2 import Grant, ResourceGrant, Subject
from sqlalchemy import update

from services.chassis.db import GrantRow
from services.chassis.grants import levels_from_pb
from services.chassis.rights import decide
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_folders import folder_grant
from tests.dashboard_svc.test_grants import grant
from tests.harness import new_id, refused, service_metadata


async def test_tells_what_decides_about_resources(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    team_id = new_id()
    guest = mesh.identity.member("viewer", admin.workspace_id, [team_id])
    outer = await mesh.folder(admin)
    inner = await mesh.folder(admin, parent=outer)
    dashboard, alone = await mesh.dashboard(admin, folder=inner), await mesh.dashboard(admin)
    foreign = await mesh.dashboard(mesh.identity.member("admin"))
    to_all = await folder_grant(mesh, admin, outer, Subject(workspace=True), effect=Grant.DENY)
    to_team = await folder_grant(mesh, admin, outer, Subject(team_id=team_id), "editor")
    to_guest = await grant(mesh, admin, dashboard, Subject(user_id=guest.user_id))
    expired = await grant(mesh, admin, dashboard, Subject(team_id=team_id), "admin", Grant.DENY)
    await grant(mesh, admin, dashboard, Subject(user_id=new_id()), effect=Grant.DENY)
    async with mesh.db.begin() as session:
        past = datetime.now(UTC) - timedelta(seconds=1)
        row = update(GrantRow).where(GrantRow.grant_id == expired.grant_id)
        await session.execute(row.values(expire_time=past))
    metadata = service_metadata(mesh.identity.keys, "auth", "dashboard")
    response = await mesh.internal_grants.GetResourceGrants(
        pb.GetResourceGrantsRequest(
            workspace_id=admin.workspace_id,
            resource_type="dashboard",
            resource_ids=[dashboard.dashboard_id.upper(), alone.dashboard_id, foreign.dashboard_id, new_id()],
            user_id=guest.user_id,
            team_ids=[team_id],
        ),
        metadata=metadata,
    )
    found = {resource.resource_id: resource for resource in response.resources}
    assert set(found) == {dashboard.dashboard_id, alone.dashboard_id}
    assert [
        (level.resource_type, level.resource_id, {each.grant_id for each in level.grants})
        for level in found[dashboard.dashboard_id].levels
    ] == [
        ("dashboard", dashboard.dashboard_id, {to_guest.grant_id}),
        ("folder", inner.folder_id, set()),
        ("folder", outer.folder_id, {to_all.grant_id, to_team.grant_id}),
    ]
    assert found[dashboard.dashboard_id].levels[0].grants[0] == to_guest
    assert [(level.resource_type, len(level.grants)) for level in found[alone.dashboard_id].levels] == [
        ("dashboard", 0)
    ]
    rights = mesh.identity.rights[guest.user_id, guest.workspace_id]
    levels = levels_from_pb(found[dashboard.dashboard_id])
    assert decide(rights, levels, "dashboards.edit")
    assert not decide(rights, levels[:2], "dashboards.edit")


async def test_lists_the_grants_of_a_subject(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    team_id = new_id()
    folder, dashboard = await mesh.folder(admin), await mesh.dashboard(admin)
    first = await folder_grant(mesh, admin, folder, Subject(team_id=team_id))
    second = await grant(mesh, admin, dashboard, Subject(team_id=team_id), "editor", Grant.DENY)
    to_all = await grant(mesh, admin, dashboard, Subject(workspace=True))
    expected = [
        ResourceGrant(resource_type="folder", resource_id=folder.folder_id, grant=first),
        ResourceGrant(resource_type="dashboard", resource_id=dashboard.dashboard_id, grant=second),
    ]
    metadata = service_metadata(mesh.identity.keys, "auth", "dashboard")
    request = pb.ListSubjectGrantsRequest(
        workspace_id=admin.workspace_id, subject=Subject(team_id=team_id), page_size=1
    )
    listed: list[ResourceGrant] = []
    while True:
        page = await mesh.internal_grants.ListSubjectGrants(request, metadata=metadata)
        listed += page.grants
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == expected
    request = pb.ListSubjectGrantsRequest(workspace_id=admin.workspace_id, subject=Subject(workspace=True))
    page = await mesh.internal_grants.ListSubjectGrants(request, metadata=metadata)
    assert [each.grant for each in page.grants] == [to_all]
    request.workspace_id = new_id()
    assert not (await mesh.internal_grants.ListSubjectGrants(request, metadata=metadata)).grants


async def test_is_for_auth_alone(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    asking = pb.GetResourceGrantsRequest(
        workspace_id=admin.workspace_id,
        resource_type="dashboard",
        resource_ids=[new_id()],
        user_id=admin.user_id,
    )
    listing = pb.ListSubjectGrantsRequest(workspace_id=admin.workspace_id, subject=Subject(workspace=True))
    denied = (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
    for metadata in (admin.metadata, service_metadata(mesh.identity.keys, "user", "dashboard")):
        assert await refused(mesh.internal_grants.GetResourceGrants(asking, metadata=metadata)) == denied
        assert await refused(mesh.internal_grants.ListSubjectGrants(listing, metadata=metadata)) == denied
    asking.resource_type = "source"
    metadata = service_metadata(mesh.identity.keys, "auth", "dashboard")
    assert await refused(mesh.internal_grants.GetResourceGrants(asking, metadata=metadata)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VALIDATION_FAILED",
    )


async def test_a_page_token_is_of_its_list(mesh: Mesh) -> None:
    """Of dashboards, of one folder, and of one workspace."""
    admin, stranger = mesh.identity.member("admin"), mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    for _ in range(3):
        await mesh.dashboard(admin, folder=folder)
    request = dashboard_service_pb2.ListDashboardsRequest(page_size=1)
    page = await mesh.dashboards.ListDashboards(request, metadata=admin.metadata)
    request.page_token = page.next_page_token
    await mesh.dashboards.ListDashboards(request, metadata=admin.metadata)
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
    assert await refused(mesh.dashboards.ListDashboards(request, metadata=stranger.metadata)) == refusal
    request.folder_id = folder.folder_id
    assert await refused(mesh.dashboards.ListDashboards(request, metadata=admin.metadata)) == refusal
