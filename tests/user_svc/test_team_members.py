from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from grpc import StatusCode
from meshboard.user.v1.events_pb2 import TeamMemberAdded, TeamMemberRemoved, TeamMemberUpdated
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.team_service_pb2 import (
    AddTeamMemberRequest,
    ListTeamMembersRequest,
    ListUserTeamsRequest,
    ListUserTeamsResponse,
    RemoveTeamMemberRequest,
)
from meshboard.user.v1.workspace_pb2 import Team, TeamMember
from sqlalchemy import select, update

from services.chassis.db import OutboxRow
from services.chassis.times import timestamp_of
from services.user_svc import models
from services.user_svc.expirations import end_team_memberships
from tests.conditions import eventually
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc, statements_of
from tests.user_svc.test_create_team import create
from tests.user_svc.test_get_rights import rights_of

MISSING = (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
MAINTAINER = TeamMember.MAINTAINER


async def add(svc: UserSvc, caller: Person, team: Team, person: Person, **more: Any) -> TeamMember:
    request = AddTeamMemberRequest(
        workspace_id=caller.workspace_id, team_id=team.team_id, user_id=person.user_id, **more
    )
    return (await svc.teams.AddTeamMember(request, metadata=caller.metadata)).team_member


async def remove(svc: UserSvc, caller: Person, team: Team, person: Person) -> None:
    request = RemoveTeamMemberRequest(
        workspace_id=caller.workspace_id, team_id=team.team_id, user_id=person.user_id
    )
    await svc.teams.RemoveTeamMember(request, metadata=caller.metadata)


async def members(svc: UserSvc, caller: Person, team: Team, **more: Any) -> list[TeamMember]:
    found: list[TeamMember] = []
    token = ""
    while True:
        request = ListTeamMembersRequest(
            workspace_id=caller.workspace_id, team_id=team.team_id, page_size=2, page_token=token, **more
        )
        page = await svc.teams.ListTeamMembers(request, metadata=caller.metadata)
        found += page.team_members
        token = page.next_page_token
        if not token:
            return found


async def teams_of(svc: UserSvc, caller: Person, person: Person) -> list[ListUserTeamsResponse.UserTeam]:
    found: list[ListUserTeamsResponse.UserTeam] = []
    token = ""
    while True:
        request = ListUserTeamsRequest(
            workspace_id=caller.workspace_id, user_id=person.user_id, page_size=2, page_token=token
        )
        page = await svc.teams.ListUserTeams(request, metadata=caller.metadata)
        found += page.teams
        token = page.next_page_token
        if not token:
            return found


async def told(svc: UserSvc, kind: Any, person: Person) -> list[Any]:
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload)
            .where(OutboxRow.subject == kind.DESCRIPTOR.full_name)
            .order_by(OutboxRow.id)
        )
        events = [kind.FromString(row) for row in rows]
    return [event for event in events if event.user_id == person.user_id]


def ahead(seconds: float = 3600) -> Any:
    return timestamp_of(datetime.now(UTC) + timedelta(seconds=seconds))


