import asyncio
from datetime import timedelta

import grpc
import pytest
from meshboard.auth.v1.account_service_pb2 import (
    ChangeEmailRequest,
    ConfirmEmailChangeRequest,
    ConfirmEmailChangeResponse,
    GetAccountRequest,
    RequestPasswordResetRequest,
    ResetPasswordRequest,
    VerifyEmailRequest,
)
from meshboard.auth.v1.auth_service_pb2 import SignUpResponse
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, update

from services.auth_svc.models import AuditEntryRow, EmailChange, Ticket
from tests.auth_svc.conftest import Services, bearer, from_elsewhere, new_email
from tests.auth_svc.work import work_of
from tests.conditions import eventually
from tests.harness import refused
from tests.mailbox import Mailbox

LINK_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "LINK_INVALID")
TAKEN = (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
LINKS = ("approve-email", "confirm-email")


async def change(services: Services, signed_up: SignUpResponse, new: str) -> None:
    await services.accounts.ChangeEmail(
        ChangeEmailRequest(new_email=new), metadata=from_elsewhere(signed_up.access_token)
    )


async def links_of(mailbox: Mailbox, old: str, new: str) -> tuple[str, str]:
    """The tokens of the two links: to approve, and to confirm."""
    return await mailbox.token(old, LINKS[0]), await mailbox.token(new, LINKS[1])


async def redeem(services: Services, token: str) -> ConfirmEmailChangeResponse:
    return await services.accounts.ConfirmEmailChange(
        ConfirmEmailChangeRequest(token=token), metadata=from_elsewhere()
    )


async def new_email_of(services: Services, signed_up: SignUpResponse) -> str:
    answer = await services.accounts.GetAccount(GetAccountRequest(), metadata=bearer(signed_up.access_token))
    return answer.account.new_email


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_changes_the_address_when_both_links_are_redeemed(
    services: Services, mailbox: Mailbox, order: tuple[int, int]
):
    signed_up, new = await services.sign_up(), new_email()
    old = signed_up.user.email
    # What user_svc remembers of the person is to be forgotten.
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
    assert me.user.email == old
    await change(services, signed_up, new)
    tokens = await links_of(mailbox, old, new)
    assert new in mailbox.of(old, "Approve")[0].get_content()
    assert await new_email_of(services, signed_up) == new

    assert not (await redeem(services, tokens[order[0]])).changed
    assert await refused(redeem(services, tokens[order[0]])) == LINK_INVALID
    await services.sign_in(old)
    assert (await redeem(services, tokens[order[1]])).changed
    assert await refused(redeem(services, tokens[order[1]])) == LINK_INVALID

    await services.sign_in(new)
    assert await refused(services.sign_in(old)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
    answer = await services.accounts.GetAccount(GetAccountRequest(), metadata=bearer(signed_up.access_token))
    assert (answer.account.email, answer.account.email_verified) == (new, True)
    assert answer.account.new_email == ""
    await mailbox.mail(old, "The address of your account was changed")

    async def user_svc_shows_it() -> bool:
        me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
        return bool(me.user.email == new and me.user.etag == "2")

    await eventually(user_svc_shows_it)


async def test_is_in_the_audit_log_without_addresses(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    await change(services, signed_up, new)
    for token in await links_of(mailbox, signed_up.user.email, new):
        await redeem(services, token)
    async with services.sessions() as session:
        rows = (
            await session.scalars(
                select(AuditEntryRow)
                .where(AuditEntryRow.subject_id == signed_up.user.user_id)
                .order_by(AuditEntryRow.audit_entry_id)
            )
        ).all()
    # What user_svc tells comes in between.
    assert [row.kind for row in rows if row.kind.startswith("email")] == [
        "email_change.requested",
        "email_change.approved",
        "email_change.confirmed",
        "email.changed",
    ]
    assert not [row for row in rows if "@" in str(row.details)]


async def test_a_later_change_replaces_an_earlier_one(services: Services, mailbox: Mailbox):
    signed_up, first, second = await services.sign_up(), new_email(), new_email()
    old = signed_up.user.email
    await change(services, signed_up, first)
    superseded = await links_of(mailbox, old, first)
    await redeem(services, superseded[0])
    await change(services, signed_up, second)
    assert await refused(redeem(services, superseded[1])) == LINK_INVALID
    # What was approved for the first address does not count for the second one.
    assert not (await redeem(services, await mailbox.token(second, LINKS[1]))).changed
    assert (await redeem(services, await mailbox.token(old, LINKS[0], count=2))).changed
    await services.sign_in(second)


async def test_both_links_at_once_change_it_once(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    await change(services, signed_up, new)
    tokens = await links_of(mailbox, signed_up.user.email, new)
    outcomes = await asyncio.gather(
        *(redeem(services, token) for token in tokens * 10), return_exceptions=True
    )
    answers = [each.changed for each in outcomes if isinstance(each, ConfirmEmailChangeResponse)]
    assert sorted(answers) == [False, True]


async def test_links_are_for_this_purpose_alone(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    await change(services, signed_up, new)
    verify = await mailbox.token(signed_up.user.email, "verify-email")
    assert await refused(redeem(services, verify)) == LINK_INVALID
    for token in await links_of(mailbox, signed_up.user.email, new):
        verifying = services.accounts.VerifyEmail(VerifyEmailRequest(token=token), metadata=from_elsewhere())
        assert await refused(verifying) == LINK_INVALID
        resetting = services.accounts.ResetPassword(
            ResetPasswordRequest(token=token, new_password="another good passphrase"),
            metadata=from_elsewhere(),
        )
        assert await refused(resetting) == LINK_INVALID
        await redeem(services, token)


async def test_links_end_after_a_day(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    await change(services, signed_up, new)
    tokens = await links_of(mailbox, signed_up.user.email, new)
    mine = (Ticket.user_id == signed_up.user.user_id, Ticket.purpose.in_(LINKS))
    async with services.sessions.begin() as session:
        tickets = (await session.scalars(select(Ticket).where(*mine))).all()
        assert {ticket.expire_time - ticket.create_time for ticket in tickets} == {timedelta(days=1)}
        aged = {"expire_time": Ticket.expire_time - timedelta(days=1, seconds=1)}
        await session.execute(update(Ticket).where(*mine).values(**aged))
        await session.execute(
            update(EmailChange)
            .where(EmailChange.user_id == signed_up.user.user_id)
            .values(create_time=EmailChange.create_time - timedelta(days=1, seconds=1))
        )
    for token in tokens:
        assert await refused(redeem(services, token)) == LINK_INVALID
    assert await new_email_of(services, signed_up) == ""


async def test_does_not_tell_that_an_address_is_taken(services: Services, mailbox: Mailbox):
    signed_up, taken, new = await services.sign_up(), (await services.sign_up()).user.email, new_email()
    # The first call with a token after the start, or after NATS was away, asks which sessions have ended.
    await new_email_of(services, signed_up)
    async with work_of(services) as for_new:
        await change(services, signed_up, new)
    async with work_of(services) as for_taken:
        await change(services, signed_up, taken.upper())
    assert for_taken == for_new
    assert for_taken.statements
    assert await new_email_of(services, signed_up) == taken.upper()
    await mailbox.mail(taken.upper(), "Your address has a Meshboard account already")
    approve = await mailbox.token(signed_up.user.email, LINKS[0], count=2)
    assert not (await redeem(services, approve)).changed
    assert not [mail for mail in mailbox.of(taken.upper()) if "confirm-email" in mail.get_content()]


async def test_an_address_that_got_an_account_meanwhile_is_refused(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    await change(services, signed_up, new)
    approve, confirm = await links_of(mailbox, signed_up.user.email, new)
    await redeem(services, approve)
    await services.sign_up(new.upper())
    assert await refused(redeem(services, confirm)) == TAKEN
    await services.sign_in(signed_up.user.email)


async def test_of_two_accounts_that_want_an_address_one_gets_it(services: Services, mailbox: Mailbox):
    people, new = [await services.sign_up() for _ in range(2)], new_email()
    for number, person in enumerate(people, 1):
        await change(services, person, new)
        await redeem(services, await mailbox.token(person.user.email, LINKS[0]))
        await mailbox.token(new, LINKS[1], count=number)
    tokens = [await mailbox.token(new, LINKS[1], count=number) for number in (1, 2)]
    outcomes = await asyncio.gather(*(redeem(services, token) for token in tokens), return_exceptions=True)
    assert len([each for each in outcomes if isinstance(each, ConfirmEmailChangeResponse)]) == 1
    await services.sign_in(new)


async def test_links_to_the_former_address_are_void(services: Services, mailbox: Mailbox):
    signed_up, new = await services.sign_up(), new_email()
    old = signed_up.user.email
    await services.accounts.RequestPasswordReset(
        RequestPasswordResetRequest(email=old), metadata=from_elsewhere()
    )
    reset = await mailbox.token(old, "reset-password")
    verify = await mailbox.token(old, "verify-email")
    await change(services, signed_up, new)
    for token in await links_of(mailbox, old, new):
        await redeem(services, token)
    resetting = services.accounts.ResetPassword(
        ResetPasswordRequest(token=reset, new_password="another good passphrase"), metadata=from_elsewhere()
    )
    assert await refused(resetting) == LINK_INVALID
    verifying = services.accounts.VerifyEmail(VerifyEmailRequest(token=verify), metadata=from_elsewhere())
    assert await refused(verifying) == LINK_INVALID


async def test_many_mails_to_one_address_are_delayed(services: Services):
    signed_up, new = await services.sign_up(), new_email()
    metadata = from_elsewhere(signed_up.access_token)

    async def ask() -> None:
        await services.accounts.ChangeEmail(ChangeEmailRequest(new_email=new), metadata=metadata)

    for _ in range(6):
        await ask()
    assert await refused(ask()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")
