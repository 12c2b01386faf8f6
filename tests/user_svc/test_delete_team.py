from grpc import StatusCode
from meshboard.user.v1.events_pb2 import TeamDeleted
from meshboard.user.v1.team_service_pb2 import AddTeamMemberRequest, DeleteTeamRequest, GetTeamRequest
from sqlalchemy import select

from services.chassis.db import OutboxRow
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.test_create_team import create
from tests.user_svc.test_get_rights import rights_of


def deleting(owner: Person, team_id: str, etag: str = "") -> DeleteTeamRequest:
    return DeleteTeamRequest(workspace_id=owner.workspace_id, team_id=team_id, etag=etag)


async def test_takes_the_team_from_its_members(svc: UserSvc, owner: Person):
    viewer, team = await svc.join(owner, "viewer"), await create(svc, owner, "T")
    await svc.teams.AddTeamMember(
        AddTeamMemberRequest(workspace_id=owner.workspace_id, team_id=team.team_id, user_id=viewer.user_id),
        metadata=owner.metadata,
    )
    before = await rights_of(svc, viewer)
    assert list(before.team_ids) == [team.team_id]
    await svc.teams.DeleteTeam(deleting(owner, team.team_id, team.etag), metadata=owner.metadata)
    after = await rights_of(svc, viewer)
    assert (list(after.team_ids), after.version) == ([], before.version + 1)
    get = GetTeamRequest(workspace_id=owner.workspace_id, team_id=team.team_id)
    outcome = await refused(svc.teams.GetTeam(get, metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == TeamDeleted.DESCRIPTOR.full_name)
        )
    assert TeamDeleted(workspace_id=owner.workspace_id, team_id=team.team_id) in [
        TeamDeleted.FromString(row) for row in rows
    ]


async def test_rejects_teams_with_teams_below_and_absent_ones(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "Top")
    child = await create(svc, owner, "Low", parent_team_id=team.team_id)
    foreign = await create(svc, await svc.person(), "T")
    for team_id, etag, outcome in (
        (team.team_id, "", (StatusCode.FAILED_PRECONDITION, "TEAM_NOT_EMPTY")),
        (child.team_id, "0", (StatusCode.ABORTED, "ETAG_MISMATCH")),
        (new_id(), "", (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")),
        (foreign.team_id, "", (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")),
    ):
        request = deleting(owner, team_id, etag)
        assert await refused(svc.teams.DeleteTeam(request, metadata=owner.metadata)) == outcome
    for team_id in (child.team_id, team.team_id):
        await svc.teams.DeleteTeam(deleting(owner, team_id), metadata=owner.metadata)
    editor = await svc.join(owner, "editor")
    outcome = await refused(svc.teams.DeleteTeam(deleting(owner, new_id()), metadata=editor.metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
