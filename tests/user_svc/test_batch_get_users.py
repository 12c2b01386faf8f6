from grpc import StatusCode
from meshboard.user.v1.user_service_pb2 import BatchGetUsersRequest, BatchGetUsersResponse

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def batch(svc: UserSvc, person: Person, *user_ids: str) -> BatchGetUsersResponse:
    return await svc.users.BatchGetUsers(BatchGetUsersRequest(user_ids=user_ids), metadata=person.metadata)


async def test_gives_whom_one_may_see_and_names_the_others(svc: UserSvc, owner: Person):
    viewer, stranger, absent = await svc.join(owner, "viewer"), await svc.person(), new_id()
    wanted = [absent, viewer.user_id, stranger.user_id, owner.user_id.upper(), viewer.user_id]
    answer = await batch(svc, owner, *wanted)
    assert [user.user_id for user in answer.users] == [viewer.user_id, owner.user_id]
    assert list(answer.missing_user_ids) == [absent, stranger.user_id]


async def test_takes_a_hundred_in_one_statement(svc: UserSvc, owner: Person):
    answer = await batch(svc, owner, *(new_id() for _ in range(99)), owner.user_id)
    assert len(answer.missing_user_ids) == 99
    for user_ids in ([], [new_id() for _ in range(101)], ["x"]):
        assert await refused(batch(svc, owner, *user_ids)) == (
            StatusCode.INVALID_ARGUMENT,
            "VALIDATION_FAILED",
        )
