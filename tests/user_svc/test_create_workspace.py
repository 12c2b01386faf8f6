import asyncio

from grpc import StatusCode
from meshboard.user.v1.workspace_service_pb2 import (
    CreateWorkspaceRequest,
    GetWorkspaceRequest,
    ListMembersRequest,
)

from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc


async def test_makes_the_caller_its_owner(svc: UserSvc, owner: Person):
    created = await svc.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Research"), metadata=owner.metadata
    )
    workspace_id = created.workspace.workspace_id
    found = await svc.workspaces.GetWorkspace(
        GetWorkspaceRequest(workspace_id=workspace_id), metadata=owner.metadata
    )
    assert found.workspace == created.workspace
    members = await svc.workspaces.ListMembers(
        ListMembersRequest(workspace_id=workspace_id), metadata=owner.metadata
    )
    assert [(m.user.user_id, m.role) for m in members.members] == [(owner.user_id, "owner")]


async def test_a_repeat_gives_the_same_workspace(svc: UserSvc, owner: Person):
    request = CreateWorkspaceRequest(title="Research", request_id="once")
    created = await asyncio.gather(
        *(svc.workspaces.CreateWorkspace(request, metadata=owner.metadata) for _ in range(5))
    )
    assert len({answer.workspace.workspace_id for answer in created}) == 1
    by_header = await svc.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Research"), metadata=(*owner.metadata, ("idempotency-key", "once"))
    )
    assert by_header.workspace == created[0].workspace
    other = await svc.person()
    elsewhere = await svc.workspaces.CreateWorkspace(request, metadata=other.metadata)
    assert elsewhere.workspace.workspace_id != created[0].workspace.workspace_id


async def test_is_not_found_by_others(svc: UserSvc, owner: Person):
    stranger = await svc.person()
    outcome = await refused(
        svc.workspaces.GetWorkspace(
            GetWorkspaceRequest(workspace_id=owner.workspace_id), metadata=stranger.metadata
        )
    )
    assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
