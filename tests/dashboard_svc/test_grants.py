from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.events_pb2 import DashboardGrantDeleted
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamDeleted
from meshboard.user.v1.grant_pb2 import Grant, NewGrant, Subject
from sqlalchemy import delete, select, update

from services.chassis import auth, inbox, rights
from services.chassis.clients import Peer
from services.chassis.db import GrantRow, OutboxRow
from services.chassis.paging import Pages
from services.dashboard_svc.dashboards import grants_on_dashboards
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, reason_of, refused


async def grant(
    mesh: Mesh,
    by: Member,
    dashboard: Dashboard,
    subject: Subject,
    role: str = "viewer",
    effect: Grant.Effect.ValueType = Grant.ALLOW,
    **more: Any,
) -> Grant:
    """Makes a grant."""
    for subject_id in (subject.user_id, subject.team_id):
        mesh.users.known.add(subject_id)
    response = await mesh.dashboards.CreateDashboardGrant(
        pb.CreateDashboardGrantRequest(
            dashboard_id=dashboard.dashboard_id, subject=subject, role=role, effect=effect, **more
        ),
        metadata=by.metadata,
    )
    made: Grant = response.grant
    return made


async def get(mesh: Mesh, member: Member, dashboard: Dashboard) -> str:
    """What reading gives: "" or the reason why not."""
    try:
        await mesh.dashboards.GetDashboard(
            pb.GetDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=member.metadata
        )
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return ""


async def edit(mesh: Mesh, member: Member, dashboard: Dashboard) -> str:
    """What writing gives: "" or the reason why not."""
    try:
        await mesh.dashboards.UpdateDashboard(
            pb.UpdateDashboardRequest(dashboard=Dashboard(dashboard_id=dashboard.dashboard_id, title="T")),
            metadata=member.metadata,
        )
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return ""