async def test_a_repeat_changes_role_and_expiry(svc: UserSvc, owner: Person):
    viewer, team = await svc.join(owner, "viewer"), await create(svc, owner, "T")
    first = await add(svc, owner, team, viewer)
    assert (first.user.user_id, first.direct, first.role) == (viewer.user_id, True, TeamMember.MEMBER)
    assert await add(svc, owner, team, viewer) == first
    until = ahead()
    second = await add(svc, owner, team, viewer, role=MAINTAINER, expire_time=until)
    assert (second.role, second.expire_time) == (MAINTAINER, until)
    assert second.create_time == first.create_time
    assert await members(svc, owner, team) == [second]
    assert len(await told(svc, TeamMemberAdded, viewer)) == 1
    (updated,) = await told(svc, TeamMemberUpdated, viewer)
    assert (updated.role, updated.expire_time) == (MAINTAINER, until)
    for past in (ahead(-1), ahead(-1e6)):
        outcome = await refused(add(svc, owner, team, viewer, expire_time=past))
        assert outcome == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_lists_who_is_in_a_team_and_who_by_way_of_which(svc: UserSvc, owner: Person):
    people = [await svc.join(owner, "viewer") for _ in range(5)]
    top = await create(svc, owner, "Top")
    left = await create(svc, owner, "Left", parent_team_id=top.team_id)
    right = await create(svc, owner, "Right", parent_team_id=top.team_id)
    low = await create(svc, owner, "Low", parent_team_id=left.team_id)
    for team, person in (
        (top, people[0]),
        (top, people[1]),
        (low, people[1]),
        (left, people[2]),
        (right, people[2]),
        (low, people[3]),
    ):
        await add(svc, owner, team, person)
    assert [m.user.user_id for m in await members(svc, owner, top)] == [p.user_id for p in people[:2]]
    effective = await members(svc, owner, top, include_inherited=True)
    assert [(m.user.user_id, m.direct, list(m.via_team_ids)) for m in effective] == [
        (people[0].user_id, True, []),
        (people[1].user_id, True, [low.team_id]),
        (people[2].user_id, False, sorted([left.team_id, right.team_id])),
        (people[3].user_id, False, [low.team_id]),
    ]
    assert [m.user.user_id for m in await members(svc, owner, low, include_inherited=True)] == [
        people[1].user_id,
        people[3].user_id,
    ]
    found = await teams_of(svc, people[0], people[3])
    assert [(t.team.title, t.direct) for t in found] == [("Top", False), ("Left", False), ("Low", True)]
    assert {t.team.team_id for t in found} == set((await rights_of(svc, people[3])).team_ids)
    assert await teams_of(svc, owner, people[4]) == []


