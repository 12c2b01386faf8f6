import asyncio
from pathlib import Path

import grpc
import pytest
from meshboard.auth.v1.auth_service_pb2 import SignInRequest, SignUpRequest
from meshboard.auth.v1.events_pb2 import AccountCreated, SignedIn
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import func, select

from services.auth_svc.models import Account
from services.chassis.db import OutboxRow
from services.user_svc.__main__ import serve as serve_user
from services.user_svc.models import User
from tests.auth_svc.conftest import (
    PASSWORD,
    Services,
    bearer,
    connected,
    make_both,
    new_email,
    running,
    running_auth,
)
from tests.harness import make_keys, refused
from tests.parts import Parts

TAKEN = (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")


async def test_gives_tokens_that_work_elsewhere(services: Services):
    email = new_email()
    signed_up = await services.sign_up(email)
    assert signed_up.expires_in_seconds == 600
    assert signed_up.refresh_token.startswith("mbr_")
    assert signed_up.refresh_key.startswith("mbk_")
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
    assert me.user == signed_up.user
    assert me.user.email == email


async def test_emits_that_the_account_is_there_and_signed_in(services: Services):
    signed_up = await services.sign_up()
    async with services.sessions() as session:
        rows = (await session.scalars(select(OutboxRow))).all()
    created = AccountCreated(user_id=signed_up.user.user_id).SerializeToString()
    assert created in [row.payload for row in rows if row.subject == AccountCreated.DESCRIPTOR.full_name]
    begun = [SignedIn.FromString(r.payload) for r in rows if r.subject == SignedIn.DESCRIPTOR.full_name]
    (event,) = [event for event in begun if event.user_id == signed_up.user.user_id]
    assert event.workspace_id == signed_up.workspace.workspace_id


async def test_rejects_a_taken_address_in_any_spelling(services: Services):
    email = new_email()
    await services.sign_up(email)
    for spelling in (email, email.upper()):
        assert await refused(services.sign_up(spelling)) == TAKEN
        assert await refused(services.sign_up(spelling, "another passphrase")) == TAKEN


async def test_one_address_has_one_account_however_many_sign_up_at_once(services: Services):
    email = new_email()
    outcomes = await asyncio.gather(*(services.sign_up(email) for _ in range(6)), return_exceptions=True)
    people = {outcome.user.user_id for outcome in outcomes if not isinstance(outcome, BaseException)}
    assert len(people) == 1
    async with services.user_sessions() as session:
        assert await session.scalar(select(func.count()).where(User.email == email)) == 1


@pytest.mark.parametrize("password", ["password", "PassWord", "qwertyuiop", "1234567890"])
async def test_rejects_common_passwords(services: Services, password: str):
    outcome = await refused(services.sign_up(password=password))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "PASSWORD_COMMON")


@pytest.mark.parametrize(
    "request_",
    [
        SignUpRequest(email="nobody", password=PASSWORD, display_name="A"),
        SignUpRequest(email="a@example.org", password="short", display_name="A"),
        SignUpRequest(email="a@example.org", password="x" * 129, display_name="A"),
        SignUpRequest(email="a@example.org", password=PASSWORD),
    ],
)
async def test_rejects_what_breaks_a_rule(services: Services, request_: SignUpRequest):
    outcome = await refused(services.auth.SignUp(request_))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_resumes_after_user_svc_was_away(parts: Parts, tmp_path: Path):
    keys = make_keys(tmp_path / "keys")
    auth, user = await make_both(parts, keys)
    email = new_email()
    async with running_auth(auth), connected(auth, user, keys) as services:
        async with running(serve_user, user):
            await services.sign_up()
        assert await refused(services.sign_up(email)) == (
            grpc.StatusCode.UNAVAILABLE,
            "DEPENDENCY_UNAVAILABLE",
        )
        # Until it is finished there is no account to sign in to, and no one else gets at it.
        signing_in = services.auth.SignIn(SignInRequest(email=email, password=PASSWORD))
        assert await refused(signing_in) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
        assert await refused(services.sign_up(email, "another passphrase")) == TAKEN

        async with running(serve_user, user):
            async with services.sessions() as session:
                pending = await session.scalar(select(Account).where(Account.email == email))
            signed_up = await services.sign_up_when_user_svc_is_back(email)
            assert pending is not None
            assert signed_up.user.user_id == pending.user_id
            assert signed_up.workspace.workspace_id == pending.workspace_id
            me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
            assert me.user.email == email
            assert await refused(services.sign_up(email)) == TAKEN
