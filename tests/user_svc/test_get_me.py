import asyncio

from grpc import StatusCode
from meshboard.user.v1.user_service_pb2 import GetMeRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def test_returns_the_caller(svc: UserSvc, owner: Person):
    answers = await asyncio.gather(
        *(svc.users.GetMe(GetMeRequest(), metadata=owner.metadata) for _ in range(10))
    )
    assert {(answer.user.user_id, answer.user.email) for answer in answers} == {(owner.user_id, owner.email)}


async def test_needs_a_user(svc: UserSvc):
    nobody = (("authorization", f"Bearer {svc.identity.token(sub=new_id())}"),)
    outcome = await refused(svc.users.GetMe(GetMeRequest(), metadata=nobody))
    assert outcome == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    outcome = await refused(svc.users.GetMe(GetMeRequest()))
    assert outcome == (StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
