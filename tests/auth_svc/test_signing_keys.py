import asyncio
import base64
import os
from collections.abc import Awaitable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc.aio
import jwt
import pytest
import structlog.testing
from meshboard.auth.v1.auth_service_pb2 import GetJwksRequest, RefreshRequest, SignOutRequest
from meshboard.auth.v1.events_pb2 import SigningKeyRetired
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.resealing import reseal
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import LastKey, SigningKeys
from services.chassis.bus import Bus
from services.chassis.db import OutboxRow
from tests.auth_svc.conftest import Services, bearer
from tests.conditions import eventually
from tests.harness import make_keys, reason_of

Sessions = async_sessionmaker[AsyncSession]
HOUR = timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


async def test_replicas_that_start_at_once_make_one_key(settings: AuthSettings, sessions: Sessions):
    replicas = [SigningKeys(sessions, settings, Clock()) for _ in range(5)]
    await asyncio.gather(*(replica.load() for replica in replicas))
    assert len({replica.current().key_id for replica in replicas}) == 1
    assert [len(await replica.public_keys()) for replica in replicas] == [1] * 5


async def test_a_key_is_known_before_it_signs_and_while_its_tokens_live(
    settings: AuthSettings, sessions: Sessions
):
    clock = Clock()
    keys = SigningKeys(sessions, settings, clock)
    await keys.load()
    first = keys.current().key_id

    clock.time += timedelta(seconds=settings.signing_key_seconds) - HOUR - timedelta(seconds=1)
    await keys.load()
    assert list(await keys.public_keys()) == [first]

    clock.time += timedelta(seconds=1)
    await keys.load()
    await keys.load()
    _, second = await keys.public_keys()
    assert keys.current().key_id == first

    clock.time += HOUR
    assert keys.current().key_id == second
    clock.time += timedelta(seconds=settings.access_token_seconds)
    await keys.load()
    assert list(await keys.public_keys()) == [first, second]

    clock.time += timedelta(seconds=5)
    await keys.load()
    assert list(await keys.public_keys()) == [second]
    assert keys.current().key_id == second


async def test_another_master_key_does_not_open_them(
    settings: AuthSettings, sessions: Sessions, tmp_path: Path
):
    await SigningKeys(sessions, settings, Clock()).load()
    other = settings.model_copy(update={"master_key_file": make_keys(tmp_path / "other") / "master.key"})
    with pytest.raises(RuntimeError, match="another master key"):
        await SigningKeys(sessions, other, Clock()).load()


async def test_a_sealed_key_holds_for_its_own_row_only(settings: AuthSettings, sessions: Sessions):
    await SigningKeys(sessions, settings, Clock()).load()
    async with sessions.begin() as session:
        await session.execute(text("UPDATE signing_keys SET key_id = 'moved'"))
    with pytest.raises(RuntimeError, match="another master key"):
        await SigningKeys(sessions, settings, Clock()).load()


async def test_an_operator_makes_the_next_key_once(settings: AuthSettings, sessions: Sessions):
    clock = Clock()
    keys, elsewhere = SigningKeys(sessions, settings, clock), SigningKeys(sessions, settings, clock)
    await keys.load()
    first = keys.current().key_id
    made = []
    for _ in range(2):
        async with sessions.begin() as session:
            made.append(await elsewhere.rotate(session))
    (second, is_new), repeated = made
    assert is_new
    assert repeated == (replace(second, private=repeated[0].private), False)
    assert second.activate_time == clock.time + HOUR
    await keys.load()
    assert list(await keys.public_keys()) == [first, second.key_id]
    assert keys.current().key_id == first
    clock.time += HOUR
    assert keys.current().key_id == second.key_id


