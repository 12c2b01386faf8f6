import grpc
from meshboard.auth.v1.account_service_pb2 import Account, GetAccountRequest

from tests.auth_svc.conftest import Services, bearer
from tests.harness import refused


async def test_shows_the_callers_account(services: Services):
    await services.sign_up()
    signed_up = await services.sign_up()
    answer = await services.accounts.GetAccount(GetAccountRequest(), metadata=bearer(signed_up.access_token))
    account = answer.account
    assert account == Account(
        user_id=signed_up.user.user_id,
        email=signed_up.user.email,
        create_time=account.create_time,
        password_change_time=account.password_change_time,
    )
    assert account.create_time.ToMicroseconds() <= account.password_change_time.ToMicroseconds()
    assert account.create_time.ToMicroseconds() > 0


async def test_needs_a_token(services: Services):
    outcome = await refused(services.accounts.GetAccount(GetAccountRequest()))
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
