import asyncio
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import pytest
from argon2 import PasswordHasher
from google.rpc import error_details_pb2
from meshboard.auth.v1.auth_service_pb2 import SignInRequest, SignInResponse
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from redis.asyncio import Redis
from sqlalchemy import literal, select, text, update

from services.auth_svc.guesses import Guesses
from services.auth_svc.models import Account, AuditEntryRow, Session
from services.auth_svc.origins import Origin
from services.chassis import errors
from tests.auth_svc.conftest import PASSWORD, Services, bearer, new_email
from tests.conditions import eventually
from tests.harness import reason_of, refused, status_of

WRONG = (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
DELAYED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


async def sign_in(
    services: Services, email: str, password: str = PASSWORD, address: str = "192.0.2.1"
) -> SignInResponse:
    return await services.auth.SignIn(
        SignInRequest(email=email, password=password), metadata=(("x-meshboard-address", address),)
    )


async def test_gives_the_person_the_workspace_and_tokens(services: Services):
    email = new_email()
    signed_up = await services.sign_up(email)
    signed_in = await sign_in(services, email.upper())
    assert (signed_in.user, signed_in.workspace) == (signed_up.user, signed_up.workspace)
    assert signed_in.refresh_token != signed_up.refresh_token
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_in.access_token))
    assert me.user == signed_up.user


async def test_answers_alike_for_unknown_addresses_and_wrong_passwords(services: Services):
    email = new_email()
    await services.sign_up(email)
    statuses = []
    for wrong in (sign_in(services, email, "not the password"), sign_in(services, new_email())):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await wrong
        assert (failure.value.code(), reason_of(failure.value)) == WRONG
        statuses.append(status_of(failure.value))
    assert statuses[0] == statuses[1]


async def test_delays_repeated_failures_for_that_account_and_address_alone(services: Services):
    email, other = new_email(), new_email()
    await services.sign_up(email)
    await services.sign_up(other)
    for _ in range(6):
        assert await refused(sign_in(services, email, "not the password")) == WRONG
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await sign_in(services, email)
    assert (failure.value.code(), reason_of(failure.value)) == DELAYED
    details = status_of(failure.value).details
    (retry,) = [detail for detail in details if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)]
    delay = error_details_pb2.RetryInfo.FromString(retry.value).retry_delay.ToMilliseconds()
    assert 0 < delay <= 1000
    await sign_in(services, email, address="192.0.2.2")
    await sign_in(services, other)

    async def let_in() -> bool:
        outcomes = await asyncio.gather(sign_in(services, email), return_exceptions=True)
        return isinstance(outcomes[0], SignInResponse)

    await eventually(let_in, seconds=10)
    # A success forgives: the next failure is free again.
    for _ in range(2):
        assert await refused(sign_in(services, email, "not the password")) == WRONG


async def test_delays_unknown_addresses_alike(services: Services):
    email = new_email()
    for _ in range(6):
        assert await refused(sign_in(services, email)) == WRONG
    outcome = await refused(sign_in(services, email))
    assert outcome == DELAYED


async def test_one_ipv6_network_is_one_address(services: Services):
    email = new_email()
    for n in range(6):
        assert await refused(sign_in(services, email, address=f"2001:db8::{n}")) == WRONG
    outcome = await refused(sign_in(services, email, address="2001:db8::ffff"))
    assert outcome == DELAYED
    assert await refused(sign_in(services, email, address="2001:db8:0:1::1")) == WRONG


async def test_successes_are_never_delayed(services: Services):
    email = new_email()
    await services.sign_up(email)
    await asyncio.gather(*(sign_in(services, email) for _ in range(12)))


async def test_comes_back_to_the_workspace_of_the_last_time(services: Services):
    email = new_email()
    signed_up = await services.sign_up(email)
    async with services.sessions() as session:
        account = await session.get_one(Account, signed_up.user.user_id)
    assert account.last_workspace_id == signed_up.workspace.workspace_id


async def test_hashes_anew_what_was_hashed_with_other_parameters(services: Services):
    signed_up = await services.sign_up()
    user_id = signed_up.user.user_id
    weaker = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD)
    async with services.sessions.begin() as session:
        await session.execute(update(Account).where(Account.user_id == user_id).values(password_hash=weaker))
    await sign_in(services, signed_up.user.email)
    async with services.sessions() as session:
        account = await session.get_one(Account, user_id)
    assert account.password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    await sign_in(services, signed_up.user.email)


async def test_a_password_that_is_changed_meanwhile_opens_nothing(services: Services):
    email = new_email()
    signed_up = await services.sign_up(email)
    async with services.user_sessions.begin() as held:
        # The sign-in has checked the password, and waits for user_svc.
        await held.execute(text("LOCK TABLE users IN ACCESS EXCLUSIVE MODE"))
        signing_in = asyncio.create_task(refused(sign_in(services, email)))

        async def waits() -> bool:
            async with services.user_sessions() as session:
                asking = await session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            return bool(asking)

        await eventually(waits)
        async with services.sessions.begin() as session:
            await session.execute(
                update(Account)
                .where(Account.user_id == signed_up.user.user_id)
                .values(password_hash=PasswordHasher(time_cost=1, memory_cost=64).hash("another one"))
            )
    assert await signing_in == WRONG


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("password_hash", "another", "CREDENTIALS_WRONG"),
        ("disable_time", datetime(2026, 1, 2, tzinfo=UTC), "ACCOUNT_DISABLED"),
    ],
)
async def test_what_is_refused_in_the_end_is_not_logged_as_done(
    services: Services, capfd: pytest.CaptureFixture[str], column: str, value: object, expected: str
):
    email = new_email()
    signed_up = await services.sign_up(email)
    capfd.readouterr()
    async with services.sessions.begin() as held:
        await held.execute(
            update(Account)
            .where(Account.user_id == signed_up.user.user_id)
            .values(**{column: literal(value)})
        )
        signing_in = asyncio.create_task(refused(sign_in(services, email)))

        async def waits() -> bool:
            async with services.sessions() as session:
                asking = await session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            return bool(asking)

        await eventually(waits)
    _, reason = await signing_in
    assert reason == expected
    output = capfd.readouterr().out
    (line,) = [line for line in output.splitlines() if "session.begun" in line]
    assert reason in line
    assert "DONE" not in line
    async with services.sessions() as session:
        sessions = await session.scalars(select(Session).where(Session.user_id == signed_up.user.user_id))
        assert len(sessions.all()) == 1
        entries = await session.scalars(
            select(AuditEntryRow.outcome).where(
                AuditEntryRow.kind == "session.begun", AuditEntryRow.subject_id == signed_up.user.user_id
            )
        )
        assert "REFUSED" in entries.all()


async def test_an_address_that_postgres_cannot_hold_is_the_callers_fault(services: Services):
    outcome = await refused(sign_in(services, "some\0body@example.org"))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_is_refused_while_failures_cannot_be_counted(services: Services, tmp_path: Path):
    away = Redis.from_url(f"unix://{tmp_path}/nobody.sock")
    guesses = Guesses(away, services.auth_settings, bytes(32))
    with pytest.raises(errors.Error) as failure:
        async with guesses.attempt("sign-in", "a", Origin("192.0.2.1")):
            raise AssertionError("a guess was let through")
    assert (failure.value.code, failure.value.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "DEPENDENCY_UNAVAILABLE",
    )
    await away.aclose()
