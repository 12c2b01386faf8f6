from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.user.v1.team_service_pb2 import GetTeamRequest, UpdateTeamRequest
from meshboard.user.v1.workspace_pb2 import Team

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.test_create_team import create


async def get(svc: UserSvc, person: Person, team_id: str) -> Team:
    request = GetTeamRequest(workspace_id=person.workspace_id, team_id=team_id)
    return (await svc.teams.GetTeam(request, metadata=person.metadata)).team


async def test_changes_title_and_description(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "Research", description="Finds out")
    assert (team.description, team.depth) == ("Finds out", 1)
    team.title, team.description, team.depth = "Physics", "", 7
    updated = await svc.teams.UpdateTeam(
        UpdateTeamRequest(team=team, update_mask=FieldMask(paths=["title", "description"])),
        metadata=owner.metadata,
    )
    assert (updated.team.title, updated.team.description, updated.team.depth) == ("Physics", "", 1)
    assert updated.team.etag != team.etag
    assert await get(svc, owner, team.team_id) == updated.team


async def test_rejects_what_cannot_be(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "Research")
    await create(svc, owner, "Physics")
    foreign = await create(svc, await svc.person(), "Research")

    def update(*paths: str, **fields: Any) -> UpdateTeamRequest:
        changed = Team(**{"workspace_id": owner.workspace_id, "team_id": team.team_id, **fields})
        return UpdateTeamRequest(team=changed, update_mask=FieldMask(paths=paths))

    for request, outcome in (
        (update(title="Physics"), (StatusCode.ALREADY_EXISTS, "TEAM_TITLE_TAKEN")),
        (update(title="T", etag="0"), (StatusCode.ABORTED, "ETAG_MISMATCH")),
        (update("title"), (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (update(title="a\u202eb"), (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (update("parent_team_id"), (StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")),
        (update(title="T", team_id=new_id()), (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")),
        (update(title="T", team_id=foreign.team_id), (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")),
    ):
        assert await refused(svc.teams.UpdateTeam(request, metadata=owner.metadata)) == outcome
    assert await refused(get(svc, owner, foreign.team_id)) == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")
