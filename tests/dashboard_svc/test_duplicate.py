from __future__ import annotations

import asyncio

import grpc
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1 import widget_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Layout, Settings, Variable
from meshboard.user.v1.grant_pb2 import Grant, Subject

from services.chassis import errors
from tests.dashboard_svc.boards import events, get, listed, start_draft, update, versions
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_folders import folder_grant
from tests.dashboard_svc.test_grants import grant
from tests.dashboard_svc.test_library_widgets import create, place
from tests.harness import Member, new_id, refused


async def duplicate(mesh: Mesh, member: Member, dashboard_id: str, **more: str) -> Dashboard:
    request = pb.DuplicateDashboardRequest(dashboard_id=dashboard_id, **more)
    made: Dashboard = (await mesh.dashboards.DuplicateDashboard(request, metadata=member.metadata)).dashboard
    return made


async def tiles(mesh: Mesh, member: Member, dashboard_id: str) -> list[tuple[str, str, Query, Layout]]:
    request = widget_service_pb2.ListWidgetsRequest(dashboard_id=dashboard_id)
    found = await mesh.widgets.ListWidgets(request, metadata=member.metadata)
    return [(each.widget_id, each.title, each.query, each.layout) for each in found.widgets]


async def test_copies_what_viewers_see(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    dashboard = await mesh.dashboard(admin, "Shop")
    await update(
        mesh,
        admin,
        dashboard.dashboard_id,
        description="Told",
        tags=["x"],
        name="shop",
        settings=Settings(refresh_seconds=5),
        variables=[Variable(name="a", text=Variable.FreeText())],
    )
    await mesh.widget(admin, dashboard, title="A")
    await mesh.widget(admin, dashboard, title="B")
    await start_draft(mesh, admin, dashboard.dashboard_id)
    await update(mesh, admin, dashboard.dashboard_id, title="Unfinished")
    await mesh.widget(admin, dashboard, title="Unfinished")
    folder = await mesh.folder(admin)
    copy = await duplicate(mesh, editor, dashboard.dashboard_id, folder_id=folder.folder_id)
    assert copy == await get(mesh, editor, copy.dashboard_id)
    original = await get(mesh, editor, dashboard.dashboard_id)
    for field in ("title", "description", "tags", "settings", "variables"):
        assert getattr(copy, field) == getattr(original, field), field
    assert (copy.name, copy.has_draft, copy.folder_id) == ("", False, folder.folder_id)
    assert copy.creator_id == editor.user_id
    old = await tiles(mesh, editor, dashboard.dashboard_id)
    new = await tiles(mesh, editor, copy.dashboard_id)
    assert [each[1:] for each in new] == [each[1:] for each in old]
    assert [each[1] for each in new] == ["A", "B"]
    assert not {each[0] for each in new} & {each[0] for each in old}
    assert len(await versions(mesh, editor, copy.dashboard_id)) == 1
    assert (await events(mesh, admin))[-3:] == ["DashboardCreated", "WidgetCreated", "WidgetCreated"]
    # It is the caller's own.
    await grant(mesh, editor, copy, Subject(user_id=admin.user_id), "viewer", Grant.DENY)


async def test_a_repeat_returns_the_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await mesh.widget(ann, dashboard)
    made = await asyncio.gather(
        *(duplicate(mesh, ann, dashboard.dashboard_id, request_id="once", title=" Copy ") for _ in range(4))
    )
    assert {each.dashboard_id for each in made} == {made[0].dashboard_id}
    assert made[0].title == "Copy"
    assert len(await listed(mesh, ann)) == 2


async def test_takes_the_right_to_query_each_source(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    source_id = new_id()
    dashboard = await mesh.dashboard(admin)
    await mesh.widget(admin, dashboard)
    await mesh.widget(admin, dashboard, Query(source_ids=[source_id]))
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    call = duplicate(mesh, editor, dashboard.dashboard_id)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    _, metadata = mesh.analytics.validated[-1]
    assert metadata["authorization"] == dict(editor.metadata)["authorization"]
    assert len(await listed(mesh, admin)) == 1


async def test_takes_the_right_to_see_each_cohort(mesh: Mesh) -> None:
    ann, cohort_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()], filters=[Filter(cohort_id=cohort_id)])
    await mesh.widget(ann, dashboard, query)
    mesh.analytics.hidden.add(cohort_id)
    mesh.analytics.refused = errors.not_found("COHORT_NOT_FOUND", "There is no such cohort.")
    call = duplicate(mesh, ann, dashboard.dashboard_id)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")


async def test_takes_the_right_to_query_what_library_widgets_ask(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    source_id = new_id()
    dashboard = await mesh.dashboard(admin)
    shared = await create(mesh, admin, query=Query(source_ids=[source_id]))
    await place(mesh, admin, dashboard, shared.library_widget_id)
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "No.")
    call = duplicate(mesh, editor, dashboard.dashboard_id)
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    assert len(await listed(mesh, admin)) == 1


async def test_takes_the_right_to_create_where_it_goes(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    viewer = mesh.identity.member("viewer", admin.workspace_id)
    dashboard, folder = await mesh.dashboard(admin), await mesh.folder(admin)
    missing = grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING"
    assert await refused(duplicate(mesh, viewer, dashboard.dashboard_id)) == missing
    await folder_grant(mesh, admin, folder, Subject(user_id=editor.user_id), "editor", Grant.DENY)
    call = duplicate(mesh, editor, dashboard.dashboard_id, folder_id=folder.folder_id)
    assert await refused(call) == missing
    assert (await duplicate(mesh, editor, dashboard.dashboard_id)).creator_id == editor.user_id
