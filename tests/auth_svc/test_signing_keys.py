import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKeys
from services.chassis import db
from tests.harness import make_keys, make_settings
from tests.parts import Parts

Sessions = async_sessionmaker[AsyncSession]
HOUR = timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
async def settings(parts: Parts, tmp_path: Path) -> AuthSettings:
    url = await parts.fresh_database("auth")
    await db.migrate(url, "services.auth_svc")
    return make_settings(AuthSettings, parts, make_keys(tmp_path / "keys"), url)


@pytest.fixture
async def sessions(settings: AuthSettings) -> AsyncIterator[Sessions]:
    pool = db.connect(settings.postgres_url)
    yield pool
    await db.engine(pool).dispose()


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
