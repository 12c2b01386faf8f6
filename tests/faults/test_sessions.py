"""Sessions while parts are away: no second successor of a refresh token, and no token that outlives its session."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from redis.asyncio import Redis
from sqlalchemy import select

from services.auth_svc.models import AuditEntryRow
from services.chassis import db
from tests.conditions import eventually
from tests.faults.conftest import newcomer
from tests.mesh.people import Answer, Person
from tests.parts import Mesh
from tests.security.forging import auth_settings_of, claims_of
from tests.security.ways import assert_ended, ways_into

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

REFRESH = "/v1/auth:refresh"


async def crash(mesh: Mesh) -> None:
    """Kills auth_svc, and waits until it is back."""
    restarts = mesh.supervisor.children["auth_svc"].restarts
    mesh.supervisor.kill("auth_svc")
    await mesh.supervisor.until_ready("auth_svc", restarts=restarts + 1)


async def forget(mesh: Mesh) -> None:
    """Empties Valkey."""
    redis = Redis.from_url(auth_settings_of(mesh).redis_url)
    await redis.flushall()
    await redis.aclose()


async def refresh(person: Person, token: str, key: str = "") -> Answer:
    """The answer to a refresh, once auth_svc can be reached."""
    body = {"refreshToken": token, "refreshKey": key}
    found: list[Answer] = []

    async def answered() -> bool:
        found[:] = [await person.call("POST", REFRESH, body)]
        return found[0].status != 503

    await eventually(answered, 60)
    return found[0]


async def storm(person: Person, token: str, key: str = "") -> list[Answer]:
    """Many refreshes at once, of the same token."""
    return await asyncio.gather(*(refresh(person, token, key) for _ in range(100)))


@pytest.mark.parametrize("break_it", [crash, forget])
async def test_a_token_has_one_successor_whatever_breaks(fragile: Mesh, ann: Person, break_it):
    first, key = ann.account["refreshToken"], ann.account["refreshKey"]
    before = await refresh(ann, first)
    await break_it(fragile)
    # The answer before the break was lost: with the key, the same again.
    answers = await storm(ann, first, key)
    assert {answer.status for answer in answers} == {200}
    (second,) = {answer.body["refreshToken"] for answer in answers}
    assert second == before.body["refreshToken"]

    await break_it(fragile)
    answers = await storm(ann, second)
    (winner,) = (answer for answer in answers if answer.status == 200)
    refused = [answer for answer in answers if answer.status != 200]
    assert {(answer.status, answer.reason) for answer in refused} == {(409, "REFRESH_TOKEN_SUPERSEDED")}
    third = winner.body["refreshToken"]

    fourth = (await refresh(ann, third, key)).body
    ann.headers["authorization"] = f"Bearer {fourth['accessToken']}"
    assert (await ann.call("GET", "/v1/users/me")).status == 200, "the family lives"

    answer = await refresh(ann, first, key)
    assert (answer.status, answer.reason) == (401, "REFRESH_TOKEN_REUSED")
    answer = await refresh(ann, fourth["refreshToken"], key)
    assert (answer.status, answer.reason) == (401, "REFRESH_TOKEN_INVALID")

    async def out() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 401

    await eventually(out, 60)
    sessions = db.connect(auth_settings_of(fragile).postgres_url)
    async with sessions() as session:
        ended = select(AuditEntryRow).where(
            AuditEntryRow.kind == "session.ended",
            AuditEntryRow.session_id == claims_of(ann.account["accessToken"])["sid"],
        )
        (entry,) = (await session.scalars(ended)).all()
    await db.engine(sessions).dispose()
    assert entry.details["cause"] == "REFRESH_TOKEN_REUSED"


async def test_a_crash_in_the_middle_gives_no_second_successor(fragile: Mesh, ann: Person):
    first, key = ann.account["refreshToken"], ann.account["refreshKey"]
    under_way = asyncio.gather(storm(ann, first, key), return_exceptions=True)
    await crash(fragile)
    (outcome,) = await under_way
    assert not isinstance(outcome, BaseException), outcome
    assert {answer.status for answer in outcome} == {200}
    (second,) = {answer.body["refreshToken"] for answer in outcome}
    assert (await refresh(ann, second, key)).status == 200


async def test_without_nats_an_ended_session_is_refused_on_every_way(
    fragile: Mesh, ann: Person, http: aiohttp.ClientSession
):
    async with ways_into(fragile) as ways:
        await fragile.supervisor.stop("nats")
        try:
            # Without announcements all ask auth_svc, which some have not met again since its crash.
            await eventually(lambda: all_answer(ann), 60)
            await assert_ended(ways, ann)
        finally:
            await fragile.supervisor.start("nats")
    await newcomer(http, fragile.gateway_url)  # everything works again


async def all_answer(person: Person) -> bool:
    paths = ("/v1/users/me", "/v1/dashboards", "/v1/sources", "/v1/auth/sessions")
    answers = await asyncio.gather(*(person.call("GET", path) for path in paths))
    return all(answer.status == 200 for answer in answers)
