from grpc import StatusCode
from meshboard.user.v1.internal_user_service_pb2 import GetSignInRequest
from meshboard.user.v1.workspace_service_pb2 import CreateWorkspaceRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def test_gives_the_wanted_workspace_or_the_first(svc: UserSvc, owner: Person):
    second = await svc.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Second"), metadata=owner.metadata
    )
    stranger = await svc.person()
    for wanted, given in (
        ("", owner.workspace_id),
        (second.workspace.workspace_id, second.workspace.workspace_id),
        (stranger.workspace_id, owner.workspace_id),
    ):
        answer = await svc.internal.GetSignIn(
            GetSignInRequest(user_id=owner.user_id, workspace_id=wanted), metadata=svc.calling_as("auth")
        )
        assert answer.user.user_id == owner.user_id
        assert answer.workspace.workspace_id == given


async def test_needs_a_user(svc: UserSvc):
    outcome = await refused(
        svc.internal.GetSignIn(GetSignInRequest(user_id=new_id()), metadata=svc.calling_as("auth"))
    )
    assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
