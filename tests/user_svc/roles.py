"""Custom roles for tests."""

from collections.abc import Iterable
from typing import Any

from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.role_pb2 import Role
from meshboard.user.v1.role_service_pb2 import CreateRoleRequest, UpdateRoleRequest
from meshboard.user.v1.workspace_pb2 import Rights
from meshboard.user.v1.workspace_service_pb2 import UpdateMemberRequest

from tests.user_svc.conftest import Person, UserSvc

VIEW = "workspaces.view"


async def create(
    svc: UserSvc, person: Person, name: str, permissions: Iterable[str] = (), **fields: Any
) -> Role:
    """A role with these permissions, and the sight of the workspace."""
    request = CreateRoleRequest(
        workspace_id=person.workspace_id, name=name, permissions=[VIEW, *permissions], **fields
    )
    return (await svc.roles.CreateRole(request, metadata=person.metadata)).role


async def allow(svc: UserSvc, person: Person, name: str, permissions: Iterable[str]) -> Role:
    """The role with these permissions in place of its own."""
    role = Role(workspace_id=person.workspace_id, name=name, permissions=[VIEW, *permissions])
    return (await svc.roles.UpdateRole(UpdateRoleRequest(role=role), metadata=person.metadata)).role


async def give(svc: UserSvc, giver: Person, member: Person, role: str) -> None:
    """Gives a member a role."""
    request = UpdateMemberRequest(workspace_id=giver.workspace_id, user_id=member.user_id, role=role)
    await svc.workspaces.UpdateMember(request, metadata=giver.metadata)


async def member_with(svc: UserSvc, owner: Person, name: str, permissions: Iterable[str]) -> Person:
    """Somebody new with a new role."""
    await create(svc, owner, name, permissions)
    return await svc.join(owner, name)


async def rights_of(svc: UserSvc, person: Person) -> Rights:
    """What GetRights says."""
    request = GetRightsRequest(user_id=person.user_id, workspace_id=person.workspace_id)
    return (await svc.internal.GetRights(request, metadata=svc.calling_as("dashboard"))).rights
