"""Folders: their tree, what lies in them, and the grants that hold for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.dashboard.v1 import dashboard_service_pb2 as dashboards_pb
from meshboard.dashboard.v1 import folder_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.events_pb2 import FolderMoved
from meshboard.dashboard.v1.folder_pb2 import Folder
from meshboard.user.v1.grant_pb2 import Grant, NewGrant, Subject
from sqlalchemy import func, select

from services.chassis.db import GrantRow, OutboxRow
from services.dashboard_svc import models
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_grants import edit, get, grant
from tests.harness import Member, new_id, reason_of, refused

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "FOLDER_NOT_FOUND")
MISSING = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
UNFIT = grpc.StatusCode.FAILED_PRECONDITION


async def folder_grant(
    mesh: Mesh,
    by: Member,
    folder: Folder,
    subject: Subject,
    role: str = "viewer",
    effect: Grant.Effect.ValueType = Grant.ALLOW,
) -> Grant:
    """Makes a grant on a folder."""
    mesh.users.known |= {subject.user_id, subject.team_id}
    response = await mesh.folders.CreateFolderGrant(
        pb.CreateFolderGrantRequest(folder_id=folder.folder_id, subject=subject, role=role, effect=effect),
        metadata=by.metadata,
    )
    made: Grant = response.grant
    return made


def read(mesh: Mesh, member: Member, folder: Folder) -> Awaitable[Any]:
    request = pb.GetFolderRequest(folder_id=folder.folder_id)
    call: Awaitable[Any] = mesh.folders.GetFolder(request, metadata=member.metadata)
    return call


def move(mesh: Mesh, member: Member, folder: Folder, to: Folder | None, etag: str = "") -> Awaitable[Any]:
    request = pb.MoveFolderRequest(
        folder_id=folder.folder_id, parent_folder_id=to.folder_id if to else "", etag=etag
    )
    call: Awaitable[Any] = mesh.folders.MoveFolder(request, metadata=member.metadata)
    return call


def delete_folder(mesh: Mesh, member: Member, folder: Folder) -> Awaitable[Any]:
    request = pb.DeleteFolderRequest(folder_id=folder.folder_id)
    call: Awaitable[Any] = mesh.folders.DeleteFolder(request, metadata=member.metadata)
    return call


def move_dashboard(mesh: Mesh, member: Member, dashboard: Dashboard, to: Folder | None) -> Awaitable[Any]:
    request = dashboards_pb.MoveDashboardRequest(
        dashboard_id=dashboard.dashboard_id, folder_id=to.folder_id if to else ""
    )
    call: Awaitable[Any] = mesh.dashboards.MoveDashboard(request, metadata=member.metadata)
    return call


async def listed(mesh: Mesh, member: Member, **more: str) -> list[str]:
    """The titles of the folders that a member sees, page by page."""
    titles: list[str] = []
    request = pb.ListFoldersRequest(page_size=2, **more)
    while True:
        page = await mesh.folders.ListFolders(request, metadata=member.metadata)
        titles += [folder.title for folder in page.folders]
        if not page.next_page_token:
            return titles
        request.page_token = page.next_page_token


async def test_a_folder_is_created_read_changed_and_deleted(mesh: Mesh) -> None:
    editor = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", editor.workspace_id)
    folder = await mesh.folder(editor, "Finance")
    assert (folder.title, folder.parent_folder_id, folder.creator_id) == ("Finance", "", editor.user_id)
    assert (await read(mesh, viewer, folder)).folder == folder
    update = pb.UpdateFolderRequest(
        folder=Folder(folder_id=folder.folder_id, title="Money", etag=folder.etag, parent_folder_id=new_id())
    )
    assert await refused(mesh.folders.UpdateFolder(update, metadata=viewer.metadata)) == MISSING
    update.update_mask.CopyFrom(FieldMask(paths=["title", "parent_folder_id"]))
    assert await refused(mesh.folders.UpdateFolder(update, metadata=editor.metadata)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "UPDATE_MASK_INVALID",
    )
    update.update_mask.CopyFrom(FieldMask(paths=["title"]))
    changed = (await mesh.folders.UpdateFolder(update, metadata=editor.metadata)).folder
    assert (changed.title, changed.parent_folder_id) == ("Money", "")
    assert await refused(mesh.folders.UpdateFolder(update, metadata=editor.metadata)) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    assert await refused(delete_folder(mesh, viewer, folder)) == MISSING
    await delete_folder(mesh, editor, folder)
    assert await refused(read(mesh, editor, folder)) == NOT_FOUND
    async with mesh.db() as session:
        left = select(func.count()).where(GrantRow.resource_id == folder.folder_id)
        assert await session.scalar(left) == 0


async def test_a_repeat_returns_the_first_folder(mesh: Mesh) -> None:
    editor = mesh.identity.member("editor")
    request = pb.CreateFolderRequest(title="Once", request_id="once")
    made = await asyncio.gather(
        *(mesh.folders.CreateFolder(request, metadata=editor.metadata) for _ in range(5))
    )
    assert len({each.folder.folder_id for each in made}) == 1


async def test_what_is_elsewhere_or_unseen_is_absent(mesh: Mesh) -> None:
    editor = mesh.identity.member("editor")
    guest = mesh.identity.member("owner", editor.workspace_id)
    folder, stranger = await mesh.folder(editor), mesh.identity.member("owner")
    dashboard = await mesh.dashboard(editor)
    mine, foreign = await mesh.folder(stranger), await mesh.dashboard(stranger)
    await folder_grant(mesh, editor, folder, Subject(user_id=guest.user_id), effect=Grant.DENY)
    absent = Folder(folder_id=new_id())
    for member, hidden, its in ((stranger, folder, mine), (guest, folder, None), (editor, absent, None)):
        assert await refused(read(mesh, member, hidden)) == NOT_FOUND
        assert await refused(delete_folder(mesh, member, hidden)) == NOT_FOUND
        assert await refused(mesh.folder(member, "Below", hidden)) == NOT_FOUND
        assert await refused(mesh.dashboard(member, "In", hidden)) == NOT_FOUND
        if its is not None:
            assert await refused(move(mesh, member, its, hidden)) == NOT_FOUND
            assert await refused(move_dashboard(mesh, member, foreign, hidden)) == NOT_FOUND
    assert await refused(move_dashboard(mesh, guest, dashboard, folder)) == NOT_FOUND
    assert await listed(mesh, guest) == []
    assert await listed(mesh, stranger) == ["Teams"]


async def test_grants_on_folders_hold_for_what_lies_in_them(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    team_id = new_id()
    guest = mesh.identity.member("viewer", admin.workspace_id, [team_id])
    outer = await mesh.folder(admin, "Outer")
    inner = await mesh.folder(admin, "Inner", outer)
    dashboard = await mesh.dashboard(admin, folder=inner)
    beside = await mesh.dashboard(admin)
    await folder_grant(mesh, admin, outer, Subject(workspace=True), effect=Grant.DENY)
    assert await get(mesh, guest, dashboard) == "DASHBOARD_NOT_FOUND"
    assert await get(mesh, guest, beside) == ""
    assert await listed(mesh, guest) == []
    # A grant on the nearer folder outweighs one on the farther, whoever it is to.
    opened = await folder_grant(mesh, admin, inner, Subject(workspace=True), "editor")
    assert (await get(mesh, guest, dashboard), await edit(mesh, guest, dashboard)) == ("", "")
    assert await listed(mesh, guest) == ["Inner"]
    await folder_grant(mesh, admin, outer, Subject(user_id=guest.user_id), "owner", Grant.DENY)
    assert await edit(mesh, guest, dashboard) == ""
    # One on the dashboard itself outweighs both.
    await grant(mesh, admin, dashboard, Subject(team_id=team_id), "editor", Grant.DENY)
    assert await edit(mesh, guest, dashboard) == "PERMISSION_MISSING"
    await mesh.folders.DeleteFolderGrant(
        pb.DeleteFolderGrantRequest(folder_id=inner.folder_id, grant_id=opened.grant_id),
        metadata=admin.metadata,
    )
    assert await get(mesh, guest, dashboard) == "DASHBOARD_NOT_FOUND"
    assert await get(mesh, admin, dashboard) == ""


async def test_lists_by_folder(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    outer = await mesh.folder(admin, "Outer")
    inner = await mesh.folder(admin, "Inner", outer)
    await mesh.dashboard(admin, "A", outer)
    hidden = await mesh.dashboard(admin, "B", outer)
    await mesh.dashboard(admin, "C", inner)
    await mesh.dashboard(admin, "D")
    await grant(mesh, admin, hidden, Subject(workspace=True), effect=Grant.DENY)

    async def titles(folder_id: str) -> list[str]:
        request = dashboards_pb.ListDashboardsRequest(folder_id=folder_id)
        page = await mesh.dashboards.ListDashboards(request, metadata=guest.metadata)
        return [dashboard.title for dashboard in page.dashboards]

    assert await titles("") == ["D", "C", "A"]
    assert await titles(outer.folder_id) == ["A"]
    assert await titles(inner.folder_id.upper()) == ["C"]
    assert await titles(new_id()) == []
    assert await listed(mesh, guest) == ["Inner", "Outer"]
    assert await listed(mesh, guest, parent_folder_id=outer.folder_id) == ["Inner"]


async def test_putting_something_into_a_folder_takes_the_right_to_create_there(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    viewer = mesh.identity.member("viewer", admin.workspace_id)
    editor = mesh.identity.member("editor", admin.workspace_id)
    folder = await mesh.folder(admin)
    assert await refused(mesh.dashboard(viewer, folder=folder)) == MISSING
    assert await refused(mesh.folder(viewer, parent=folder)) == MISSING
    assert await refused(mesh.dashboard(viewer)) == MISSING
    await folder_grant(mesh, admin, folder, Subject(user_id=viewer.user_id), "editor")
    await folder_grant(mesh, admin, folder, Subject(user_id=editor.user_id), "editor", Grant.DENY)
    inside = await mesh.dashboard(viewer, folder=folder)
    assert inside.folder_id == folder.folder_id
    await mesh.folder(viewer, parent=folder)
    assert await refused(mesh.dashboard(viewer)) == MISSING
    assert await refused(mesh.dashboard(editor, folder=folder)) == MISSING
    own = await mesh.dashboard(editor)
    assert await refused(move_dashboard(mesh, editor, own, folder)) == MISSING
    # Out of the folder, into the workspace itself, where a viewer creates nothing.
    assert await refused(move_dashboard(mesh, viewer, inside, None)) == MISSING


async def test_moving_takes_the_right_to_grant(mesh: Mesh) -> None:
    """Who could move anything into a folder of their own would be an owner of it."""
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    theirs, folder = await mesh.dashboard(admin), await mesh.folder(editor)
    closed = await mesh.folder(admin)
    assert await refused(move_dashboard(mesh, editor, theirs, folder)) == MISSING
    assert await refused(move(mesh, editor, closed, folder)) == MISSING
    own = await mesh.dashboard(editor)
    moved = (await move_dashboard(mesh, editor, own, folder)).dashboard
    assert (moved.folder_id, moved.etag) == (folder.folder_id, "2")
    request = dashboards_pb.GetDashboardRequest(dashboard_id=own.dashboard_id)
    assert (await mesh.dashboards.GetDashboard(request, metadata=editor.metadata)).dashboard == moved
    assert (await move_dashboard(mesh, admin, own, None)).dashboard.folder_id == ""


async def test_a_folder_moves_with_all_that_lies_in_it(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    secret, folder = await mesh.folder(admin, "Secret"), await mesh.folder(admin)
    dashboard = await mesh.dashboard(admin, folder=folder)
    await folder_grant(mesh, admin, secret, Subject(workspace=True), effect=Grant.DENY)
    assert await get(mesh, guest, dashboard) == ""
    assert await refused(move(mesh, admin, folder, secret, etag="7")) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    moved = (await move(mesh, admin, folder, secret, folder.etag)).folder
    assert moved.parent_folder_id == secret.folder_id
    assert await get(mesh, guest, dashboard) == "DASHBOARD_NOT_FOUND"
    back = (await move(mesh, admin, folder, None)).folder
    assert back.parent_folder_id == ""
    assert await get(mesh, guest, dashboard) == ""
    async with mesh.db() as session:
        rows = await session.scalars(
            select(OutboxRow)
            .where(OutboxRow.subject == FolderMoved.DESCRIPTOR.full_name)
            .where(OutboxRow.headers["Workspace-Id"].astext == admin.workspace_id)
            .order_by(OutboxRow.id)
        )
        events = [FolderMoved.FromString(row.payload) for row in rows]
    assert events == [
        FolderMoved(folder=moved),
        FolderMoved(folder=back, from_parent_folder_id=secret.folder_id),
    ]


async def test_folders_lie_neither_in_themselves_nor_too_deep(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    chain = [await mesh.folder(admin)]
    while len(chain) < 8:
        chain.append(await mesh.folder(admin, parent=chain[-1]))
    assert await refused(mesh.folder(admin, parent=chain[-1])) == (UNFIT, "FOLDER_TOO_DEEP")
    for below in (chain[0], chain[1], chain[-1]):
        assert await refused(move(mesh, admin, chain[0], below)) == (UNFIT, "FOLDER_CYCLE")
    other = await mesh.folder(admin)
    lower = await mesh.folder(admin, parent=other)
    assert await refused(move(mesh, admin, other, chain[6])) == (UNFIT, "FOLDER_TOO_DEEP")
    await move(mesh, admin, other, chain[5])
    assert (await read(mesh, admin, lower)).folder.parent_folder_id == other.folder_id
    assert await refused(mesh.folder(admin, parent=lower)) == (UNFIT, "FOLDER_TOO_DEEP")


async def test_a_workspace_has_so_many_folders(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = mesh.identity.member("admin")
    monkeypatch.setattr("services.dashboard_svc.folders.MAX_FOLDERS", 2)
    for _ in range(2):
        await mesh.folder(admin)
    assert await refused(mesh.folder(admin)) == (UNFIT, "TOO_MANY_FOLDERS")


async def test_only_an_empty_folder_is_deleted(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    inner, dashboard = await mesh.folder(admin, parent=folder), await mesh.dashboard(admin, folder=folder)
    assert await refused(delete_folder(mesh, admin, folder)) == (UNFIT, "FOLDER_NOT_EMPTY")
    await delete_folder(mesh, admin, inner)
    assert await refused(delete_folder(mesh, admin, folder)) == (UNFIT, "FOLDER_NOT_EMPTY")
    await move_dashboard(mesh, admin, dashboard, None)
    await delete_folder(mesh, admin, folder)


async def test_grants_on_folders_change_together(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    folder = await mesh.folder(admin)
    old = await folder_grant(mesh, admin, folder, Subject(workspace=True))
    request = pb.BatchUpdateFolderGrantsRequest(
        folder_id=folder.folder_id,
        create=[NewGrant(subject=Subject(workspace=True), role="viewer", effect=Grant.DENY)],
        delete_grant_ids=[old.grant_id],
    )
    response = await mesh.folders.BatchUpdateFolderGrants(request, metadata=admin.metadata)
    (new,) = response.grants
    page = await mesh.folders.ListFolderGrants(
        pb.ListFolderGrantsRequest(folder_id=folder.folder_id), metadata=admin.metadata
    )
    assert [each.role for each in page.grants] == ["owner", "viewer"]
    assert page.grants[1] == new


# What happens at the same time


async def outcome(call: Awaitable[Any]) -> str:
    """ "" or the reason of the refusal."""
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return ""


ROUNDS = [
    pytest.param(20, id="20"),
    pytest.param(1000, id="1000", marks=[pytest.mark.long, pytest.mark.timeout(1200)]),
]


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_two_moves_at_once_make_no_cycle(mesh: Mesh, rounds: int) -> None:
    admin = mesh.identity.member("admin")
    one, other = await mesh.folder(admin), await mesh.folder(admin)
    for _ in range(rounds):
        reasons = await asyncio.gather(
            outcome(move(mesh, admin, one, other)), outcome(move(mesh, admin, other, one))
        )
        assert sorted(reasons) == ["", "FOLDER_CYCLE"]
        await asyncio.gather(outcome(move(mesh, admin, one, None)), outcome(move(mesh, admin, other, None)))


Put = Callable[[Mesh, Member, Folder], Awaitable[Any]]


async def put_grant(mesh: Mesh, admin: Member, folder: Folder) -> None:
    await folder_grant(mesh, admin, folder, Subject(workspace=True))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize(
    "put",
    [
        lambda mesh, admin, folder: mesh.dashboard(admin, folder=folder),
        lambda mesh, admin, folder: mesh.folder(admin, parent=folder),
        put_grant,
    ],
    ids=["dashboard", "folder", "grant"],
)
async def test_nothing_is_left_in_or_on_a_deleted_folder(mesh: Mesh, put: Put, rounds: int) -> None:
    admin = mesh.identity.member("admin")
    for _ in range(rounds):
        folder = await mesh.folder(admin)
        made, gone = await asyncio.gather(
            outcome(put(mesh, admin, folder)), outcome(delete_folder(mesh, admin, folder))
        )
        assert made in {"", "FOLDER_NOT_FOUND"}
        assert gone in {"", "FOLDER_NOT_EMPTY"}
        async with mesh.db() as session:
            exists = await session.get(models.Folder, (admin.workspace_id, folder.folder_id)) is not None
            grants = await session.scalar(
                select(func.count()).where(GrantRow.resource_id == folder.folder_id)
            )
        assert exists is bool(gone)
        assert bool(grants) is exists


@pytest.mark.parametrize("rounds", ROUNDS)
async def test_no_grant_is_left_on_a_purged_dashboard(mesh: Mesh, rounds: int) -> None:
    admin = mesh.identity.member("admin")
    for _ in range(rounds):
        dashboard = await mesh.dashboard(admin)
        request = dashboards_pb.DeleteDashboardRequest(dashboard_id=dashboard.dashboard_id)
        made, gone = await asyncio.gather(
            outcome(grant(mesh, admin, dashboard, Subject(workspace=True))),
            outcome(mesh.dashboards.DeleteDashboard(request, metadata=admin.metadata)),
        )
        assert (made in {"", "DASHBOARD_NOT_FOUND"}, gone) == (True, "")
        purge = dashboards_pb.PurgeDashboardRequest(dashboard_id=dashboard.dashboard_id)
        made, gone = await asyncio.gather(
            outcome(grant(mesh, admin, dashboard, Subject(user_id=admin.user_id))),
            outcome(mesh.dashboards.PurgeDashboard(purge, metadata=admin.metadata)),
        )
        assert (made, gone) == ("DASHBOARD_NOT_FOUND", "")
        async with mesh.db() as session:
            left = select(func.count()).where(GrantRow.resource_id == dashboard.dashboard_id)
            assert await session.scalar(left) == 0


@pytest.mark.parametrize("title", [" ", "a\u202eb", "a\x07b", "\u0420aypal"])
async def test_titles_deceive_nobody(mesh: Mesh, title: str) -> None:
    editor = mesh.identity.member("editor")
    folder, dashboard = await mesh.folder(editor), await mesh.dashboard(editor)
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert await refused(mesh.folder(editor, title)) == invalid
    assert await refused(mesh.dashboard(editor, title)) == invalid
    update = pb.UpdateFolderRequest(folder=Folder(folder_id=folder.folder_id, title=title))
    assert await refused(mesh.folders.UpdateFolder(update, metadata=editor.metadata)) == invalid
    change = dashboards_pb.UpdateDashboardRequest(
        dashboard=Dashboard(dashboard_id=dashboard.dashboard_id, title=title)
    )
    assert await refused(mesh.dashboards.UpdateDashboard(change, metadata=editor.metadata)) == invalid


async def test_times_are_set(mesh: Mesh) -> None:
    editor = mesh.identity.member("editor")
    start = datetime.now(UTC)
    folder = await mesh.folder(editor)
    assert folder.create_time == folder.update_time
    assert folder.create_time.ToDatetime(UTC) >= start


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_pages_hold_what_stays_visible_once_while_the_rest_changes(
    mesh: Mesh, data: st.DataObject
) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    open_, closed = await mesh.folder(admin), await mesh.folder(admin)
    await folder_grant(mesh, admin, closed, Subject(workspace=True), effect=Grant.DENY)
    made = [
        await mesh.dashboard(admin, folder=data.draw(st.sampled_from([open_, closed, None])))
        for _ in range(12)
    ]
    for dashboard in made:
        if dashboard.folder_id == closed.folder_id and data.draw(st.booleans()):
            await grant(mesh, admin, dashboard, Subject(workspace=True))

    async def visible() -> set[str]:
        return {each.dashboard_id for each in made if await get(mesh, guest, each) == ""}

    always, seen = await visible(), []
    request = dashboards_pb.ListDashboardsRequest(page_size=3)
    while True:
        page = await mesh.dashboards.ListDashboards(request, metadata=guest.metadata)
        seen += [each.dashboard_id for each in page.dashboards]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        changed = data.draw(st.sampled_from(made))
        match data.draw(st.sampled_from(["create", "move", "deny"])):
            case "create":
                await mesh.dashboard(admin)
            case "move":
                await move_dashboard(mesh, admin, changed, data.draw(st.sampled_from([open_, closed, None])))
            case "deny":
                await outcome(grant(mesh, admin, changed, Subject(workspace=True), "viewer", Grant.DENY))
        always &= await visible()
    assert seen == sorted(set(seen), reverse=True)
    assert always <= set(seen)
