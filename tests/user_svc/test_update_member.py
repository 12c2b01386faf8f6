import asyncio

import grpc.aio
from grpc import StatusCode
from meshboard.user.v1.workspace_service_pb2 import (
    ListMembersRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)

from tests.harness import new_id, reason_of, refused
from tests.user_svc.conftest import Person, UserSvc


def giving(person: Person, role: str) -> UpdateMemberRequest:
    return UpdateMemberRequest(workspace_id=person.workspace_id, user_id=person.user_id, role=role)


async def roles(svc: UserSvc, owner: Person) -> list[str]:
    answer = await svc.workspaces.ListMembers(
        ListMembersRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
    )
    return [member.role for member in answer.members]


async def test_gives_another_role(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    updated = await svc.workspaces.UpdateMember(giving(viewer, "admin"), metadata=owner.metadata)
    assert updated.member.role == "admin"
    assert await roles(svc, owner) == ["owner", "admin"]


async def test_rejects_who_is_not_a_member(svc: UserSvc, owner: Person):
    request = UpdateMemberRequest(workspace_id=owner.workspace_id, user_id=new_id(), role="viewer")
    outcome = await refused(svc.workspaces.UpdateMember(request, metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")


async def test_the_last_owner_stays(svc: UserSvc, owner: Person):
    admin = await svc.join(owner, "admin")
    outcome = await refused(svc.workspaces.UpdateMember(giving(owner, "viewer"), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")
    outcome = await refused(svc.workspaces.UpdateMember(giving(owner, "viewer"), metadata=admin.metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")


async def test_one_owner_is_left_when_all_leave_at_once(svc: UserSvc, owner: Person):
    owners = [owner, *[await svc.join(owner, "owner") for _ in range(5)]]
    calls = [
        svc.workspaces.UpdateMember(giving(person, "admin"), metadata=person.metadata)
        if n % 2
        else svc.workspaces.RemoveMember(
            RemoveMemberRequest(workspace_id=person.workspace_id, user_id=person.user_id),
            metadata=person.metadata,
        )
        for n, person in enumerate(owners)
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert [reason_of(failure) for failure in failures] == ["LAST_OWNER"]
