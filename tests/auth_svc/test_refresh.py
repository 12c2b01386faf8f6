import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, RefreshResponse, SignOutRequest
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, update

from services.auth_svc.models import AuditEntryRow, Session
from services.chassis.db import OutboxRow
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.conditions import eventually
from tests.harness import reason_of, refused

SUPERSEDED = (grpc.StatusCode.ABORTED, "REFRESH_TOKEN_SUPERSEDED")
REUSED = (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_REUSED")
INVALID = (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")


async def refresh(services: Services, token: str, key: str = "") -> RefreshResponse:
    return await services.auth.Refresh(RefreshRequest(refresh_token=token, refresh_key=key))


async def test_gives_new_tokens_that_work(services: Services):
    signed_up = await services.sign_up()
    token = signed_up.refresh_token
    for _ in range(4):
        answer = await refresh(services, token)
        assert answer.refresh_token != token
        assert answer.expires_in_seconds == 600
        me = await services.users.GetMe(GetMeRequest(), metadata=bearer(answer.access_token))
        assert me.user == signed_up.user
        token = answer.refresh_token


async def test_repeats_the_successor_for_who_has_the_key(services: Services):
    signed_up = await services.sign_up()
    first = await refresh(services, signed_up.refresh_token)
    again = await refresh(services, signed_up.refresh_token, signed_up.refresh_key)
    assert again.refresh_token == first.refresh_token
    await refresh(services, first.refresh_token)


async def test_without_the_key_it_fails_and_changes_nothing(services: Services):
    signed_up, other = await services.sign_up(), await services.sign_up()
    first = await refresh(services, signed_up.refresh_token)
    for key in ("", "mbk_wrong", other.refresh_key):
        assert await refused(refresh(services, signed_up.refresh_token, key)) == SUPERSEDED
    await refresh(services, first.refresh_token)


async def test_an_old_token_ends_the_session_everywhere(services: Services):
    signed_up = await services.sign_up()
    second = await refresh(services, signed_up.refresh_token)
    third = await refresh(services, second.refresh_token)
    # Once the successor was used, the key helps no more.
    outcome = await refused(refresh(services, signed_up.refresh_token, signed_up.refresh_key))
    assert outcome == REUSED
    for token in (third.refresh_token, second.refresh_token, signed_up.refresh_token):
        assert await refused(refresh(services, token, signed_up.refresh_key)) == INVALID

    async def ended() -> bool:
        try:
            await services.users.GetMe(GetMeRequest(), metadata=bearer(third.access_token))
        except grpc.aio.AioRpcError as failure:
            return failure.code() is grpc.StatusCode.UNAUTHENTICATED
        return False

    await eventually(ended, seconds=2)
    async with services.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject == SessionRevoked.DESCRIPTOR.full_name)
        )
        events = [SessionRevoked.FromString(row.payload) for row in rows]
    (event,) = [event for event in events if event.user_id == signed_up.user.user_id]
    assert event.reason == SessionRevoked.REFRESH_TOKEN_REUSED


async def test_the_other_sessions_of_the_person_live_on(services: Services):
    signed_up = await services.sign_up()
    other = await services.sign_in(signed_up.user.email)
    second = await refresh(services, signed_up.refresh_token)
    await refresh(services, second.refresh_token)
    assert await refused(refresh(services, signed_up.refresh_token)) == REUSED
    await refresh(services, other.refresh_token)


ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.long)])


@ROUNDS
async def test_many_at_once_with_the_key_get_one_successor(services: Services, rounds: int):
    signed_up = await services.sign_up()
    token = signed_up.refresh_token
    for _ in range(rounds):
        answers = await asyncio.gather(*(refresh(services, token, signed_up.refresh_key) for _ in range(100)))
        (successor,) = {answer.refresh_token for answer in answers}
        token = successor
    await refresh(services, token)


@ROUNDS
async def test_many_at_once_without_the_key_get_one_successor_too(services: Services, rounds: int):
    signed_up = await services.sign_up()
    token = signed_up.refresh_token
    for _ in range(rounds):
        outcomes = await asyncio.gather(
            *(refresh(services, token) for _ in range(100)), return_exceptions=True
        )
        (answer,) = [outcome for outcome in outcomes if isinstance(outcome, RefreshResponse)]
        failures = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {(failure.code(), reason_of(failure)) for failure in failures} == {SUPERSEDED}
        assert len(failures) == 99
        token = answer.refresh_token
    await refresh(services, token)


