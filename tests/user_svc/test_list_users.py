from typing import Any

import pytest
from grpc import StatusCode
from meshboard.user.v1.user_pb2 import User as UserMessage
from meshboard.user.v1.user_service_pb2 import ListUsersRequest
from sqlalchemy import update

from services.user_svc.models import User
from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc, statements_of


async def change(svc: UserSvc, person: Person, **values: Any) -> None:
    async with svc.sessions.begin() as session:
        await session.execute(update(User).where(User.user_id == person.user_id).values(**values))


async def listed(svc: UserSvc, person: Person, **choice: Any) -> list[str]:
    """The ids of all pages, of two each."""
    request, found = ListUsersRequest(page_size=2, **choice), []
    while True:
        answer = await svc.users.ListUsers(request, metadata=person.metadata)
        assert len(answer.users) <= 2
        found += [user.user_id for user in answer.users]
        if not answer.next_page_token:
            return found
        request.page_token = answer.next_page_token


async def test_pages_hold_all_members_by_name(svc: UserSvc, owner: Person):
    people = {"Ada": await svc.join(owner, "viewer"), "Zoe": await svc.join(owner, "editor")}
    people |= {"Grace": owner, "Émilie": await svc.join(owner, "viewer")}
    namesake = await svc.join(owner, "viewer")
    for name, person in people.items():
        await change(svc, person, display_name=name)
    await change(svc, namesake, display_name="Grace")
    await svc.person()  # a stranger
    found = await listed(svc, people["Ada"])
    assert sorted(found) == sorted(person.user_id for person in (*people.values(), namesake))
    graces = sorted([owner.user_id, namesake.user_id])
    ada, zoe = people["Ada"].user_id, people["Zoe"].user_id
    assert [user_id for user_id in found if user_id != people["Émilie"].user_id] == [ada, *graces, zoe]


async def test_those_of_a_kind_in_a_state_and_managed(svc: UserSvc, owner: Person):
    robot, away, managed, theirs = [await svc.join(owner, "viewer") for _ in range(4)]
    other = await svc.person()
    await change(svc, robot, kind="SERVICE_ACCOUNT")
    await change(svc, away, state="DEACTIVATED", managing_workspace_id=owner.workspace_id)
    await change(svc, managed, managing_workspace_id=owner.workspace_id)
    await change(svc, theirs, managing_workspace_id=other.workspace_id)
    everybody = {owner.user_id, *(person.user_id for person in (robot, away, managed, theirs))}
    assert await listed(svc, owner, kind=UserMessage.SERVICE_ACCOUNT) == [robot.user_id]
    assert set(await listed(svc, owner, kind=UserMessage.PERSON)) == everybody - {robot.user_id}
    assert await listed(svc, owner, state=UserMessage.DEACTIVATED) == [away.user_id]
    assert set(await listed(svc, owner, state=UserMessage.ACTIVE)) == everybody - {away.user_id}
    assert set(await listed(svc, owner, managed=True)) == {away.user_id, managed.user_id}
    assert await listed(svc, owner, managed=True, state=UserMessage.ACTIVE) == [managed.user_id]
    answer = await svc.users.ListUsers(ListUsersRequest(), metadata=owner.metadata)
    seen = {user.user_id: user.managing_workspace_id for user in answer.users}
    assert (seen[managed.user_id], seen[theirs.user_id]) == (owner.workspace_id, "")


@pytest.mark.parametrize("change", [{"page_token": "x"}, {"page_size": -1}, {"state": 9}, {"kind": 9}])
async def test_refuses_what_is_not_of_the_list(svc: UserSvc, owner: Person, change: dict[str, Any]):
    call = svc.users.ListUsers(ListUsersRequest(**change), metadata=owner.metadata)
    reason = "PAGE_TOKEN_INVALID" if "page_token" in change else "VALIDATION_FAILED"
    assert await refused(call) == (StatusCode.INVALID_ARGUMENT, reason)


async def test_a_token_holds_for_its_own_choice_alone(svc: UserSvc, owner: Person):
    await svc.join(owner, "viewer")
    answer = await svc.users.ListUsers(ListUsersRequest(page_size=1), metadata=owner.metadata)
    request = ListUsersRequest(page_size=1, page_token=answer.next_page_token, managed=True)
    call = svc.users.ListUsers(request, metadata=owner.metadata)
    assert await refused(call) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_takes_one_statement_beside_that_of_the_rights(svc: UserSvc, owner: Person):
    await svc.join(owner, "viewer")
    with statements_of(svc) as listing:
        await svc.users.ListUsers(ListUsersRequest(), metadata=owner.metadata)
    assert len(listing) == 2, listing
