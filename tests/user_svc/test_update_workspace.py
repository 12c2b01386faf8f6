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


async def test_says_who_may_become_a_member_and_as_what(svc: UserSvc, owner: Person):
    workspace = Workspace(
        workspace_id=owner.workspace_id,
        default_role="editor",
        allowed_email_domains=["Example.ORG", "b\u00fccher.example", "example.org"],
    )
    updated = await svc.workspaces.UpdateWorkspace(
        UpdateWorkspaceRequest(workspace=workspace), metadata=owner.metadata
    )
    assert updated.workspace.default_role == "editor"
    assert list(updated.workspace.allowed_email_domains) == ["b\u00fccher.example", "example.org"]
    cleared = await svc.workspaces.UpdateWorkspace(
        UpdateWorkspaceRequest(
            workspace=Workspace(workspace_id=owner.workspace_id),
            update_mask=FieldMask(paths=["allowed_email_domains"]),
        ),
        metadata=owner.metadata,
    )
    assert list(cleared.workspace.allowed_email_domains) == []
    assert cleared.workspace.default_role == "editor"


async def test_rejects_domains_that_are_none_and_the_role_of_an_owner(svc: UserSvc, owner: Person):
    for domain in ("example", "@example.org", "*.example.org", "-a.org", "a..org", "a b.org", "a.org/"):
        workspace = Workspace(workspace_id=owner.workspace_id, allowed_email_domains=["a.org", domain])
        outcome = await refused(
            svc.workspaces.UpdateWorkspace(
                UpdateWorkspaceRequest(workspace=workspace), metadata=owner.metadata
            )
        )
        assert outcome == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED"), domain
    for role, expected in (
        ("king", (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        ("owner", (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")),
    ):
        workspace = Workspace(workspace_id=owner.workspace_id, default_role=role)
        outcome = await refused(
            svc.workspaces.UpdateWorkspace(
                UpdateWorkspaceRequest(workspace=workspace), metadata=owner.metadata
            )
        )
        assert outcome == expected
