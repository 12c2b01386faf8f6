"""What is asked for often costs one statement, whatever hangs on a user; the rights of the caller are one more here."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from meshboard.user.v1.avatar_service_pb2 import GetAvatarRequest
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.profile_service_pb2 import GetProfileRequest
from meshboard.user.v1.user_service_pb2 import BatchGetUsersRequest, GetMeRequest, GetUserRequest

from tests.statements import statements_on
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.test_avatars import put
from tests.user_svc.test_pictures import PNG


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GetMe", 1),
        ("GetUser", 2),
        ("BatchGetUsers", 2),
        ("GetProfile", 1),
        ("GetAvatar", 2),
        ("GetRights", 1),
    ],
)
async def test_reads_cost_one_statement(svc: UserSvc, owner: Person, name: str, expected: int):
    await put(svc, owner, PNG)
    user_id = owner.user_id
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "GetMe": lambda: svc.users.GetMe(GetMeRequest(), metadata=owner.metadata),
        "GetUser": lambda: svc.users.GetUser(GetUserRequest(user_id=user_id), metadata=owner.metadata),
        "BatchGetUsers": lambda: svc.users.BatchGetUsers(
            BatchGetUsersRequest(user_ids=[user_id]), metadata=owner.metadata
        ),
        "GetProfile": lambda: svc.profiles.GetProfile(GetProfileRequest(), metadata=owner.metadata),
        "GetAvatar": lambda: svc.avatars.GetAvatar(
            GetAvatarRequest(user_id=user_id), metadata=owner.metadata
        ),
        "GetRights": lambda: svc.internal.GetRights(
            GetRightsRequest(user_id=user_id, workspace_id=owner.workspace_id),
            metadata=svc.calling_as("dashboard"),
        ),
    }
    with statements_on(svc.url) as found:
        await calls[name]()
    assert len(found) == expected, found


async def test_me_is_remembered(svc: UserSvc, owner: Person):
    await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)
    with statements_on(svc.url) as found:
        await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)
    assert found == []
