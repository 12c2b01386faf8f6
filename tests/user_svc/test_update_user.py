import asyncio

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import GetMeRequest, UpdateUserRequest

from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc


async def test_changes_the_name_and_shows_it_at_once(svc: UserSvc, owner: Person):
    before = (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).user
    request = UpdateUserRequest(user=User(user_id=owner.user_id, display_name="Ada", etag=before.etag))
    updated = (await svc.users.UpdateUser(request, metadata=owner.metadata)).user
    after = (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).user
    assert after == updated
    assert (after.display_name, after.email) == ("Ada", owner.email)
    assert after.etag != before.etag


async def test_one_of_many_with_the_same_etag_wins(svc: UserSvc, owner: Person):
    etag = (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).user.etag
    requests = [
        UpdateUserRequest(user=User(user_id=owner.user_id, display_name=f"Name {n}", etag=etag))
        for n in range(8)
    ]
    outcomes = await asyncio.gather(
        *(svc.users.UpdateUser(request, metadata=owner.metadata) for request in requests),
        return_exceptions=True,
    )
    failures = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert [failure.code() for failure in failures] == [StatusCode.ABORTED] * 7


async def test_rejects_an_old_etag(svc: UserSvc, owner: Person):
    request = UpdateUserRequest(user=User(user_id=owner.user_id, display_name="Ada", etag="0"))
    outcome = await refused(svc.users.UpdateUser(request, metadata=owner.metadata))
    assert outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")


@pytest.mark.parametrize("path", ["email", "user_id", "nonsense", "etag"])
async def test_rejects_other_fields(svc: UserSvc, owner: Person, path: str):
    request = UpdateUserRequest(
        user=User(user_id=owner.user_id, email="new@example.org"), update_mask=FieldMask(paths=[path])
    )
    outcome = await refused(svc.users.UpdateUser(request, metadata=owner.metadata))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")


async def test_does_not_empty_the_name(svc: UserSvc, owner: Person):
    request = UpdateUserRequest(
        user=User(user_id=owner.user_id), update_mask=FieldMask(paths=["display_name"])
    )
    outcome = await refused(svc.users.UpdateUser(request, metadata=owner.metadata))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_leaves_fields_outside_the_mask_alone(svc: UserSvc, owner: Person):
    request = UpdateUserRequest(user=User(user_id=owner.user_id, email="new@example.org"))
    updated = (await svc.users.UpdateUser(request, metadata=owner.metadata)).user
    assert updated.email == owner.email


async def test_is_for_oneself_alone(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    request = UpdateUserRequest(user=User(user_id=viewer.user_id, display_name="Mallory"))
    outcome = await refused(svc.users.UpdateUser(request, metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
