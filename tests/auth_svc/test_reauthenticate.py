from datetime import UTC, datetime, timedelta

import grpc
from google.protobuf.struct_pb2 import Struct
from meshboard.auth.v1.account_service_pb2 import (
    ChangeEmailRequest,
    GetAccountRequest,
    ReauthenticateRequest,
    ReauthenticateResponse,
)
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInRequest, SignUpResponse
from sqlalchemy import select, update

from services.auth_svc.models import AuditEntryRow, Session
from tests.auth_svc.conftest import PASSWORD, Services, claims_of, from_elsewhere, new_email
from tests.conditions import eventually
from tests.harness import ISSUER, outcome, refused

WRONG = (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
REVOKED = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")


async def prove(services: Services, access_token: str, password: str = PASSWORD) -> ReauthenticateResponse:
    return await services.accounts.Reauthenticate(
        ReauthenticateRequest(password=password), metadata=from_elsewhere(access_token)
    )


async def an_hour_later(services: Services, signed_up: SignUpResponse) -> str:
    """An access token of a session whose person has proved an hour ago who they are."""
    async with services.sessions.begin() as session:
        await session.execute(
            update(Session)
            .where(Session.session_id == claims_of(signed_up.access_token)["sid"])
            .values(
                auth_time=datetime.now(UTC) - timedelta(hours=1),
                methods=["pwd", "otp", "mfa"],
                end_time=datetime.now(UTC) + timedelta(days=7),
            )
        )
    return (await services.auth.Refresh(RefreshRequest(refresh_token=signed_up.refresh_token))).access_token


async def test_makes_the_session_recent_in_a_new_one(services: Services):
    signed_up = await services.sign_up()
    old = await an_hour_later(services, signed_up)
    request = ChangeEmailRequest(new_email=new_email())
    changing = services.accounts.ChangeEmail(request, metadata=from_elsewhere(old))
    assert await refused(changing) == (grpc.StatusCode.PERMISSION_DENIED, "REAUTHENTICATION_REQUIRED")

    proved = await prove(services, old)
    before, after = claims_of(old), claims_of(proved.access_token)
    assert before["sid"] != after["sid"]
    assert after["auth_time"] >= before["auth_time"] + 3500
    assert sorted(after["amr"]) == ["mfa", "otp", "pwd"]
    await services.accounts.ChangeEmail(request, metadata=from_elsewhere(proved.access_token))
    async with services.sessions() as session:
        row = await session.get_one(Session, after["sid"])
    assert row.end_time < datetime.now(UTC) + timedelta(days=8)  # that of the former session

    async def old_one_is_refused() -> bool:
        call = services.accounts.GetAccount(GetAccountRequest(), metadata=from_elsewhere(old))
        return await outcome(call) == REVOKED

    await eventually(old_one_is_refused)


async def test_a_session_in_cookies_stays_in_cookies(services: Services):
    email = (await services.sign_up()).user.email
    origin = (("origin", ISSUER),)
    signing_in = services.auth.SignIn(
        SignInRequest(email=email, password=PASSWORD, cookies=True), metadata=origin
    )
    cookies = [str(value) for key, value in await signing_in.initial_metadata() if key == "set-cookie"]
    access_token = cookies[0].partition("=")[2].partition(";")[0]
    call = services.accounts.Reauthenticate(
        ReauthenticateRequest(password=PASSWORD), metadata=from_elsewhere(access_token)
    )
    answer = await call
    assert (answer.access_token, answer.refresh_token, answer.refresh_key) == ("", "", "")
    cookies = [str(value) for key, value in await call.initial_metadata() if key == "set-cookie"]
    assert cookies[0].startswith("mb_session=")


async def test_a_wrong_password_is_refused_and_noted(services: Services):
    signed_up = await services.sign_up()
    assert await refused(prove(services, signed_up.access_token, "not the password")) == WRONG
    async with services.sessions() as session:
        row = (
            await session.scalars(
                select(AuditEntryRow).where(
                    AuditEntryRow.subject_id == signed_up.user.user_id,
                    AuditEntryRow.kind == "session.renewed",
                )
            )
        ).one()
    assert (row.outcome, row.reason) == ("REFUSED", "CREDENTIALS_WRONG")
    await prove(services, signed_up.access_token)


async def test_repeated_failures_are_delayed(services: Services):
    signed_up = await services.sign_up()
    metadata = from_elsewhere(signed_up.access_token)
    request = ReauthenticateRequest(password="not the password")
    for _ in range(6):
        assert await refused(services.accounts.Reauthenticate(request, metadata=metadata)) == WRONG
    outcome = await refused(services.accounts.Reauthenticate(request, metadata=metadata))
    assert outcome == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


async def test_one_of_two_proofs_at_once_goes_on(services: Services):
    signed_up = await services.sign_up()
    await prove(services, signed_up.access_token)
    assert await refused(prove(services, signed_up.access_token)) == REVOKED


async def test_the_first_step_of_a_passkey_must_be_there(services: Services):
    signed_up = await services.sign_up()
    request = ReauthenticateRequest(passkey=Struct(), mfa_token="mbt_unknown")
    proving = services.accounts.Reauthenticate(request, metadata=from_elsewhere(signed_up.access_token))
    assert await refused(proving) == (grpc.StatusCode.UNAUTHENTICATED, "MFA_TOKEN_INVALID")
