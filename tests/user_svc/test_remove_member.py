from grpc import StatusCode
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.team_service_pb2 import AddTeamMemberRequest, CreateTeamRequest
from meshboard.user.v1.workspace_service_pb2 import GetWorkspaceRequest, RemoveMemberRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


def removing(person: Person) -> RemoveMemberRequest:
    return RemoveMemberRequest(workspace_id=person.workspace_id, user_id=person.user_id)


async def test_takes_all_rights_also_those_of_teams(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    workspace_id = owner.workspace_id
    team = (
        await svc.teams.CreateTeam(
            CreateTeamRequest(workspace_id=workspace_id, title="T"), metadata=owner.metadata
        )
    ).team
    await svc.teams.AddTeamMember(
        AddTeamMemberRequest(workspace_id=workspace_id, team_id=team.team_id, user_id=viewer.user_id),
        metadata=owner.metadata,
    )
    await svc.workspaces.RemoveMember(removing(viewer), metadata=owner.metadata)
    outcome = await refused(
        svc.workspaces.GetWorkspace(GetWorkspaceRequest(workspace_id=workspace_id), metadata=viewer.metadata)
    )
    assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")

    await svc.admit(owner, viewer)
    rights = await svc.internal.GetRights(
        GetRightsRequest(user_id=viewer.user_id, workspace_id=workspace_id),
        metadata=svc.calling_as("dashboard"),
    )
    assert list(rights.rights.team_ids) == []


async def test_rejects_the_last_owner_and_strangers(svc: UserSvc, owner: Person):
    outcome = await refused(svc.workspaces.RemoveMember(removing(owner), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")
    absent = RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=new_id())
    outcome = await refused(svc.workspaces.RemoveMember(absent, metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")


async def test_admins_do_not_remove_owners(svc: UserSvc, owner: Person):
    admin = await svc.join(owner, "admin")
    await svc.join(owner, "owner")
    outcome = await refused(svc.workspaces.RemoveMember(removing(owner), metadata=admin.metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")
