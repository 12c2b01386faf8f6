import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from meshboard.auth.v1.account_service_pb2 import (
    GetAccountRequest,
    SendVerificationRequest,
    VerifyEmailRequest,
    VerifyEmailResponse,
)
from meshboard.auth.v1.auth_service_pb2 import SignUpResponse
from meshboard.auth.v1.events_pb2 import AccountCreated, EmailVerified
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import func, select, update

from services.auth_svc.models import Account, Ticket
from services.chassis.db import OutboxRow
from services.user_svc.__main__ import serve as serve_user
from services.user_svc.models import User
from tests.auth_svc.conftest import (
    PASSWORD,
    Services,
    bearer,
    connected,
    from_elsewhere,
    make_both,
    new_email,
    running,
    running_auth,
)
from tests.auth_svc.work import work_of
from tests.harness import ISSUER, make_keys, refused
from tests.mailbox import Mailbox
from tests.parts import Parts

LINK_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "LINK_INVALID")
TAKEN = (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")


@pytest.fixture(scope="module")
async def strict(
    parts: Parts, tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox
) -> AsyncIterator[Services]:
    """Both services, where an account begins with its mailed link."""
    keys = make_keys(tmp_path_factory.mktemp("strict-keys"))
    auth, user = await make_both(parts, keys, smtp_url=mailbox.url, require_verified_email=True)
    async with running(serve_user, user), running_auth(auth), connected(auth, user, keys) as both:
        yield both


async def verify(
    services: Services, token: str, *, cookies: bool = False, **headers: str
) -> VerifyEmailResponse:
    return await services.accounts.VerifyEmail(
        VerifyEmailRequest(token=token, cookies=cookies),
        metadata=(*from_elsewhere(), *headers.items()),
    )


async def events_of(services: Services, user_id: str, kind: type[EmailVerified]) -> list[EmailVerified]:
    async with services.sessions() as session:
        rows = await session.scalars(select(OutboxRow).where(OutboxRow.subject == kind.DESCRIPTOR.full_name))
        events = [kind.FromString(row.payload) for row in rows]
    return [event for event in events if event.user_id == user_id]


async def is_verified(services: Services, access_token: str) -> bool:
    answer = await services.accounts.GetAccount(GetAccountRequest(), metadata=from_elsewhere(access_token))
    return answer.account.email_verified


# --- a link that verifies -----------------------------------------------------------------------------------


async def test_verifies_the_address_once(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    token = await mailbox.token(email, "verify-email")
    assert not await is_verified(services, signed_up.access_token)
    assert await verify(services, token) == VerifyEmailResponse()
    assert await is_verified(services, signed_up.access_token)
    assert await refused(verify(services, token)) == LINK_INVALID
    (event,) = await events_of(services, signed_up.user.user_id, EmailVerified)
    assert event.email == email


async def test_verifies_its_own_account_alone(services: Services, mailbox: Mailbox):
    one, other = await services.sign_up(), await services.sign_up()
    await verify(services, await mailbox.token(one.user.email, "verify-email"))
    assert not await is_verified(services, other.access_token)


async def test_a_link_ends_after_a_day(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    token = await mailbox.token(signed_up.user.email, "verify-email")
    mine = Ticket.user_id == signed_up.user.user_id
    async with services.sessions.begin() as session:
        ticket = (await session.scalars(select(Ticket).where(mine))).one()
        assert ticket.expire_time - ticket.create_time == timedelta(days=1)
        await session.execute(
            update(Ticket).where(mine).values(expire_time=Ticket.expire_time - timedelta(days=1, seconds=1))
        )
    assert await refused(verify(services, token)) == LINK_INVALID


async def test_unknown_links_are_refused(services: Services):
    assert await refused(verify(services, "mbt_" + "A" * 43)) == LINK_INVALID


# --- asking for another mail --------------------------------------------------------------------------------


async def send(services: Services, signed_up: SignUpResponse) -> None:
    await services.accounts.SendVerification(
        SendVerificationRequest(), metadata=bearer(signed_up.access_token)
    )


async def let_a_minute_pass(services: Services, user_id: str) -> None:
    async with services.sessions.begin() as session:
        await session.execute(
            update(Ticket)
            .where(Ticket.user_id == user_id)
            .values(create_time=Ticket.create_time - timedelta(seconds=60))
        )


async def test_mails_another_link_after_a_minute(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    first = await mailbox.token(email, "verify-email")
    delayed = (grpc.StatusCode.RESOURCE_EXHAUSTED, "MAIL_DELAYED")
    assert await refused(send(services, signed_up)) == delayed
    await let_a_minute_pass(services, signed_up.user.user_id)
    await send(services, signed_up)
    assert await refused(send(services, signed_up)) == delayed
    second = await mailbox.token(email, "verify-email", count=2)
    assert await refused(verify(services, first)) == LINK_INVALID
    await verify(services, second)


async def test_mails_nothing_to_a_verified_address(services: Services, mailbox: Mailbox):
    signed_up = await services.sign_up()
    await verify(services, await mailbox.token(signed_up.user.email, "verify-email"))
    for _ in range(2):
        await send(services, signed_up)
    assert len(mailbox.of(signed_up.user.email)) == 1


# --- a link that signs up -----------------------------------------------------------------------------------


async def test_the_link_makes_the_account_and_signs_it_in(strict: Services, mailbox: Mailbox):
    email = new_email()
    assert await strict.sign_up(email) == SignUpResponse()
    signing_in = strict.sign_in(email)
    assert await refused(signing_in) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
    token = await mailbox.token(email, "sign-up")
    verified = await verify(strict, token)
    me = await strict.users.GetMe(GetMeRequest(), metadata=bearer(verified.access_token))
    assert me.user == verified.user
    assert (me.user.email, verified.workspace.title) == (email, "Ada's workspace")
    assert verified.device_token
    assert await is_verified(strict, verified.access_token)
    assert len(await events_of(strict, me.user.user_id, EmailVerified)) == 1
    await strict.sign_in(email)
    assert await refused(verify(strict, token)) == LINK_INVALID


async def test_cookies_are_for_pages_of_ours(strict: Services, mailbox: Mailbox):
    email = new_email()
    await strict.sign_up(email)
    token = await mailbox.token(email, "sign-up")
    outcome = await refused(verify(strict, token, cookies=True, origin="https://elsewhere.example"))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "ORIGIN_REFUSED")
    call = strict.accounts.VerifyEmail(
        VerifyEmailRequest(token=token, cookies=True), metadata=(*from_elsewhere(), ("origin", ISSUER))
    )
    verified = await call
    assert verified.user.email == email
    assert (verified.access_token, verified.refresh_token, verified.device_token) == ("", "", "")
    cookies = [str(value) for key, value in await call.initial_metadata() if key == "set-cookie"]
    assert [cookie.partition("=")[0] for cookie in cookies] == [
        "mb_session",
        "mb_refresh",
        "mb_refresh_key",
        "mb_device",
    ]
    assert all("HttpOnly" in cookie for cookie in cookies)


async def test_one_link_makes_one_account_however_many_try_at_once(strict: Services, mailbox: Mailbox):
    email = new_email()
    await strict.sign_up(email)
    token = await mailbox.token(email, "sign-up")
    outcomes = await asyncio.gather(*(verify(strict, token) for _ in range(20)), return_exceptions=True)
    assert len([each for each in outcomes if isinstance(each, VerifyEmailResponse)]) == 1
    async with strict.user_sessions() as session:
        assert await session.scalar(select(func.count()).where(User.email == email)) == 1


async def test_of_two_links_to_one_address_the_first_one_counts(strict: Services, mailbox: Mailbox):
    email = new_email()
    await strict.sign_up(email)
    first = await mailbox.token(email, "sign-up")
    await strict.sign_up(email, "another passphrase")
    second = await mailbox.token(email, "sign-up", count=2)
    await verify(strict, first)
    assert await refused(verify(strict, second)) == TAKEN
    await strict.sign_in(email)


async def test_the_answer_to_a_taken_address_is_the_same_at_the_same_cost(strict: Services, mailbox: Mailbox):
    taken, new = new_email(), new_email()
    await strict.sign_up(taken)
    await verify(strict, await mailbox.token(taken, "sign-up"))
    async with work_of(strict) as for_taken:
        answer_to_taken = await strict.sign_up(taken)
    async with work_of(strict) as for_new:
        answer_to_new = await strict.sign_up(new)
    assert answer_to_taken == answer_to_new == SignUpResponse()
    assert for_taken == for_new
    assert for_taken.hashes == 1
    assert for_taken.statements
    await mailbox.mail(taken, "You have a Meshboard account already")
    await mailbox.token(new, "sign-up")


async def test_a_link_works_until_the_account_is_there(parts: Parts, tmp_path: Path, mailbox: Mailbox):
    keys = make_keys(tmp_path / "keys")
    auth, user = await make_both(parts, keys, smtp_url=mailbox.url, require_verified_email=True)
    email = new_email()
    async with running_auth(auth), connected(auth, user, keys) as services:
        await services.sign_up(email)
        token = await mailbox.token(email, "sign-up")
        for _ in range(2):
            assert await refused(verify(services, token)) == (
                grpc.StatusCode.UNAVAILABLE,
                "DEPENDENCY_UNAVAILABLE",
            )
        async with services.sessions() as session:
            pending = (await session.scalars(select(Account).where(Account.email == email))).one()
        assert pending.activate_time is None
        # Another link to the address does not get hold of it.
        await services.sign_up(email, "another passphrase")
        other = await mailbox.token(email, "sign-up", count=2)
        assert await refused(verify(services, other)) == TAKEN

        async with running(serve_user, user):
            verified = await when_user_svc_is_back(services, token)
            assert verified.user.user_id == pending.user_id
            assert verified.workspace.workspace_id == pending.workspace_id
            await services.sign_in(email, PASSWORD)
            assert await refused(verify(services, token)) == LINK_INVALID
            assert len(await events_of(services, pending.user_id, AccountCreated)) == 1  # type: ignore[arg-type]


async def when_user_svc_is_back(services: Services, token: str) -> VerifyEmailResponse:
    async with asyncio.timeout(20):
        while True:
            try:
                return await verify(services, token)
            except grpc.aio.AioRpcError as failure:
                if failure.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
