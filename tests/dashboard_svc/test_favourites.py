from __future__ import annotations

import asyncio

from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.user.v1.events_pb2 import MemberRemoved
from meshboard.user.v1.grant_pb2 import Grant, Subject
from sqlalchemy import func, select

from services.chassis import inbox
from services.chassis.times import now
from services.dashboard_svc.favourites import erase_favourites, on_member_removed
from services.dashboard_svc.models import Favourite
from tests.dashboard_svc.boards import events, get, listed, update
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_grants import grant
from tests.harness import Member, new_id


async def favourite(mesh: Mesh, member: Member, dashboard_id: str) -> None:
    request = pb.FavouriteDashboardRequest(dashboard_id=dashboard_id)
    await mesh.dashboards.FavouriteDashboard(request, metadata=member.metadata)


async def unfavourite(mesh: Mesh, member: Member, dashboard_id: str) -> None:
    request = pb.UnfavouriteDashboardRequest(dashboard_id=dashboard_id)
    await mesh.dashboards.UnfavouriteDashboard(request, metadata=member.metadata)


async def test_marks_for_the_caller_alone(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    viewer = mesh.identity.member("viewer", admin.workspace_id)
    made = [(await mesh.dashboard(admin, f"{number}")).dashboard_id for number in range(5)]
    for dashboard_id in (made[0], made[2], made[3]):
        await favourite(mesh, viewer, dashboard_id)
    assert [each.favourite for each in await listed(mesh, viewer)] == [False, True, True, False, True]
    assert [each.title for each in await listed(mesh, viewer, favourites=True)] == ["3", "2", "0"]
    assert (await get(mesh, viewer, made[0])).favourite
    assert not (await get(mesh, admin, made[0])).favourite
    assert await listed(mesh, admin, favourites=True) == []
    await unfavourite(mesh, viewer, made[2])
    assert [each.title for each in await listed(mesh, viewer, favourites=True)] == ["3", "0"]
    # Marks give no right.
    hidden = next(each for each in await listed(mesh, admin) if each.dashboard_id == made[3])
    await grant(mesh, admin, hidden, Subject(user_id=viewer.user_id), "viewer", Grant.DENY)
    assert [each.title for each in await listed(mesh, viewer, favourites=True)] == ["0"]


async def test_answers_of_changes_show_the_mark(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    assert not dashboard.favourite
    await favourite(mesh, ann, dashboard.dashboard_id)
    assert (await update(mesh, ann, dashboard.dashboard_id, title="x")).favourite


async def test_is_told_once(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await unfavourite(mesh, ann, dashboard.dashboard_id)
    await asyncio.gather(*(favourite(mesh, ann, dashboard.dashboard_id) for _ in range(4)))
    await asyncio.gather(*(unfavourite(mesh, ann, dashboard.dashboard_id) for _ in range(4)))
    assert await events(mesh, ann) == ["DashboardCreated", "DashboardFavourited", "DashboardUnfavourited"]


async def test_goes_with_the_person(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    bob = mesh.identity.member("editor", ann.workspace_id)
    dashboard = await mesh.dashboard(ann)
    for member in (ann, bob):
        await favourite(mesh, member, dashboard.dashboard_id)
    async with mesh.db.begin() as session:
        inbox.current.set(inbox.Event(new_id(), ann.workspace_id, {}, 1, now()))
        await on_member_removed(session, MemberRemoved(workspace_id=ann.workspace_id, user_id=ann.user_id))
    assert not (await get(mesh, ann, dashboard.dashboard_id)).favourite
    assert (await get(mesh, bob, dashboard.dashboard_id)).favourite
    async with mesh.db.begin() as session:
        assert (await erase_favourites(session, bob.user_id)).erased == {"favourites": 1}
        left = select(func.count()).where(Favourite.dashboard_id == dashboard.dashboard_id)
        assert await session.scalar(left) == 0
