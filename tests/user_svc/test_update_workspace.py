from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.user.v1.workspace_pb2 import Workspace
from meshboard.user.v1.workspace_service_pb2 import GetWorkspaceRequest, UpdateWorkspaceRequest

from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc


async def test_changes_the_title(svc: UserSvc, owner: Person):
    workspace = Workspace(workspace_id=owner.workspace_id, title="Research")
    updated = await svc.workspaces.UpdateWorkspace(
        UpdateWorkspaceRequest(workspace=workspace), metadata=owner.metadata
    )
    found = await svc.workspaces.GetWorkspace(
        GetWorkspaceRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
    )
    assert found.workspace == updated.workspace
    assert found.workspace.title == "Research"


async def test_rejects_what_cannot_be(svc: UserSvc, owner: Person):
    def update(workspace: Workspace, *paths: str) -> UpdateWorkspaceRequest:
        workspace.workspace_id = owner.workspace_id
        return UpdateWorkspaceRequest(workspace=workspace, update_mask=FieldMask(paths=paths))

    for request, outcome in (
        (update(Workspace(title="T", etag="0")), (StatusCode.ABORTED, "ETAG_MISMATCH")),
        (update(Workspace(), "etag"), (StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")),
        (update(Workspace(), "title"), (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
    ):
        assert await refused(svc.workspaces.UpdateWorkspace(request, metadata=owner.metadata)) == outcome


async def test_needs_the_permission(svc: UserSvc, owner: Person):
    editor, stranger = await svc.join(owner, "editor"), await svc.person()
    request = UpdateWorkspaceRequest(workspace=Workspace(workspace_id=owner.workspace_id, title="T"))
    for person, outcome in (
        (editor, (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
        (stranger, (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")),
    ):
        assert await refused(svc.workspaces.UpdateWorkspace(request, metadata=person.metadata)) == outcome
