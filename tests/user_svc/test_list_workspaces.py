from grpc import StatusCode
from meshboard.user.v1.workspace_service_pb2 import CreateWorkspaceRequest, ListWorkspacesRequest

from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc


async def pages(svc: UserSvc, person: Person, page_size: int) -> list[list[str]]:
    found, token = [], ""
    while True:
        answer = await svc.workspaces.ListWorkspaces(
            ListWorkspacesRequest(page_size=page_size, page_token=token), metadata=person.metadata
        )
        found.append([workspace.title for workspace in answer.workspaces])
        token = answer.next_page_token
        if not token:
            return found


async def test_pages_hold_all_in_order(svc: UserSvc, owner: Person):
    for n in range(4):
        await svc.workspaces.CreateWorkspace(CreateWorkspaceRequest(title=f"W{n}"), metadata=owner.metadata)
    titles = ["Grace's workspace", "W0", "W1", "W2", "W3"]
    assert await pages(svc, owner, 2) == [titles[:2], titles[2:4], titles[4:]]
    assert await pages(svc, owner, 0) == [titles]


async def test_rejects_the_token_of_someone_else(svc: UserSvc, owner: Person):
    await svc.workspaces.CreateWorkspace(CreateWorkspaceRequest(title="W"), metadata=owner.metadata)
    first = await svc.workspaces.ListWorkspaces(ListWorkspacesRequest(page_size=1), metadata=owner.metadata)
    other = await svc.person()
    outcome = await refused(
        svc.workspaces.ListWorkspaces(
            ListWorkspacesRequest(page_token=first.next_page_token), metadata=other.metadata
        )
    )
    assert outcome == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
