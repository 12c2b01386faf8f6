"""A database that does not take the call now is no fault of the service."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import grpc
import pytest
from sqlalchemy import exc, text

from services.chassis import db, errors
from services.chassis.interceptor import error_of
from tests.parts import Parts


async def error_at(url: str, statement: str = "SELECT 1") -> errors.Error | None:
    """What a caller is told when the statement fails."""
    sessions = db.connect(url)
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever comes is judged
            async with sessions.begin() as session:
                await session.execute(text(statement))
    finally:
        await db.engine(sessions).dispose()
    return error_of(caught.value)


async def test_no_socket(tmp_path: Path):
    error = await error_at(f"postgresql://someone:secret@/nowhere?host={tmp_path}")
    assert error is not None
    assert error.code is grpc.StatusCode.UNAVAILABLE


async def test_a_full_database(parts: Parts):
    url = await parts.fresh_database("user")
    admin = await asyncpg.connect(parts.admin_url)
    try:
        name = url.partition("@/")[2].partition("?")[0]
        await admin.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
    finally:
        await admin.close()
    error = await error_at(url)
    assert error is not None
    assert error.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("statement", ["SELECT", "SELECT 1 / 0", "SELECT nothing"])
async def test_a_wrong_statement_is_a_fault(parts: Parts, statement: str):
    error = await error_at(await parts.fresh_database("user"), statement + " FROM nowhere")
    assert error is not None
    assert error.code is grpc.StatusCode.INTERNAL


async def test_migrations_wait_for_postgres(parts: Parts):
    url = await parts.fresh_database("user")
    admin = await asyncpg.connect(parts.admin_url)
    name = url.partition("@/")[2].partition("?")[0]
    try:
        await admin.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
        with pytest.raises(TimeoutError):
            await db.migrate(url, "tests.chassis.example_svc", timeout=0)
        migrating = asyncio.create_task(db.migrate(url, "tests.chassis.example_svc"))
        await asyncio.wait([migrating], timeout=0.1)
        assert not migrating.done()
        await admin.execute(f'ALTER DATABASE "{name}" CONNECTION LIMIT 100')
    finally:
        await admin.close()
    await migrating
    with pytest.raises(exc.SQLAlchemyError):
        await db.migrate(url.replace(":", ":wrong", 2).replace(":wrong", ":", 1), "tests.chassis.example_svc")
