from grpc import StatusCode
from meshboard.user.v1.events_pb2 import MemberAdded, UserCreated, WorkspaceCreated
from meshboard.user.v1.internal_user_service_pb2 import CreateUserRequest
from sqlalchemy import select

from services.chassis.db import OutboxRow
from tests.harness import new_id, refused
from tests.user_svc.conftest import UserSvc


def a_request(**changes: str) -> CreateUserRequest:
    values = {"user_id": new_id(), "workspace_id": new_id(), "email": "a@b.org", "display_name": "Ada"}
    return CreateUserRequest(**{**values, **changes})


async def test_creates_a_user_with_a_workspace_once(svc: UserSvc):
    request = a_request()
    created = await svc.internal.CreateUser(request, metadata=svc.calling_as("auth"))
    assert created.user.user_id == request.user_id
    assert created.workspace.title == "Ada's workspace"
    repeated = await svc.internal.CreateUser(request, metadata=svc.calling_as("auth"))
    assert repeated == created

    async with svc.sessions() as session:
        rows = (await session.scalars(select(OutboxRow))).all()
    events = [
        kind.FromString(row.payload)
        for row in rows
        for kind in (UserCreated, WorkspaceCreated, MemberAdded)
        if row.subject == kind.DESCRIPTOR.full_name
    ]
    assert UserCreated(user=created.user) in events
    assert WorkspaceCreated(workspace=created.workspace) in events
    added = [e.member for e in events if isinstance(e, MemberAdded) and e.member.user == created.user]
    assert [(member.workspace_id, member.role) for member in added] == [(request.workspace_id, "owner")]


async def test_rejects_ids_of_others(svc: UserSvc):
    request = a_request()
    await svc.internal.CreateUser(request, metadata=svc.calling_as("auth"))
    for change in (
        a_request(user_id=request.user_id, workspace_id=request.workspace_id, email="c@d.org"),
        a_request(user_id=request.user_id),
        a_request(workspace_id=request.workspace_id),
    ):
        outcome = await refused(svc.internal.CreateUser(change, metadata=svc.calling_as("auth")))
        assert outcome == (StatusCode.ALREADY_EXISTS, "USER_ID_TAKEN")


async def test_is_for_auth_alone(svc: UserSvc):
    person = await svc.person()
    for metadata in (svc.calling_as("dashboard"), person.metadata, ()):
        outcome = await refused(svc.internal.CreateUser(a_request(), metadata=metadata))
        assert outcome == (StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
