"""A migrated database and a connection to NATS for each test."""

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import db as chassis_db
from services.chassis.bus import Bus
from tests.parts import Parts


@pytest.fixture
async def database_url(parts: Parts) -> str:
    """A fresh database with the chassis' tables and `effects`."""
    url = await parts.fresh_database("user")
    await chassis_db.migrate(url, "tests.chassis.example_svc")
    return url


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    sessions = chassis_db.connect(database_url)
    yield sessions
    await chassis_db.engine(sessions).dispose()


@pytest.fixture
async def bus(parts: Parts) -> AsyncIterator[Bus]:
    connection = await Bus.connect(parts.nats_url, "test")
    yield connection
    await connection.close()
