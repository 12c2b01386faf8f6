import asyncio

import grpc.aio
import pytest
from grpc import StatusCode
from meshboard.user.v1.events_pb2 import MemberRemoved
from meshboard.user.v1.workspace_service_pb2 import (
    GetWorkspaceRequest,
    LeaveWorkspaceRequest,
    ListMembersRequest,
)
from sqlalchemy import select

from services.chassis.db import OutboxRow
from tests.harness import new_id, reason_of, refused
from tests.user_svc.conftest import LONG, Person, UserSvc

ROUNDS = pytest.mark.parametrize("rounds", [20, LONG])


def leaving(person: Person) -> LeaveWorkspaceRequest:
    return LeaveWorkspaceRequest(workspace_id=person.workspace_id)


async def test_any_member_may_go(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    await svc.workspaces.LeaveWorkspace(leaving(viewer), metadata=viewer.metadata)
    again = svc.workspaces.LeaveWorkspace(leaving(viewer), metadata=viewer.metadata)
    assert await refused(again) == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == MemberRemoved.DESCRIPTOR.full_name)
        )
    expected = MemberRemoved(workspace_id=owner.workspace_id, user_id=viewer.user_id)
    assert [MemberRemoved.FromString(row) for row in rows].count(expected) == 1


async def test_the_last_owner_stays(svc: UserSvc, owner: Person):
    await svc.join(owner, "admin")
    outcome = await refused(svc.workspaces.LeaveWorkspace(leaving(owner), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")


async def test_nobody_leaves_for_somebody_else(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    token = svc.identity.token(
        sub=viewer.user_id, wid=viewer.workspace_id, act={"sub": owner.user_id, "sid": new_id()}
    )
    metadata = (("authorization", f"Bearer {token}"),)
    outcome = await refused(svc.workspaces.LeaveWorkspace(leaving(viewer), metadata=metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")
    await svc.workspaces.GetWorkspace(
        GetWorkspaceRequest(workspace_id=viewer.workspace_id), metadata=viewer.metadata
    )


@ROUNDS
async def test_one_owner_is_left_when_two_leave_at_once(svc: UserSvc, rounds: int):
    for _ in range(rounds):
        owner = await svc.person()
        second, viewer = await svc.join(owner, "owner"), await svc.join(owner, "viewer")
        outcomes = await asyncio.gather(
            *(svc.workspaces.LeaveWorkspace(leaving(p), metadata=p.metadata) for p in (owner, second)),
            return_exceptions=True,
        )
        failures = [reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert failures == ["LAST_OWNER"]
        left = await svc.workspaces.ListMembers(
            ListMembersRequest(workspace_id=owner.workspace_id), metadata=viewer.metadata
        )
        assert sorted(member.role for member in left.members) == ["owner", "viewer"]
