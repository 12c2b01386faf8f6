"""How many statements the calls that are made most often cost."""

from __future__ import annotations

from contextlib import AbstractContextManager

from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1 import folder_service_pb2 as folder_pb
from meshboard.user.v1.grant_pb2 import Subject

from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_grants import grant
from tests.statements import statements_about


def statements() -> AbstractContextManager[list[str]]:
    """The statements on the tables of this service; the relay makes others beside them all the time."""
    return statements_about(" dashboards", " folders", " grants", " widgets")


async def test_deciding_costs_one_statement_however_deep_the_folder(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    for _ in range(5):
        folder = await mesh.folder(admin, parent=folder)
    dashboard = await mesh.dashboard(admin, folder=folder)
    request = pb.GetDashboardRequest(dashboard_id=dashboard.dashboard_id)
    await mesh.dashboards.GetDashboard(request, metadata=admin.metadata)
    with statements() as made:
        await mesh.dashboards.GetDashboard(request, metadata=admin.metadata)
    assert len(made) == 1, "the access; the dashboard comes from the cache"


async def test_lists_cost_one_statement(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    for _ in range(3):
        await mesh.dashboard(admin, folder=folder)
    for list_page, request in (
        (mesh.dashboards.ListDashboards, pb.ListDashboardsRequest(page_size=2)),
        (mesh.dashboards.ListDashboards, pb.ListDashboardsRequest(folder_id=folder.folder_id)),
        (mesh.folders.ListFolders, folder_pb.ListFoldersRequest()),
    ):
        with statements() as made:
            await list_page(request, metadata=admin.metadata)
        assert len(made) == 1


async def test_a_grant_costs_five_statements(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    with statements() as made:
        await grant(mesh, admin, dashboard, Subject(workspace=True))
    assert len(made) == 5, "access, lock, what the caller has, the expired one, the new one"