@ROUNDS
async def test_many_at_once_with_an_older_token_end_the_session_once(services: Services, rounds: int):
    for _ in range(rounds):
        signed_up = await services.sign_up()
        second = await refresh(services, signed_up.refresh_token)
        third = await refresh(services, second.refresh_token)
        outcomes = await asyncio.gather(
            *(refused(refresh(services, signed_up.refresh_token, signed_up.refresh_key)) for _ in range(10))
        )
        assert sorted(outcomes, key=str) == sorted([REUSED, *[INVALID] * 9], key=str)
        assert await refused(refresh(services, third.refresh_token)) == INVALID


async def test_many_sessions_at_once_get_a_successor_each(services: Services):
    signed_up = [await services.sign_up() for _ in range(8)]
    answers = await asyncio.gather(*(refresh(services, each.refresh_token) for each in signed_up))
    for each, answer in zip(signed_up, answers, strict=True):
        assert claims_of(answer.access_token)["sub"] == each.user.user_id
        await refresh(services, answer.refresh_token)


async def test_a_bad_token_hurts_none_that_comes_with_it(services: Services):
    good, used, ended = [await services.sign_up() for _ in range(3)]
    await refresh(services, used.refresh_token)
    await services.auth.SignOut(SignOutRequest(), metadata=bearer(ended.access_token))
    answer, *outcomes = await asyncio.gather(
        refresh(services, good.refresh_token),
        refused(refresh(services, used.refresh_token)),
        refused(refresh(services, ended.refresh_token)),
        refused(refresh(services, "mbr_" + "A" * 70)),
    )
    assert outcomes == [SUPERSEDED, INVALID, INVALID]
    await refresh(services, answer.refresh_token)


async def test_a_session_that_is_held_holds_up_no_other(services: Services):
    held, other = await services.sign_up(), await services.sign_up()
    session_id = claims_of(held.access_token)["sid"]
    async with services.sessions.begin() as session:
        await session.execute(select(Session).where(Session.session_id == session_id).with_for_update())
        waiting = asyncio.create_task(refresh(services, held.refresh_token))
        for _ in range(3):
            other_token = (await refresh(services, other.refresh_token)).refresh_token
            other.refresh_token = other_token
        assert not waiting.done()
    await refresh(services, (await waiting).refresh_token)


async def test_an_old_token_is_noted(services: Services):
    signed_up = await services.sign_up()
    second = await refresh(services, signed_up.refresh_token)
    await refresh(services, second.refresh_token)
    metadata = (("x-meshboard-address", "192.0.2.66"),)
    again = services.auth.Refresh(RefreshRequest(refresh_token=signed_up.refresh_token), metadata=metadata)
    assert await refused(again) == REUSED
    async with services.sessions() as session:
        entries = await session.scalars(
            select(AuditEntryRow).where(
                AuditEntryRow.kind == "session.ended", AuditEntryRow.subject_id == signed_up.user.user_id
            )
        )
        (entry,) = entries.all()
    assert entry.session_id == claims_of(signed_up.access_token)["sid"]
    assert entry.details["cause"] == "REFRESH_TOKEN_REUSED"
    assert (entry.outcome, entry.address) == ("DONE", "192.0.2.66")


@pytest.mark.parametrize("change", ["cut", "flip", "foreign", "prefix", "empty", "access"])
async def test_rejects_what_was_never_given(services: Services, change: str):
    signed_up = await services.sign_up()
    token = signed_up.refresh_token
    changed = {
        "cut": token[:-1],
        "flip": token[:10] + ("A" if token[10] != "A" else "B") + token[11:],
        "foreign": "mbr_" + "A" * 70,
        "prefix": token.removeprefix("mbr_"),
        "empty": "mbr_",
        "access": signed_up.access_token[:512],
    }[change]
    assert await refused(refresh(services, changed)) == INVALID
    await refresh(services, token)


async def test_a_session_lives_as_long_as_it_is_refreshed(services: Services):
    signed_up = await services.sign_up()
    session_id = claims_of(signed_up.access_token)["sid"]

    async def expire(time: datetime) -> None:
        async with services.sessions.begin() as session:
            await session.execute(
                update(Session).where(Session.session_id == session_id).values(expire_time=time)
            )

    await expire(datetime.now(UTC) + timedelta(minutes=1))
    second = await refresh(services, signed_up.refresh_token)
    async with services.sessions() as session:
        row = await session.get_one(Session, session_id)
    assert row.expire_time > datetime.now(UTC) + timedelta(days=29)

    await expire(datetime.now(UTC))
    assert await refused(refresh(services, second.refresh_token)) == INVALID
