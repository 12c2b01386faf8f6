from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest

from tests.user_svc.conftest import Person, UserSvc


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
