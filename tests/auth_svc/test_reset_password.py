import asyncio
from datetime import timedelta

import grpc
import pytest
from meshboard.auth.v1.account_service_pb2 import (
    GetAccountRequest,
    RequestPasswordResetRequest,
    ResetPasswordRequest,
    ResetPasswordResponse,
    VerifyEmailRequest,
)
from meshboard.auth.v1.auth_service_pb2 import SignUpResponse
from sqlalchemy import select, update

from services.auth_svc.models import Account, AuditEntryRow, Mail, Ticket
from tests.auth_svc.conftest import PASSWORD, Services, from_elsewhere, new_email
from tests.auth_svc.work import work_of
from tests.conditions import eventually
from tests.harness import outcome, refused
from tests.mailbox import Mailbox

NEW = "another good passphrase"
LINK_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "LINK_INVALID")
CREDENTIALS_WRONG = (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")


async def request(services: Services, email: str) -> None:
    await services.accounts.RequestPasswordReset(
        RequestPasswordResetRequest(email=email), metadata=from_elsewhere()
    )


async def reset(services: Services, token: str, password: str = NEW) -> ResetPasswordResponse:
    return await services.accounts.ResetPassword(
        ResetPasswordRequest(token=token, new_password=password), metadata=from_elsewhere()
    )


async def asked(services: Services, mailbox: Mailbox) -> tuple[SignUpResponse, str]:
    """Somebody who has asked for a new password, and the token of the link."""
    signed_up = await services.sign_up()
    await request(services, signed_up.user.email)
    return signed_up, await mailbox.token(signed_up.user.email, "reset-password")


async def test_sets_the_password_by_the_mailed_link(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    email = signed_up.user.email
    await reset(services, token)
    assert await refused(services.sign_in(email)) == CREDENTIALS_WRONG
    signed_in = await services.sign_in(email, NEW)
    await mailbox.mail(email, "Your password was changed")
    # The mail has arrived: the address is verified.
    answer = await services.accounts.GetAccount(
        GetAccountRequest(), metadata=from_elsewhere(signed_in.access_token)
    )
    assert answer.account.email_verified


async def test_ends_all_sessions(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    other = await services.sign_in(signed_up.user.email)
    await reset(services, token)
    for access_token in (signed_up.access_token, other.access_token):

        async def ended(access_token: str = access_token) -> bool:
            call = services.accounts.GetAccount(GetAccountRequest(), metadata=from_elsewhere(access_token))
            return await outcome(call) == (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")

        await eventually(ended)


async def test_a_link_works_once(services: Services, mailbox: Mailbox):
    _, token = await asked(services, mailbox)
    await reset(services, token)
    assert await refused(reset(services, token)) == LINK_INVALID


async def test_a_link_works_once_however_many_try_at_once(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    passwords = [f"passphrase number {n}" for n in range(20)]
    outcomes = await asyncio.gather(
        *(reset(services, token, password) for password in passwords), return_exceptions=True
    )
    (right,) = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, ResetPasswordResponse)]
    await services.sign_in(signed_up.user.email, passwords[right])


async def test_a_later_link_replaces_an_earlier_one(services: Services, mailbox: Mailbox):
    signed_up, first = await asked(services, mailbox)
    await request(services, signed_up.user.email)
    second = await mailbox.token(signed_up.user.email, "reset-password", count=2)
    assert await refused(reset(services, first)) == LINK_INVALID
    await reset(services, second)


async def test_a_link_is_for_its_account_alone(services: Services, mailbox: Mailbox):
    bystander = await services.sign_up()
    _, token = await asked(services, mailbox)
    await reset(services, token)
    await services.sign_in(bystander.user.email, PASSWORD)


async def test_a_link_is_for_its_purpose_alone(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    verify = await mailbox.token(signed_up.user.email, "verify-email")
    assert await refused(reset(services, verify)) == LINK_INVALID
    verifying = services.accounts.VerifyEmail(VerifyEmailRequest(token=token), metadata=from_elsewhere())
    assert await refused(verifying) == LINK_INVALID
    await reset(services, token)


async def test_a_link_ends_after_an_hour(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    user_id = signed_up.user.user_id
    mine = (Ticket.user_id == user_id, Ticket.purpose == "reset-password")
    async with services.sessions.begin() as session:
        ticket = (await session.scalars(select(Ticket).where(*mine))).one()
        assert ticket.expire_time - ticket.create_time == timedelta(hours=1)
        await session.execute(
            update(Ticket).where(*mine).values(expire_time=Ticket.expire_time - timedelta(hours=1, seconds=1))
        )
    assert await refused(reset(services, token)) == LINK_INVALID
    await services.sign_in(signed_up.user.email)


async def test_a_common_password_leaves_the_link_usable(services: Services, mailbox: Mailbox):
    _, token = await asked(services, mailbox)
    assert await refused(reset(services, token, "password")) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "PASSWORD_COMMON",
    )
    await reset(services, token)


async def test_a_disabled_account_stays_as_it_is(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    email = signed_up.user.email
    async with services.sessions.begin() as session:
        await session.execute(
            update(Account)
            .where(Account.user_id == signed_up.user.user_id)
            .values(disable_time=Account.create_time)
        )
    assert await refused(reset(services, token)) == LINK_INVALID
    await request(services, email)
    await eventually(lambda: no_mail_waits(services))
    assert len(mailbox.of(email, "Choose a new password")) == 1


async def no_mail_waits(services: Services) -> bool:
    async with services.sessions() as session:
        return (await session.scalar(select(Mail.mail_id).limit(1))) is None


async def test_asking_costs_the_same_for_an_unknown_address(services: Services, mailbox: Mailbox):
    known, unknown = (await services.sign_up()).user.email, new_email()
    await mailbox.token(known, "verify-email")
    async with work_of(services) as for_known:
        await request(services, known)
    async with work_of(services) as for_unknown:
        await request(services, unknown)
    assert for_known == for_unknown
    assert for_known.statements
    assert for_known.hashes == 0
    await mailbox.token(known, "reset-password")
    await eventually(lambda: no_mail_waits(services))
    assert mailbox.of(unknown) == []


@pytest.mark.parametrize("known", [True, False])
async def test_many_mails_to_one_address_are_delayed_alike(services: Services, known: bool):
    email = (await services.sign_up()).user.email if known else new_email()
    metadata = from_elsewhere()

    async def ask() -> None:
        await services.accounts.RequestPasswordReset(
            RequestPasswordResetRequest(email=email), metadata=metadata
        )

    for _ in range(6):
        await ask()
    assert await refused(ask()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")
    await request(services, email)  # from elsewhere


async def test_who_tries_many_links_is_slowed_down(services: Services):
    metadata = from_elsewhere()

    async def guess() -> object:
        return await services.accounts.ResetPassword(
            ResetPasswordRequest(token="mbt_guess", new_password=NEW), metadata=metadata
        )

    for _ in range(services.auth_settings.guess_free_failures_of_address + 1):
        assert await refused(guess()) == LINK_INVALID
    assert await refused(guess()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


async def test_is_in_the_audit_log(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    await reset(services, token)
    async with services.sessions() as session:
        rows = await session.scalars(
            select(AuditEntryRow)
            .where(AuditEntryRow.subject_id == signed_up.user.user_id)
            .order_by(AuditEntryRow.audit_entry_id)
        )
        entries = [(row.kind, row.outcome) for row in rows]
    assert entries[-2:] == [("password_reset.requested", "DONE"), ("password.reset", "DONE")]


async def test_a_sign_in_under_way_with_the_former_password_ends(services: Services, mailbox: Mailbox):
    signed_up, token = await asked(services, mailbox)
    user_id = signed_up.user.user_id
    async with services.sessions.begin() as session:
        await session.execute(
            update(Ticket)
            .where(Ticket.user_id == user_id, Ticket.purpose == "verify-email")
            .values(purpose="second-factor")
        )
    await reset(services, token)
    async with services.sessions() as session:
        assert (await session.scalars(select(Ticket).where(Ticket.user_id == user_id))).all() == []
