"""What is written down of people, and what is not."""

import pytest
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInRequest, SignOutRequest, SignUpRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import text

from tests.auth_svc.conftest import Services, bearer, new_email
from tests.harness import new_id, refused


async def test_secrets_and_addresses_of_people_are_in_no_log(
    services: Services, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    email, password, wrong = new_email(), f"canary {new_id()}", f"canary {new_id()}"
    signed_up = await services.sign_up(email, password)
    await refused(services.sign_up(email, wrong))
    await refused(services.sign_up("not an address", wrong))
    await refused(services.auth.SignUp(SignUpRequest(email=email, password=wrong * 4, display_name="A")))
    await refused(services.auth.SignIn(SignInRequest(email=email, password=wrong)))
    signed_in = await services.sign_in(email, password)
    await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_in.access_token))
    second = await services.auth.Refresh(RefreshRequest(refresh_token=signed_in.refresh_token))
    third = await services.auth.Refresh(RefreshRequest(refresh_token=second.refresh_token))
    await refused(
        services.auth.Refresh(
            RefreshRequest(refresh_token=signed_in.refresh_token, refresh_key=signed_in.refresh_key)
        )
    )
    await services.auth.SignOut(SignOutRequest(), metadata=bearer(signed_up.access_token))
    # And when a statement fails in the middle of it.
    unlucky = new_email()
    async with services.sessions.begin() as session:
        await session.execute(text("ALTER TABLE accounts RENAME COLUMN email TO address"))
    try:
        await refused(services.sign_up(unlucky, password))
    finally:
        async with services.sessions.begin() as session:
            await session.execute(text("ALTER TABLE accounts RENAME COLUMN address TO email"))

    output = "".join(capfd.readouterr()) + caplog.text
    for event in (
        "account.created",
        "session.begun",
        "CREDENTIALS_WRONG",
        "REFRESH_TOKEN_REUSED",
        "session.ended",
    ):
        assert event in output
    assert "fault" in output
    secrets = [email, unlucky, password, wrong]
    for answer in (signed_up, signed_in, second, third):
        secrets += [answer.access_token, answer.access_token.split(".")[2], answer.refresh_token]
    secrets += [signed_up.refresh_key, signed_in.refresh_key]
    for secret in secrets:
        assert secret not in output
