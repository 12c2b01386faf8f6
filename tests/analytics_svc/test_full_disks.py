"""A full disk, a store that is away, a full event log: events wait, then are refused; nothing accepted is lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from services.analytics_svc.event_log import STREAM, ensure_log
from services.chassis import errors
from services.chassis.bus import Bus, BusError
from tests.analytics_svc.conftest import LOG_BYTES, Analytics, running_pipeline
from tests.analytics_svc.test_pipeline import Log, fresh_log
from tests.conditions import eventually
from tests.harness import reason_of, status_of
from tests.parts import Parts

FULL = 1 << 60  # bytes that no disk has free


@pytest.fixture
async def log(parts: Parts) -> AsyncIterator[Log]:
    async with fresh_log(parts) as made:
        yield made


@asynccontextmanager
async def small_log(bus: Bus, room: int) -> AsyncIterator[int]:
    """Leaves so many bytes of room in the event log; gives its limit."""
    limit = (await bus.state(STREAM)).size + room
    await ensure_log(bus, limit)
    try:
        yield limit
    finally:
        await ensure_log(bus, LOG_BYTES)


async def append(log: Log, insert_ids: list[str]) -> bool:
    """Whether the log takes these."""
    try:
        await log.append(insert_ids)
    except BusError:
        return False
    return True


async def keep_free(log: Log, count: int) -> None:
    await log.store.execute(
        f"ALTER TABLE events MODIFY SETTING min_free_disk_bytes_to_perform_insert = {count}"
    )


async def test_events_wait_in_the_log_while_the_disk_of_the_store_is_full(log: Log) -> None:
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["before"])
        await log.until(1)
        await keep_free(log, FULL)
        for number in range(20):
            await log.append([f"{number} {n}" for n in range(50)])
        assert await log.counts() == (1, 1)
        await keep_free(log, 0)
        await log.until(1_001)


async def test_a_full_log_takes_no_more_until_the_store_is_back(log: Log) -> None:
    accepted = ["before"]
    async with (
        small_log(log.bus, 400_000) as limit,
        running_pipeline(log.database_url, log.parts.nats_url, log.process.url, max_log_bytes=limit),
    ):
        await log.append(accepted)
        await log.until(1)
        await log.process.kill()
        while await append(log, insert_ids := [f"{len(accepted)} {n:0150}" for n in range(100)]):
            accepted += insert_ids
        assert len(accepted) > 1_000
        await log.process.start()
        await log.until(len(accepted))
        await eventually(lambda: append(log, ["after"]))  # what the store has made room, with no hand
        await log.until(len(accepted) + 1)


async def test_says_when_to_send_again(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, write_key = await analytics.source(member)
    await analytics.send(write_key, [{"insertId": "a"}])
    async with small_log(analytics.bus, -1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await analytics.send(write_key, [{"insertId": "b"}])
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert reason_of(caught.value) == "DEPENDENCY_UNAVAILABLE"
    assert errors.from_status(status_of(caught.value)).retry_seconds == 1
    await analytics.send(write_key, [{"insertId": "b"}])
    await analytics.until_count(member, source, 2)
