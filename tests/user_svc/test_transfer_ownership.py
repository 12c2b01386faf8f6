from grpc import StatusCode
from meshboard.user.v1.internal_user_service_pb2 import PutServiceUserRequest
from meshboard.user.v1.workspace_service_pb2 import TransferOwnershipRequest

from services.user_svc.models import ACTIVE, DEACTIVATED, Member, User
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


def handing(owner: Person, user_id: str, role: str = "") -> TransferOwnershipRequest:
    return TransferOwnershipRequest(workspace_id=owner.workspace_id, user_id=user_id, role=role)


async def test_hands_the_workspace_over(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    done = await svc.workspaces.TransferOwnership(handing(owner, viewer.user_id), metadata=owner.metadata)
    assert (done.owner.user.user_id, done.owner.role) == (viewer.user_id, "owner")
    assert (done.former_owner.user.user_id, done.former_owner.role) == (owner.user_id, "admin")
    back = await svc.workspaces.TransferOwnership(
        handing(owner, owner.user_id, "viewer"), metadata=viewer.metadata
    )
    assert (back.owner.user.user_id, back.former_owner.role) == (owner.user_id, "viewer")


async def test_somebody_who_can_act_is_left(svc: UserSvc, owner: Person):
    viewer, partner = await svc.join(owner, "viewer"), await svc.join(owner, "owner")
    async with svc.sessions.begin() as session:
        for person in (viewer, partner):
            (await session.get_one(User, person.user_id)).state = DEACTIVATED
    request = handing(owner, viewer.user_id)
    outcome = await refused(svc.workspaces.TransferOwnership(request, metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")
    async with svc.sessions.begin() as session:
        roles = [
            (await session.get_one(Member, (owner.workspace_id, person.user_id))).role
            for person in (owner, viewer)
        ]
        assert roles == ["owner", "viewer"]
        (await session.get_one(User, partner.user_id)).state = ACTIVE
    done = await svc.workspaces.TransferOwnership(request, metadata=owner.metadata)
    assert done.owner.user.user_id == viewer.user_id


async def test_refuses_what_makes_no_sense(svc: UserSvc, owner: Person):
    viewer, machine = await svc.join(owner, "viewer"), new_id()
    await svc.internal.PutServiceUser(
        PutServiceUserRequest(
            user_id=machine, workspace_id=owner.workspace_id, display_name="CI", role="editor"
        ),
        metadata=svc.calling_as("auth"),
    )
    for request, outcome in (
        (handing(owner, new_id()), (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")),
        (handing(owner, owner.user_id), (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (handing(owner, viewer.user_id, "owner"), (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (handing(owner, viewer.user_id, "king"), (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (handing(owner, machine), (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")),
    ):
        assert await refused(svc.workspaces.TransferOwnership(request, metadata=owner.metadata)) == outcome
    admin = await svc.join(owner, "admin")
    outcome = await refused(
        svc.workspaces.TransferOwnership(handing(owner, viewer.user_id), metadata=admin.metadata)
    )
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