async def test_a_retired_key_is_gone_and_its_successor_signs_at_once(
    settings: AuthSettings, sessions: Sessions
):
    clock = Clock()
    keys = SigningKeys(sessions, settings, clock)
    await keys.load()
    leaked = keys.current().key_id
    async with sessions.begin() as session:
        second, _ = await keys.rotate(session)
    async with sessions.begin() as session:
        successor = await keys.retire(session, leaked)
    assert successor is not None
    assert (successor.key_id, successor.activate_time) == (second.key_id, clock.time)
    await keys.load()
    assert keys.current().key_id == second.key_id
    assert list(await keys.public_keys()) == [second.key_id]
    async with sessions() as session:
        events = [
            SigningKeyRetired.FromString(row.payload) for row in await session.scalars(select(OutboxRow))
        ]
    assert events == [SigningKeyRetired(key_id=leaked)]


async def test_the_next_key_can_be_retired_too(settings: AuthSettings, sessions: Sessions):
    keys = SigningKeys(sessions, settings, Clock())
    await keys.load()
    first = keys.current().key_id
    async with sessions.begin() as session:
        second, _ = await keys.rotate(session)
    async with sessions.begin() as session:
        signs = await keys.retire(session, second.key_id)
    assert signs is not None
    assert signs.key_id == first
    assert [key.key_id for key in await keys.stored()] == [first]


async def test_the_only_key_is_not_retired_nor_an_unknown_one(settings: AuthSettings, sessions: Sessions):
    keys = SigningKeys(sessions, settings, Clock())
    await keys.load()
    with pytest.raises(LastKey):
        async with sessions.begin() as session:
            await keys.retire(session, keys.current().key_id)
    async with sessions.begin() as session:
        assert await keys.retire(session, "another") is None
    assert len(await keys.stored()) == 1


async def test_a_newer_master_key_elsewhere_does_not_end_a_replica(
    settings: AuthSettings, sessions: Sessions
):
    """Until it is restarted it signs with what it has."""
    keys = SigningKeys(sessions, settings, Clock())
    await keys.load()
    file = settings.master_key_file
    assert file is not None
    file.write_text(f"{base64.b64encode(os.urandom(32)).decode()}\n{file.read_text()}")
    await reseal(sessions, settings)
    bus = await Bus.connect(settings.nats_url, "test")
    await keys.listen(bus)
    task = asyncio.create_task(keys.follow())
    try:
        with structlog.testing.capture_logs() as logs:
            await bus.publish(SigningKeyRetired.DESCRIPTOR.full_name, b"")
            await eventually(lambda: any(line["event"] == "signing_keys_not_loaded" for line in logs))
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bus.close()


async def test_tokens_of_a_retired_key_are_refused_at_once(services: Services):
    """By each service, though the key set that it has fetched may be remembered for a minute."""
    signed_up = await services.sign_up()
    leaked = jwt.get_unverified_header(signed_up.access_token)["kid"]
    await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
    keys = SigningKeys(services.sessions, services.auth_settings, lambda: datetime.now(UTC))
    async with services.sessions.begin() as session:
        await keys.rotate(session)
    async with services.sessions.begin() as session:
        await keys.retire(session, leaked)

    async def refused_by_user() -> bool:
        call = services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
        return await reason(call) == "TOKEN_INVALID"

    async def refused_by_auth() -> bool:
        call = services.auth.SignOut(SignOutRequest(), metadata=bearer(signed_up.access_token))
        return await reason(call) == "TOKEN_INVALID"

    await eventually(refused_by_user, seconds=5)

    async def out_of_the_key_set() -> bool:
        response = await services.auth.GetJwks(GetJwksRequest())
        return leaked not in [key.kid for key in response.keys]

    await eventually(out_of_the_key_set, seconds=5)
    await eventually(refused_by_auth, seconds=5)
    refreshed = await services.auth.Refresh(
        RefreshRequest(refresh_token=signed_up.refresh_token, refresh_key=signed_up.refresh_key)
    )
    assert jwt.get_unverified_header(refreshed.access_token)["kid"] != leaked

    async def accepted() -> bool:
        call = services.users.GetMe(GetMeRequest(), metadata=bearer(refreshed.access_token))
        return await reason(call) == ""

    await eventually(accepted, seconds=5)


async def reason(call: Awaitable[object]) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return ""
