import asyncio

import grpc.aio
from grpc import StatusCode
from meshboard.user.v1.workspace_service_pb2 import AddMemberRequest, GetWorkspaceRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


def adding(owner: Person, user_id: str, role: str = "viewer") -> AddMemberRequest:
    return AddMemberRequest(workspace_id=owner.workspace_id, user_id=user_id, role=role)


async def test_lets_the_member_in(svc: UserSvc, owner: Person):
    person = await svc.acquaintance(owner)
    added = await svc.workspaces.AddMember(adding(owner, person.user_id), metadata=owner.metadata)
    assert (added.member.user.user_id, added.member.role) == (person.user_id, "viewer")
    found = await svc.workspaces.GetWorkspace(
        GetWorkspaceRequest(workspace_id=owner.workspace_id), metadata=person.metadata
    )
    assert found.workspace.workspace_id == owner.workspace_id


async def test_adds_once(svc: UserSvc, owner: Person):
    person = await svc.acquaintance(owner)
    outcomes = await asyncio.gather(
        *(svc.workspaces.AddMember(adding(owner, person.user_id), metadata=owner.metadata) for _ in range(5)),
        return_exceptions=True,
    )
    assert sum(not isinstance(outcome, grpc.aio.AioRpcError) for outcome in outcomes) == 1
    outcome = await refused(svc.workspaces.AddMember(adding(owner, person.user_id), metadata=owner.metadata))
    assert outcome == (StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS")


async def test_takes_nobody_who_shares_no_workspace_with_the_caller(svc: UserSvc, owner: Person):
    admin, stranger = await svc.join(owner, "admin"), await svc.acquaintance(owner)
    for user_id in (stranger.user_id, new_id()):
        outcome = await refused(svc.workspaces.AddMember(adding(admin, user_id), metadata=admin.metadata))
        assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    await svc.workspaces.AddMember(adding(owner, stranger.user_id), metadata=owner.metadata)


async def test_rejects_unknown_users_and_roles(svc: UserSvc, owner: Person):
    person = await svc.acquaintance(owner)
    for request, outcome in (
        (adding(owner, new_id()), (StatusCode.NOT_FOUND, "USER_NOT_FOUND")),
        (adding(owner, person.user_id, "king"), (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
    ):
        assert await refused(svc.workspaces.AddMember(request, metadata=owner.metadata)) == outcome


async def test_only_owners_make_owners(svc: UserSvc, owner: Person):
    admin, editor = await svc.join(owner, "admin"), await svc.join(owner, "editor")
    person = await svc.acquaintance(owner)
    request = adding(owner, person.user_id, "owner")
    for caller, reason in ((admin, "OWNER_ROLE_RESERVED"), (editor, "PERMISSION_MISSING")):
        outcome = await refused(svc.workspaces.AddMember(request, metadata=caller.metadata))
        assert outcome == (StatusCode.PERMISSION_DENIED, reason)
    await svc.workspaces.AddMember(request, metadata=owner.metadata)
