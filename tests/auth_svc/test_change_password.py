import asyncio

import grpc
import pytest
from meshboard.auth.v1.account_service_pb2 import (
    ChangePasswordRequest,
    ChangePasswordResponse,
    GetAccountRequest,
    RequestPasswordResetRequest,
    ResetPasswordRequest,
)
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInRequest
from meshboard.auth.v1.events_pb2 import SessionRevoked
from sqlalchemy import select

from services.auth_svc.models import AuditEntryRow
from services.chassis.db import OutboxRow
from tests.auth_svc.conftest import PASSWORD, Services, claims_of, from_elsewhere
from tests.conditions import eventually
from tests.harness import refused
from tests.mailbox import Mailbox

NEW = "another good passphrase"
WRONG = (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
REVOKED = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
DELAYED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


async def change(
    services: Services, access_token: str, current: str = PASSWORD, new: str = NEW
) -> ChangePasswordResponse:
    return await services.accounts.ChangePassword(
        ChangePasswordRequest(current_password=current, new_password=new),
        metadata=from_elsewhere(access_token),
    )


async def has_ended(services: Services, access_token: str) -> bool:
    call = services.accounts.GetAccount(GetAccountRequest(), metadata=from_elsewhere(access_token))
    try:
        await call
    except grpc.aio.AioRpcError:
        assert await refused(call) == REVOKED
        return True
    return False


async def test_sets_the_password_and_goes_on_in_a_new_session(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    changed = await change(services, signed_up.access_token)
    assert await refused(services.sign_in(email)) == WRONG
    await services.sign_in(email, NEW)
    await mailbox.mail(email, "Your password was changed")
    answer = await services.accounts.GetAccount(
        GetAccountRequest(), metadata=from_elsewhere(changed.access_token)
    )
    assert answer.account.password_change_time.ToMicroseconds() > (
        answer.account.create_time.ToMicroseconds()
    )
    before, after = claims_of(signed_up.access_token), claims_of(changed.access_token)
    assert before["sid"] != after["sid"]
    assert (before["sub"], before["wid"]) == (after["sub"], after["wid"])
    await services.auth.Refresh(RefreshRequest(refresh_token=changed.refresh_token))
    refreshing = services.auth.Refresh(RefreshRequest(refresh_token=signed_up.refresh_token))
    assert await refused(refreshing) == (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")
    await eventually(lambda: has_ended(services, signed_up.access_token))


async def test_ends_the_other_sessions(services: Services):
    signed_up = await services.sign_up()
    others = [await services.sign_in(signed_up.user.email) for _ in range(2)]
    bystander = await services.sign_up()
    await change(services, signed_up.access_token)
    for other in others:
        await eventually(lambda token=other.access_token: has_ended(services, token))
    assert not await has_ended(services, bystander.access_token)
    async with services.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject == SessionRevoked.DESCRIPTOR.full_name)
        )
        events = [SessionRevoked.FromString(row.payload) for row in rows]
    reasons = {event.session_id: event.reason for event in events}
    assert {reasons[claims_of(other.access_token)["sid"]] for other in others} == {
        SessionRevoked.PASSWORD_CHANGED
    }
    assert reasons[claims_of(signed_up.access_token)["sid"]] == SessionRevoked.RENEWED


async def test_wants_the_current_password(services: Services):
    signed_up = await services.sign_up()
    assert await refused(change(services, signed_up.access_token, "not the password")) == WRONG
    await services.sign_in(signed_up.user.email)
    async with services.sessions() as session:
        row = (
            await session.scalars(
                select(AuditEntryRow).where(
                    AuditEntryRow.subject_id == signed_up.user.user_id,
                    AuditEntryRow.kind == "password.changed",
                )
            )
        ).one()
    assert (row.outcome, row.reason) == ("REFUSED", "CREDENTIALS_WRONG")


@pytest.mark.parametrize("new", ["password", "Qwertyuiop"])
async def test_rejects_common_passwords(services: Services, new: str):
    signed_up = await services.sign_up()
    outcome = await refused(change(services, signed_up.access_token, new=new))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "PASSWORD_COMMON")


async def test_guesses_count_like_those_at_sign_in(services: Services):
    signed_up = await services.sign_up()
    metadata = from_elsewhere(signed_up.access_token)
    request = ChangePasswordRequest(current_password="not the password", new_password=NEW)
    for _ in range(6):
        assert await refused(services.accounts.ChangePassword(request, metadata=metadata)) == WRONG
    assert await refused(services.accounts.ChangePassword(request, metadata=metadata)) == DELAYED
    signing_in = services.auth.SignIn(
        SignInRequest(email=signed_up.user.email, password=PASSWORD), metadata=metadata[:1]
    )
    assert await refused(signing_in) == DELAYED
    await services.sign_in(signed_up.user.email)  # from elsewhere


async def test_links_to_reset_the_password_are_void(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    await services.accounts.RequestPasswordReset(
        RequestPasswordResetRequest(email=email), metadata=from_elsewhere()
    )
    token = await mailbox.token(email, "reset-password")
    await change(services, signed_up.access_token)
    resetting = services.accounts.ResetPassword(
        ResetPasswordRequest(token=token, new_password=PASSWORD), metadata=from_elsewhere()
    )
    assert await refused(resetting) == (grpc.StatusCode.UNAUTHENTICATED, "LINK_INVALID")


async def test_of_many_changes_at_once_one_counts(services: Services):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    tokens = [signed_up.access_token]
    tokens += [(await services.sign_in(email)).access_token for _ in range(3)]
    passwords = [f"passphrase number {n}" for n in range(4)]
    outcomes = await asyncio.gather(
        *(change(services, token, new=password) for token, password in zip(tokens, passwords, strict=True)),
        return_exceptions=True,
    )
    (right,) = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, ChangePasswordResponse)]
    await services.sign_in(email, passwords[right])
