from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest

from tests.user_svc.conftest import Person, UserSvc, statements_of


async def test_pages_hold_all_by_standing(svc: UserSvc, owner: Person):
    members = [owner, *[await svc.join(owner, "viewer") for _ in range(4)]]
    found, token = [], ""
    for _ in range(3):
        answer = await svc.workspaces.ListMembers(
            ListMembersRequest(workspace_id=owner.workspace_id, page_size=2, page_token=token),
            metadata=members[-1].metadata,
        )
        found += [(member.user.user_id, member.user.email) for member in answer.members]
        token = answer.next_page_token
    assert token == ""
    assert found == [(member.user_id, member.email) for member in members]


async def test_those_with_one_role(svc: UserSvc, owner: Person):
    editors = [await svc.join(owner, role) for role in ("editor", "viewer", "editor")][::2]
    for role, people in (("editor", editors), ("owner", [owner]), ("king", [])):
        request = ListMembersRequest(workspace_id=owner.workspace_id, role=role)
        answer = await svc.workspaces.ListMembers(request, metadata=owner.metadata)
        assert [member.user.user_id for member in answer.members] == [p.user_id for p in people]


async def test_takes_one_statement_beside_that_of_the_rights(svc: UserSvc, owner: Person):
    for _ in range(3):
        await svc.join(owner, "viewer")
    with statements_of(svc) as listing:
        await svc.workspaces.ListMembers(
            ListMembersRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
        )
    assert len(listing) == 2, listing
