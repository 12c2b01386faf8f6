from grpc import StatusCode
from meshboard.user.v1.team_service_pb2 import CreateTeamRequest, ListTeamsRequest
from meshboard.user.v1.workspace_pb2 import Team

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def create(svc: UserSvc, person: Person, title: str, **more: str) -> Team:
    request = CreateTeamRequest(workspace_id=person.workspace_id, title=title, **more)
    return (await svc.teams.CreateTeam(request, metadata=person.metadata)).team


async def test_creates_a_team_below_another(svc: UserSvc, owner: Person):
    parent = await create(svc, owner, "Research")
    child = await create(svc, owner, "Physics", parent_team_id=parent.team_id)
    listed = await svc.teams.ListTeams(
        ListTeamsRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
    )
    assert list(listed.teams) == [parent, child]
    assert child.parent_team_id == parent.team_id


async def test_rejects_taken_title(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "Research", request_id="once")
    assert await create(svc, owner, "Research", request_id="once") == team
    for request_id in ("", "twice"):
        outcome = await refused(create(svc, owner, "Research", request_id=request_id))
        assert outcome == (StatusCode.ALREADY_EXISTS, "TEAM_TITLE_TAKEN")
    other = await svc.person()
    assert (await create(svc, other, "Research")).team_id != team.team_id


async def test_nests_eight_deep(svc: UserSvc, owner: Person):
    above = ""
    for depth in range(8):
        above = (await create(svc, owner, f"Depth {depth}", parent_team_id=above)).team_id
    outcome = await refused(create(svc, owner, "Too deep", parent_team_id=above))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "TEAM_TOO_DEEP")


async def test_rejects_parents_elsewhere(svc: UserSvc, owner: Person):
    foreign = await create(svc, await svc.person(), "Research")
    for parent_team_id in (foreign.team_id, new_id()):
        outcome = await refused(create(svc, owner, "Physics", parent_team_id=parent_team_id))
        assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")


async def test_needs_the_permission(svc: UserSvc, owner: Person):
    editor = await svc.join(owner, "editor")
    outcome = await refused(create(svc, editor, "Research"))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_pages_hold_all(svc: UserSvc, owner: Person):
    teams = [await create(svc, owner, f"Team {n}") for n in range(5)]
    found: list[Team] = []
    token = ""
    for _ in range(3):
        page = await svc.teams.ListTeams(
            ListTeamsRequest(workspace_id=owner.workspace_id, page_size=2, page_token=token),
            metadata=owner.metadata,
        )
        found += page.teams
        token = page.next_page_token
    assert (found, token) == (teams, "")