async def test_grants_decide_who_sees_and_who_changes(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    team_id = new_id()
    guest = mesh.identity.member("viewer", admin.workspace_id, [team_id])
    dashboard = await mesh.dashboard(admin)
    assert (await get(mesh, guest, dashboard), await edit(mesh, guest, dashboard)) == (
        "",
        "PERMISSION_MISSING",
    )
    await grant(mesh, admin, dashboard, Subject(workspace=True), effect=Grant.DENY)
    assert (await get(mesh, guest, dashboard), await edit(mesh, guest, dashboard)) == (
        "DASHBOARD_NOT_FOUND",
        "DASHBOARD_NOT_FOUND",
    )
    await grant(mesh, admin, dashboard, Subject(team_id=team_id), "editor")
    assert (await get(mesh, guest, dashboard), await edit(mesh, guest, dashboard)) == ("", "")
    denied = await grant(mesh, admin, dashboard, Subject(user_id=guest.user_id), "editor", Grant.DENY)
    assert (await get(mesh, guest, dashboard), await edit(mesh, guest, dashboard)) == (
        "",
        "PERMISSION_MISSING",
    )
    request = pb.DeleteDashboardGrantRequest(dashboard_id=dashboard.dashboard_id, grant_id=denied.grant_id)
    await mesh.dashboards.DeleteDashboardGrant(request, metadata=admin.metadata)
    assert await edit(mesh, guest, dashboard) == ""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboards.DeleteDashboardGrant(request, metadata=admin.metadata)
    assert reason_of(failure.value) == "GRANT_NOT_FOUND"


async def test_grant_of_another_dashboard_is_absent(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard, other = await mesh.dashboard(admin), await mesh.dashboard(admin)
    made = await grant(mesh, admin, dashboard, Subject(workspace=True))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboards.DeleteDashboardGrant(
            pb.DeleteDashboardGrantRequest(dashboard_id=other.dashboard_id, grant_id=made.grant_id),
            metadata=admin.metadata,
        )
    assert reason_of(failure.value) == "GRANT_NOT_FOUND"


async def test_editor_may_not_grant_on_anothers_dashboard(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    editor = mesh.identity.member("editor", admin.workspace_id)
    dashboard, own = await mesh.dashboard(admin), await mesh.dashboard(editor)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await grant(mesh, editor, dashboard, Subject(workspace=True))
    assert reason_of(failure.value) == "PERMISSION_MISSING"
    await grant(mesh, editor, own, Subject(workspace=True))


async def test_expired_grant_counts_no_more_and_can_be_renewed(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard = await mesh.dashboard(admin)
    subject = Subject(user_id=guest.user_id)
    request = pb.CreateDashboardGrantRequest()
    request.expire_time.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    first = await grant(mesh, admin, dashboard, subject, "editor", expire_time=request.expire_time)
    assert first.expire_time == request.expire_time
    assert await edit(mesh, guest, dashboard) == ""
    async with mesh.db.begin() as session:
        past = datetime.now(UTC) - timedelta(seconds=1)
        await session.execute(
            update(GrantRow).where(GrantRow.grant_id == first.grant_id).values(expire_time=past)
        )
    assert await edit(mesh, guest, dashboard) == "PERMISSION_MISSING"
    second = await grant(mesh, admin, dashboard, subject, "editor")
    assert second.grant_id != first.grant_id
    assert await edit(mesh, guest, dashboard) == ""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await grant(mesh, admin, dashboard, subject, "editor")
    assert reason_of(failure.value) == "GRANT_EXISTS"


async def test_refuses_what_makes_no_sense(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    request = pb.CreateDashboardGrantRequest(
        dashboard_id=dashboard.dashboard_id, subject=Subject(user_id=new_id()), role="viewer"
    )

    async def refused() -> str:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await mesh.dashboards.CreateDashboardGrant(request, metadata=admin.metadata)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return reason_of(failure.value)

    assert await refused() == "SUBJECT_UNKNOWN"
    request.subject.team_id = new_id()
    assert await refused() == "SUBJECT_UNKNOWN"
    request.role = "emperor"
    assert await refused() == "ROLE_UNKNOWN"
    request.role = "viewer"
    request.expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    assert await refused() == "VALIDATION_FAILED"
    request.expire_time.seconds = 1 << 50
    assert await refused() == "VALIDATION_FAILED"
    request.ClearField("subject")
    assert await refused() == "VALIDATION_FAILED"


async def test_repeat_of_a_create_returns_the_first(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard, other = await mesh.dashboard(admin), await mesh.dashboard(admin)
    subject = Subject(user_id=new_id())
    made = await asyncio.gather(
        *(grant(mesh, admin, dashboard, subject, request_id="once") for _ in range(5))
    )
    assert len({each.grant_id for each in made}) == 1
    elsewhere = await grant(mesh, admin, other, subject, request_id="once")
    assert elsewhere.grant_id != made[0].grant_id


async def test_nobody_gives_what_they_lack(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    clerk = mesh.identity.member("viewer", admin.workspace_id)
    author = mesh.identity.member("editor", admin.workspace_id)
    dashboard, own = await mesh.dashboard(admin), await mesh.dashboard(author)
    roles = {
        "clerk": frozenset({"dashboards.view", "dashboards.grant"}),
        "ops": frozenset({"dashboards.delete", "members.edit"}),
    }
    for member in (admin, clerk, author):
        key = (member.user_id, member.workspace_id)
        mesh.identity.rights[key] = replace(mesh.identity.rights[key], roles=roles)
    await grant(mesh, admin, dashboard, Subject(user_id=clerk.user_id), "clerk")
    someone = Subject(user_id=new_id())
    await grant(mesh, clerk, dashboard, someone, "viewer")
    await grant(mesh, clerk, dashboard, someone, "clerk")
    # To withhold is not to give.
    await grant(mesh, clerk, dashboard, someone, "owner", Grant.DENY)
    for role in ("editor", "owner", "ops"):
        call = grant(mesh, clerk, dashboard, Subject(user_id=new_id()), role)
        assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_TOO_HIGH")
    # What a role has beside the resource does not matter on it; the grant `owner` of the creator gives everything.
    await grant(mesh, author, own, someone, "ops")
    await grant(mesh, author, own, someone, "owner")
    call = grant(mesh, author, own, Subject(user_id=new_id()), "deleted")
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")


async def test_custom_roles_decide(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard = await mesh.dashboard(admin)
    roles = {"author": frozenset({"dashboards.edit"})}
    for member in (admin, guest):
        key = (member.user_id, member.workspace_id)
        mesh.identity.rights[key] = replace(mesh.identity.rights[key], roles=roles)
    await grant(mesh, admin, dashboard, Subject(user_id=guest.user_id), "author")
    assert await edit(mesh, guest, dashboard) == ""
    await grant(mesh, admin, dashboard, Subject(workspace=True), "author", Grant.DENY)
    assert await edit(mesh, guest, dashboard) == ""
    # The role is deleted: what it gave is gone, what it withheld is everything.
    key = (guest.user_id, guest.workspace_id)
    mesh.identity.rights[key] = replace(mesh.identity.rights[key], roles={})
    assert await get(mesh, guest, dashboard) == "DASHBOARD_NOT_FOUND"
    page = await mesh.dashboards.ListDashboards(pb.ListDashboardsRequest(), metadata=guest.metadata)
    assert not page.dashboards


# Many together


async def grants_of(mesh: Mesh, by: Member, dashboard: Dashboard) -> list[Grant]:
    page = await mesh.dashboards.ListDashboardGrants(
        pb.ListDashboardGrantsRequest(dashboard_id=dashboard.dashboard_id), metadata=by.metadata
    )
    return list(page.grants)


async def test_grants_change_together(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin)
    old = await grant(mesh, admin, dashboard, Subject(workspace=True))
    someone = new_id()
    mesh.users.known.add(someone)
    request = pb.BatchUpdateDashboardGrantsRequest(
        dashboard_id=dashboard.dashboard_id,
        create=[
            NewGrant(subject=Subject(workspace=True), role="viewer", effect=Grant.DENY),
            NewGrant(subject=Subject(user_id=someone), role="editor"),
        ],
        delete_grant_ids=[old.grant_id],
    )
    made = (await mesh.dashboards.BatchUpdateDashboardGrants(request, metadata=admin.metadata)).grants
    assert [(each.role, each.effect) for each in made] == [("viewer", Grant.DENY), ("editor", Grant.ALLOW)]
    assert (await grants_of(mesh, admin, dashboard))[1:] == list(made)
    async with mesh.db() as session:
        rows = await session.scalars(
            select(OutboxRow)
            .where(OutboxRow.headers["Workspace-Id"].astext == admin.workspace_id)
            .order_by(OutboxRow.id)
        )
        names = [row.subject.rpartition(".")[2] for row in rows]
    assert names[-3:] == ["DashboardGrantDeleted", "DashboardGrantCreated", "DashboardGrantCreated"]


async def test_of_many_changes_all_happen_or_none(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard, other = await mesh.dashboard(admin), await mesh.dashboard(admin)
    old = await grant(mesh, admin, dashboard, Subject(workspace=True))
    elsewhere = await grant(mesh, admin, other, Subject(workspace=True))
    before = await grants_of(mesh, admin, dashboard)
    fine = NewGrant(subject=Subject(workspace=True), role="editor")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    past = NewGrant(subject=Subject(workspace=True), role="admin")
    past.expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    for create, delete_grant_ids, expected in (
        ([fine], [new_id()], (grpc.StatusCode.NOT_FOUND, "GRANT_NOT_FOUND")),
        ([fine], [elsewhere.grant_id], (grpc.StatusCode.NOT_FOUND, "GRANT_NOT_FOUND")),
        ([fine, fine], [old.grant_id], (grpc.StatusCode.ALREADY_EXISTS, "GRANT_EXISTS")),
        ([fine, NewGrant(subject=Subject(workspace=True), role="x")], [], (invalid, "ROLE_UNKNOWN")),
        (
            [fine, NewGrant(subject=Subject(team_id=new_id()), role="viewer")],
            [old.grant_id],
            (invalid, "SUBJECT_UNKNOWN"),
        ),
        ([fine, past], [old.grant_id], (invalid, "VALIDATION_FAILED")),
        ([], [], (invalid, "VALIDATION_FAILED")),
        ([fine] * 60, [new_id() for _ in range(41)], (invalid, "VALIDATION_FAILED")),
        ([fine], [old.grant_id] * 2, (invalid, "VALIDATION_FAILED")),
        ([NewGrant(role="viewer")], [], (invalid, "VALIDATION_FAILED")),
    ):
        request = pb.BatchUpdateDashboardGrantsRequest(
            dashboard_id=dashboard.dashboard_id, create=create, delete_grant_ids=delete_grant_ids
        )
        call = mesh.dashboards.BatchUpdateDashboardGrants(request, metadata=admin.metadata)
        assert await refused(call) == expected
    assert await grants_of(mesh, admin, dashboard) == before


async def test_lists_page_by_page_the_oldest_first(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard, other = await mesh.dashboard(admin), await mesh.dashboard(admin)
    await grant(mesh, admin, other, Subject(workspace=True))
    made = [await grant(mesh, admin, dashboard, Subject(team_id=new_id())) for _ in range(4)]
    request = pb.ListDashboardGrantsRequest(dashboard_id=dashboard.dashboard_id, page_size=2)
    listed: list[Grant] = []
    while True:
        page = await mesh.dashboards.ListDashboardGrants(request, metadata=admin.metadata)
        listed += page.grants
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed[0].role == "owner"
    assert listed[0].subject == Subject(user_id=admin.user_id)
    assert listed[1:] == made


async def test_a_deleted_team_leaves_no_grants(mesh: Mesh) -> None:
    admin, team_id, other_id = mesh.identity.member("admin"), new_id(), new_id()
    guest = mesh.identity.member("viewer", admin.workspace_id, [team_id])
    dashboard = await mesh.dashboard(admin)
    for subject in (Subject(team_id=team_id), Subject(team_id=other_id), Subject(user_id=guest.user_id)):
        await grant(mesh, admin, dashboard, subject, "viewer")
    user = Peer("user", "127.0.0.1:1", auth.ServiceTokens("dashboard", mesh.identity.keys))
    grants = grants_on_dashboards(mesh.db, user, Pages(bytes(32)))
    async with mesh.db.begin() as session:
        await grants.on_team_deleted(session, TeamDeleted(workspace_id=new_id(), team_id=team_id))
        await grants.on_team_deleted(session, TeamDeleted(workspace_id=admin.workspace_id, team_id=team_id))
    await user.close()
    async with mesh.db() as session:
        left = await session.scalars(select(GrantRow).where(GrantRow.workspace_id == admin.workspace_id))
        assert {row.subject_id for row in left} == {admin.user_id, other_id, guest.user_id}
        told = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == DashboardGrantDeleted.DESCRIPTOR.full_name)
        )
        events = [DashboardGrantDeleted.FromString(row) for row in told]
    assert [e.dashboard_id for e in events].count(dashboard.dashboard_id) == 1


async def test_a_removed_member_leaves_no_grants(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard = await mesh.dashboard(admin)
    await grant(mesh, admin, dashboard, Subject(user_id=guest.user_id), "editor")
    user = Peer("user", "127.0.0.1:1", auth.ServiceTokens("dashboard", mesh.identity.keys))
    grants = grants_on_dashboards(mesh.db, user, Pages(bytes(32)))
    inbox.current.set(inbox.Event(new_id(), admin.workspace_id, {}, 1, datetime.now(UTC)))
    async with mesh.db.begin() as session:
        await grants.on_member_removed(
            session, MemberRemoved(workspace_id=admin.workspace_id, user_id=guest.user_id)
        )
    assert await edit(mesh, guest, dashboard) == "PERMISSION_MISSING"
    await user.close()
    async with mesh.db() as session:
        left = await session.scalars(select(GrantRow).where(GrantRow.workspace_id == admin.workspace_id))
        assert [row.subject_id for row in left] == [admin.user_id]


SUBJECTS = ["user", "team", "workspace", "another user", "another team"]
A_GRANT = st.tuples(
    st.sampled_from(SUBJECTS),
    st.sampled_from(sorted(rights.ROLES)),
    st.sampled_from(["ALLOW", "DENY"]),
    st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    drawn=st.lists(st.lists(A_GRANT, max_size=4), min_size=1, max_size=6),
    role=st.sampled_from(sorted(rights.ROLES)),
)
async def test_lists_exactly_what_can_be_read(
    mesh: Mesh, drawn: list[list[tuple[str, str, str, bool]]], role: str
) -> None:
    admin = mesh.identity.member("admin")
    team_id = new_id()
    guest = mesh.identity.member(role, admin.workspace_id, [team_id])
    subjects = dict(
        zip(
            SUBJECTS,
            [
                ("user", guest.user_id),
                ("team", team_id),
                ("workspace", None),
                ("user", new_id()),
                ("team", new_id()),
            ],
            strict=True,
        )
    )
    past = datetime.now(UTC) - timedelta(seconds=1)
    dashboards = [await mesh.dashboard(admin) for _ in drawn]
    async with mesh.db.begin() as session:
        await session.execute(delete(GrantRow).where(GrantRow.workspace_id == admin.workspace_id))
        for dashboard, grants in zip(dashboards, drawn, strict=True):
            for (subject, role_name), (effect, expired) in {(s, r): (e, x) for s, r, e, x in grants}.items():
                subject_type, subject_id = subjects[subject]
                session.add(
                    GrantRow(
                        workspace_id=admin.workspace_id,
                        grant_id=new_id(),
                        resource_type="dashboard",
                        resource_id=dashboard.dashboard_id,
                        subject_type=subject_type,
                        subject_id=subject_id,
                        role=role_name,
                        effect=effect,
                        expire_time=past if expired else None,
                        creator_id=admin.user_id,
                    )
                )
    readable = [d.dashboard_id for d in dashboards if await get(mesh, guest, d) == ""]
    listed: list[str] = []
    request = pb.ListDashboardsRequest(page_size=2)
    while True:
        page = await mesh.dashboards.ListDashboards(request, metadata=guest.metadata)
        listed += [dashboard.dashboard_id for dashboard in page.dashboards]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert listed == readable[::-1]
