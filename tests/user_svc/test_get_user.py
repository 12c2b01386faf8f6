from grpc import StatusCode
from meshboard.user.v1.user_service_pb2 import GetUserRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def test_shows_oneself_and_co_members(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    for caller in (owner, viewer):
        for user_id in (owner.user_id, viewer.user_id):
            answer = await svc.users.GetUser(GetUserRequest(user_id=user_id), metadata=caller.metadata)
            assert answer.user.user_id == user_id


async def test_hides_strangers_like_absent_users(svc: UserSvc, owner: Person):
    stranger = await svc.person()
    for user_id in (stranger.user_id, new_id()):
        outcome = await refused(svc.users.GetUser(GetUserRequest(user_id=user_id), metadata=owner.metadata))
        assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")


async def test_is_confined_to_the_workspace_of_the_call(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    other = await svc.join(viewer_workspace := await svc.person(), "viewer")
    elsewhere = (*owner.metadata, ("x-workspace-id", viewer_workspace.workspace_id))
    outcome = await refused(svc.users.GetUser(GetUserRequest(user_id=other.user_id), metadata=elsewhere))
    assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    outcome = await refused(
        svc.users.GetUser(GetUserRequest(user_id=viewer.user_id), metadata=other.metadata)
    )
    assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