async def test_says_nothing_of_what_is_elsewhere(svc: UserSvc, owner: Person):
    stranger = await svc.person()
    foreign = await create(svc, stranger, "T")
    outcome = await refused(members(svc, owner, foreign))
    assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")
    outcome = await refused(teams_of(svc, owner, stranger))
    assert outcome == (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")


async def test_a_membership_that_has_expired_counts_for_nothing(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    top = await create(svc, owner, "Top")
    low = await create(svc, owner, "Low", parent_team_id=top.team_id)
    other = await create(svc, owner, "Other")
    late = ahead()
    await add(svc, owner, other, viewer, expire_time=late)
    assert (await rights_of(svc, viewer)).expire_time == late
    soon = ahead(0.7)
    await add(svc, owner, low, viewer, expire_time=soon)
    rights = await rights_of(svc, viewer)
    assert set(rights.team_ids) == {top.team_id, low.team_id, other.team_id}
    assert rights.expire_time == soon

    async def out() -> bool:
        now = await rights_of(svc, viewer)
        return list(now.team_ids) == [other.team_id] and now.expire_time == late

    await eventually(out)
    assert (await rights_of(svc, viewer)).version == rights.version, "nobody had to say so"
    assert await members(svc, owner, top, include_inherited=True) == []
    assert [t.team.title for t in await teams_of(svc, owner, viewer)] == ["Other"]

    again = await add(svc, owner, low, viewer)
    assert not again.HasField("expire_time")
    assert len(await told(svc, TeamMemberAdded, viewer)) == 3


async def test_what_has_expired_is_told_and_cleared_away(svc: UserSvc, owner: Person):
    viewer, team = await svc.join(owner, "viewer"), await create(svc, owner, "T")
    await add(svc, owner, team, viewer, expire_time=ahead())
    before = (await rights_of(svc, viewer)).version
    now = datetime.now(UTC)
    await end_team_memberships(svc.sessions, now)
    assert await told(svc, TeamMemberRemoved, viewer) == []
    await end_team_memberships(svc.sessions, now + timedelta(hours=2))
    await end_team_memberships(svc.sessions, now + timedelta(hours=2))
    assert len(await told(svc, TeamMemberRemoved, viewer)) == 1
    assert (await rights_of(svc, viewer)).version == before + 1
    assert await members(svc, owner, team) == []


async def test_maintainers_add_and_remove_members_of_their_team_and_below(svc: UserSvc, owner: Person):
    lead, second, guest = [await svc.join(owner, "viewer") for _ in range(3)]
    top = await create(svc, owner, "Top")
    team = await create(svc, owner, "Team", parent_team_id=top.team_id)
    low = await create(svc, owner, "Low", parent_team_id=team.team_id)
    side = await create(svc, owner, "Side", parent_team_id=top.team_id)
    assert await refused(add(svc, lead, team, guest)) == MISSING
    await add(svc, owner, team, lead)
    assert await refused(add(svc, lead, team, guest)) == MISSING, "a member is no maintainer"
    await add(svc, owner, team, lead, role=MAINTAINER)
    await add(svc, owner, low, second, role=MAINTAINER)
    for where in (team, low):
        await add(svc, lead, where, guest)
        await remove(svc, lead, where, guest)
    for where in (top, side):
        assert await refused(add(svc, lead, where, guest)) == MISSING
        assert await refused(remove(svc, lead, where, guest)) == MISSING
    # Neither another maintainer, nor more of them, nor themselves.
    assert await refused(add(svc, lead, low, second)) == MISSING
    assert await refused(remove(svc, lead, low, second)) == MISSING
    assert await refused(add(svc, lead, team, guest, role=MAINTAINER)) == MISSING
    assert await refused(add(svc, lead, low, lead)) == MISSING
    await remove(svc, lead, team, lead)
    assert await refused(add(svc, lead, team, guest)) == MISSING, "who has left maintains no more"


async def test_a_maintainer_whose_time_is_over_has_no_say(svc: UserSvc, owner: Person):
    lead, guest = await svc.join(owner, "viewer"), await svc.join(owner, "viewer")
    team = await create(svc, owner, "Team")
    await add(svc, owner, team, lead, role=MAINTAINER, expire_time=ahead())
    await add(svc, lead, team, guest)
    async with svc.sessions.begin() as session:
        await session.execute(
            update(models.TeamMember)
            .where(models.TeamMember.user_id == lead.user_id)
            .values(expire_time=datetime.now(UTC) - timedelta(seconds=1))
        )
    assert await refused(remove(svc, lead, team, guest)) == MISSING


async def test_a_token_of_a_narrow_scope_changes_no_team(svc: UserSvc, owner: Person):
    viewer, team = await svc.join(owner, "viewer"), await create(svc, owner, "T")
    for scope, outcome in (
        ("teams.view", (StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")),
        ("teams.edit", (StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")),
        ("teams.view teams.edit", None),
    ):
        token = svc.identity.token(sub=owner.user_id, wid=owner.workspace_id, amr=[], scope=scope)
        machine = Person(
            owner.user_id, owner.workspace_id, owner.email, (("authorization", f"Bearer {token}"),)
        )
        if outcome:
            assert await refused(add(svc, machine, team, viewer)) == outcome
            assert await refused(remove(svc, machine, team, viewer)) == outcome
        else:
            await add(svc, machine, team, viewer)


@pytest.mark.parametrize("include_inherited", [False, True])
async def test_takes_few_statements(svc: UserSvc, owner: Person, include_inherited: bool):
    viewer, team = await svc.join(owner, "viewer"), await create(svc, owner, "T")
    internal = GetRightsRequest(user_id=viewer.user_id, workspace_id=owner.workspace_id)
    with statements_of(svc) as of_rights:
        await svc.internal.GetRights(internal, metadata=svc.calling_as("dashboard"))
    assert len(of_rights) == 1
    with statements_of(svc) as adding:
        await add(svc, owner, team, viewer)
    # The caller's rights, the lock, team, user, membership, the row itself, its version, two events.
    assert len(adding) <= 9, adding
    for _ in range(3):
        await add(svc, owner, team, await svc.join(owner, "viewer"))
    request = ListTeamMembersRequest(
        workspace_id=owner.workspace_id, team_id=team.team_id, include_inherited=include_inherited
    )
    with statements_of(svc) as listing:
        await svc.teams.ListTeamMembers(request, metadata=owner.metadata)
    # The caller's rights, the team, the list.
    assert len(listing) == 3, listing


async def test_takes_members_only(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "T")
    stranger = await svc.person()
    assert await refused(add(svc, owner, team, stranger)) == (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")
    absent = Team(team_id=new_id())
    for outcome in (
        await refused(add(svc, owner, absent, owner)),
        await refused(remove(svc, owner, absent, owner)),
    ):
        assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")
