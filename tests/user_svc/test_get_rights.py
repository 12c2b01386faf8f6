from typing import Any

from google.protobuf.message import Message
from grpc import StatusCode
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.team_service_pb2 import (
    AddTeamMemberRequest,
    CreateTeamRequest,
    RemoveTeamMemberRequest,
)
from meshboard.user.v1.workspace_pb2 import Rights
from meshboard.user.v1.workspace_service_pb2 import RemoveMemberRequest, UpdateMemberRequest

from services.chassis.rights import ROLES
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def rights_of(svc: UserSvc, person: Person) -> Rights:
    request = GetRightsRequest(user_id=person.user_id, workspace_id=person.workspace_id)
    return (await svc.internal.GetRights(request, metadata=svc.calling_as("dashboard"))).rights


async def nested_teams(svc: UserSvc, owner: Person, depth: int) -> list[str]:
    team_ids: list[str] = []
    for n in range(depth):
        request = CreateTeamRequest(
            workspace_id=owner.workspace_id,
            title=f"Depth {n}",
            parent_team_id=team_ids[-1] if team_ids else "",
        )
        team_ids.append((await svc.teams.CreateTeam(request, metadata=owner.metadata)).team.team_id)
    return team_ids


async def test_says_role_permissions_and_teams_with_all_above(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    team_ids = await nested_teams(svc, owner, 8)
    for team_id in (team_ids[3], team_ids[6], team_ids[6]):
        await svc.teams.AddTeamMember(
            AddTeamMemberRequest(workspace_id=owner.workspace_id, team_id=team_id, user_id=viewer.user_id),
            metadata=owner.metadata,
        )
    rights = await rights_of(svc, viewer)
    assert rights.role == "viewer"
    assert list(rights.permissions) == sorted(ROLES["viewer"])
    assert list(rights.team_ids) == sorted(team_ids[:7])
    assert list((await rights_of(svc, owner)).team_ids) == []


async def test_the_version_grows_with_each_change(svc: UserSvc, owner: Person):
    versions = [(await rights_of(svc, owner)).version]
    viewer = await svc.join(owner, "viewer")
    versions.append((await rights_of(svc, owner)).version)
    (team_id,) = await nested_teams(svc, owner, 1)
    in_team: dict[str, Any] = {
        "workspace_id": owner.workspace_id,
        "team_id": team_id,
        "user_id": viewer.user_id,
    }
    of_member = {"workspace_id": owner.workspace_id, "user_id": viewer.user_id}
    changes: list[tuple[Any, Message]] = [
        (svc.workspaces.UpdateMember, UpdateMemberRequest(**of_member, role="editor")),
        (svc.teams.AddTeamMember, AddTeamMemberRequest(**in_team)),
        (svc.teams.RemoveTeamMember, RemoveTeamMemberRequest(**in_team)),
        (svc.workspaces.RemoveMember, RemoveMemberRequest(**of_member)),
    ]
    for change, request in changes:
        await change(request, metadata=owner.metadata)
        versions.append((await rights_of(svc, owner)).version)
    assert versions == list(range(versions[0], versions[0] + 6))


async def test_a_repeat_changes_no_version(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    (team_id,) = await nested_teams(svc, owner, 1)
    in_team: dict[str, Any] = {
        "workspace_id": owner.workspace_id,
        "team_id": team_id,
        "user_id": viewer.user_id,
    }
    role = UpdateMemberRequest(workspace_id=owner.workspace_id, user_id=viewer.user_id, role="viewer")
    before = (await rights_of(svc, owner)).version
    for _ in range(2):
        await svc.teams.AddTeamMember(AddTeamMemberRequest(**in_team), metadata=owner.metadata)
    for _ in range(2):
        await svc.teams.RemoveTeamMember(RemoveTeamMemberRequest(**in_team), metadata=owner.metadata)
    await svc.workspaces.UpdateMember(role, metadata=owner.metadata)
    assert (await rights_of(svc, owner)).version == before + 2


async def test_teams_take_members_only(svc: UserSvc, owner: Person):
    (team_id,) = await nested_teams(svc, owner, 1)
    stranger = await svc.person()
    for team, user, reason in (
        (team_id, stranger.user_id, "MEMBER_NOT_FOUND"),
        (new_id(), owner.user_id, "TEAM_NOT_FOUND"),
    ):
        request = AddTeamMemberRequest(workspace_id=owner.workspace_id, team_id=team, user_id=user)
        outcome = await refused(svc.teams.AddTeamMember(request, metadata=owner.metadata))
        assert outcome == (StatusCode.NOT_FOUND, reason)
    absent = RemoveTeamMemberRequest(workspace_id=owner.workspace_id, team_id=new_id(), user_id=owner.user_id)
    outcome = await refused(svc.teams.RemoveTeamMember(absent, metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")


async def test_strangers_have_none(svc: UserSvc, owner: Person):
    stranger = await svc.person()
    for request in (
        GetRightsRequest(user_id=stranger.user_id, workspace_id=owner.workspace_id),
        GetRightsRequest(user_id=owner.user_id, workspace_id=new_id()),
    ):
        outcome = await refused(svc.internal.GetRights(request, metadata=svc.calling_as("analytics")))
        assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
