from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest
from meshboard.user.v1.team_service_pb2 import CreateTeamRequest

from tests.harness import new_id
from tests.user_svc.conftest import Person, UserSvc


async def test_gives_those_of_the_workspace(svc: UserSvc, owner: Person):
    viewer, stranger = await svc.join(owner, "viewer"), await svc.person()
    teams = [
        (
            await svc.teams.CreateTeam(
                CreateTeamRequest(workspace_id=person.workspace_id, title="T"), metadata=person.metadata
            )
        ).team.team_id
        for person in (owner, stranger)
    ]
    answer = await svc.internal.CheckSubjects(
        CheckSubjectsRequest(
            workspace_id=owner.workspace_id,
            user_ids=[owner.user_id, viewer.user_id, stranger.user_id, new_id()],
            team_ids=[*teams, new_id()],
        ),
        metadata=svc.calling_as("dashboard"),
    )
    assert sorted(answer.user_ids) == sorted([owner.user_id, viewer.user_id])
    assert list(answer.team_ids) == teams[:1]
    nothing = await svc.internal.CheckSubjects(
        CheckSubjectsRequest(workspace_id=owner.workspace_id), metadata=svc.calling_as("dashboard")
    )
    assert (list(nothing.user_ids), list(nothing.team_ids)) == ([], [])
