"""The real servers start, serve and keep their promises."""

import asyncio
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.parts import Parts


async def test_each_role_enters_only_its_own_database(parts: Parts) -> None:
    own = await asyncpg.connect(parts.postgres_url("auth"))
    assert await own.fetchval("SELECT current_user || '/' || current_database()") == "auth/auth"
    extensions = {row["extname"] for row in await own.fetch("SELECT extname FROM pg_extension")}
    await own.close()
    assert {"pg_trgm", "btree_gist"} <= extensions
    foreign = urlsplit(parts.postgres_url("auth"))._replace(path="/user").geturl()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await asyncpg.connect(foreign)


async def test_postgres_wants_the_password(parts: Parts) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(parts.postgres_url("auth"), password="guess")


async def test_fresh_databases_are_empty_and_apart(parts: Parts) -> None:
    first, second = await parts.fresh_database("user"), await parts.fresh_database("user")
    assert first != second
    connection = await asyncpg.connect(first)
    await connection.execute("CREATE TABLE things (id int)")
    await connection.close()
    connection = await asyncpg.connect(second)
    assert await connection.fetchval("SELECT to_regclass('things')") is None
    await connection.close()


async def test_valkey_and_nats_answer(parts: Parts) -> None:
    redis = Redis.from_url(parts.redis_url)
    assert await redis.ping()
    await redis.aclose()
    port = urlsplit(parts.nats_url).port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    greeting = await reader.readline()
    writer.close()
    assert b'"auth_required":true' in greeting
    assert b'"max_payload":8388608' in greeting
