from meshboard.user.v1.events_pb2 import WorkspaceDeleted
from sqlalchemy import func, select

from services.chassis.db import GrantRow
from services.dashboard_svc.consumers import on_workspace_deleted
from services.dashboard_svc.models import (
    Dashboard,
    Favourite,
    LibraryWidget,
    Version,
    Widget,
    WidgetKind,
    WidgetKindVersion,
)
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.custom import make_kind
from tests.dashboard_svc.test_favourites import favourite
from tests.dashboard_svc.test_library_widgets import create


async def test_a_deleted_workspace_leaves_nothing_and_takes_nothing_else(mesh: Mesh) -> None:
    gone, spared = mesh.identity.member("admin"), mesh.identity.member("admin")
    for member in (gone, spared):
        dashboard = await mesh.dashboard(member)
        await mesh.widget(member, dashboard)
        await favourite(mesh, member, dashboard.dashboard_id)
        await create(mesh, member)
        await make_kind(mesh, member)
    for _ in range(2):
        async with mesh.db.begin() as session:
            await on_workspace_deleted(session, WorkspaceDeleted(workspace_id=gone.workspace_id))
    async with mesh.db() as session:
        tables = (
            Dashboard,
            Widget,
            LibraryWidget,
            Version,
            Favourite,
            GrantRow,
            WidgetKind,
            WidgetKindVersion,
        )
        for table in tables:
            for member, count in ((gone, 0), (spared, 1)):
                left = (
                    select(func.count()).select_from(table).where(table.workspace_id == member.workspace_id)
                )
                assert await session.scalar(left) == count, table
