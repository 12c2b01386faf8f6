import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from uuid import UUID, uuid4

import pytest
from meshboard.user.v1.events_pb2 import MemberRemoved
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import outbox
from services.chassis.bus import DOMAIN, Bus, Delivery
from services.chassis.db import OutboxRow
from tests.conditions import eventually
from tests.harness import NOWHERE
from tests.parts import Parts

Sessions = async_sessionmaker[AsyncSession]
SUBJECT = "meshboard.user.v1.MemberRemoved"


@asynccontextmanager
async def relaying(url: str, bus: Bus, service: str = "test") -> AsyncIterator[None]:
    task = asyncio.create_task(outbox.Relay(url, bus, service).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def member_removed(number: int = 0) -> MemberRemoved:
    return MemberRemoved(workspace_id=NOWHERE, user_id=str(UUID(int=number)))


async def write(db: Sessions, count: int, *, workspace_id: str = "") -> list[str]:
    """Commits `count` events and gives their ids."""
    async with db.begin() as session:
        return [outbox.add(session, member_removed(n), workspace_id=workspace_id) for n in range(count)]


async def pending(db: Sessions) -> int:
    async with db() as session:
        return len(
            (await session.scalars(select(OutboxRow.id).where(OutboxRow.publish_time.is_(None)))).all()
        )


async def stored(bus: Bus, ids: list[str]) -> list[Delivery]:
    """All messages of the stream whose event id is one of `ids`."""
    consumer = await bus.pull(DOMAIN, f"t{uuid4().hex}", subject=SUBJECT, max_ack_pending=100_000)
    found: list[Delivery] = []
    while batch := await consumer.fetch(1000, timeout=0.5):
        found += [message for message in batch if message.headers.get(outbox.EVENT_ID) in ids]
    await consumer.close()
    return found


def ids_of(messages: list[Delivery]) -> list[str]:
    return [message.headers[outbox.EVENT_ID] for message in messages]


async def test_publishes_what_was_committed(database_url: str, db: Sessions, bus: Bus) -> None:
    token = outbox.actor.set("user:u1")
    async with relaying(database_url, bus):
        ids = await write(db, 3, workspace_id=NOWHERE)
        await eventually(lambda: settled(db))
    outbox.actor.reset(token)
    messages = await stored(bus, ids)
    assert ids_of(messages) == ids
    assert [MemberRemoved.FromString(message.payload) for message in messages] == [
        member_removed(n) for n in range(3)
    ]
    assert messages[0].headers[outbox.WORKSPACE_ID] == NOWHERE
    assert messages[0].headers[outbox.ACTOR] == "user:u1"


async def settled(db: Sessions) -> bool:
    return await pending(db) == 0


async def test_publishes_nothing_of_a_transaction_that_failed(
    database_url: str, db: Sessions, bus: Bus
) -> None:
    async with relaying(database_url, bus):
        async with db() as session:
            lost = outbox.add(session, member_removed())
            await session.flush()
            await session.rollback()
        ids = await write(db, 1)
        await eventually(lambda: settled(db))
    assert ids_of(await stored(bus, [lost, *ids])) == ids


async def test_publishes_a_small_id_that_is_committed_late(database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus):
        async with db.begin() as slow:
            early = outbox.add(slow, member_removed())
            await slow.flush()
            (late,) = await write(db, 1)
            await eventually(lambda: settled(db))
        assert early < late
        await eventually(lambda: settled(db))
    assert ids_of(await stored(bus, [early, late])) == [late, early]


async def test_is_woken_by_the_commit(database_url: str, db: Sessions, bus: Bus) -> None:
    heard: list[float] = []
    loop = asyncio.get_running_loop()
    async with relaying(database_url, bus, service := uuid4().hex):
        pulse = await bus.pulse(f"beat.{service}")
        await eventually(pulse.fresh)
        await bus.listen(SUBJECT, lambda _: heard.append(loop.time()))
        delays = []
        for _ in range(5):
            await write(db, 1)
            committed, count = loop.time(), len(heard)
            await eventually(lambda count=count: len(heard) > count)
            delays.append(heard[-1] - committed)
    # The slow look comes twice a second: without NOTIFY most of the five would wait for it.
    assert sorted(delays)[2] < 0.1


async def test_its_heart_beats_while_others_write_without_pause(
    database_url: str, db: Sessions, bus: Bus
) -> None:
    async def write_on() -> None:
        while True:
            await write(db, 1)

    async with relaying(database_url, bus, service := uuid4().hex):
        pulse = await bus.pulse(f"beat.{service}")
        await eventually(pulse.fresh)
        writers = [asyncio.create_task(write_on()) for _ in range(4)]
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert pulse.fresh(1.0)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        await eventually(lambda: settled(db))


async def test_two_relays_publish_once(database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus), relaying(database_url, bus):
        ids: list[str] = []
        for _ in range(20):
            ids += await write(db, 20)
        await eventually(lambda: settled(db))
        async with db() as session:
            holders = await session.scalar(
                text(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND database ="
                    " (SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            )
        assert holders == 1
    assert ids_of(await stored(bus, ids)) == ids


async def test_the_next_relay_takes_over(database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus):
        async with relaying(database_url, bus):
            await write(db, 1)
            await eventually(lambda: settled(db))
        ids = await write(db, 1)
        await eventually(lambda: settled(db))
    assert ids_of(await stored(bus, ids)) == ids


async def test_survives_a_kill_of_nats(parts: Parts, database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus, service := uuid4().hex):
        pulse = await bus.pulse(f"beat.{service}")
        ids = await write(db, 50)
        restarts = parts.supervisor.children["nats"].restarts
        parts.supervisor.kill("nats")
        ids += await write(db, 50)
        await eventually(lambda: not pulse.fresh(0.1))
        await parts.supervisor.until_ready("nats", restarts=restarts + 1)
        ids += await write(db, 50)
        await eventually(lambda: settled(db))
        await eventually(pulse.fresh)
    assert sorted(ids_of(await stored(bus, ids))) == sorted(ids)


async def test_survives_the_loss_of_its_connection(
    parts: Parts, database_url: str, db: Sessions, bus: Bus
) -> None:
    async with relaying(database_url, bus):
        ids = await write(db, 5)
        await eventually(lambda: settled(db))
        async with db.begin() as session:
            ended = await session.scalar(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name = 'meshboard test relay'"
                )
            )
        assert ended == 1
        ids += await write(db, 5)
        await eventually(lambda: settled(db))
    assert ids_of(await stored(bus, ids)) == ids


async def test_a_mark_that_was_lost_does_not_double(database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus):
        ids = await write(db, 3)
        await eventually(lambda: settled(db))
        async with db.begin() as session:
            await session.execute(text("UPDATE outbox SET publish_time = NULL"))
        await eventually(lambda: settled(db))
    assert ids_of(await stored(bus, ids)) == ids


async def test_old_published_rows_are_deleted(database_url: str, db: Sessions, bus: Bus) -> None:
    ids = await write(db, 3)
    async with db.begin() as session:
        await session.execute(
            text("UPDATE outbox SET publish_time = now() - interval '8 days' WHERE id = :id"), {"id": ids[0]}
        )
        await session.execute(
            text("UPDATE outbox SET publish_time = now() - interval '6 days' WHERE id = :id"), {"id": ids[1]}
        )

    async def left() -> bool:
        async with db() as session:
            return set(await session.scalars(select(OutboxRow.id))) == {ids[1], ids[2]}

    async with relaying(database_url, bus):
        await eventually(left)


async def test_measures_what_waits(parts: Parts, database_url: str, db: Sessions, bus: Bus) -> None:
    await write(db, 7)
    service = uuid4().hex
    relay = outbox.Relay(database_url, bus, service)
    count = outbox._pending.labels(service)
    await parts.supervisor.stop("nats")
    task = asyncio.create_task(relay.run())
    await eventually(lambda: count._value.get() == 7)
    assert outbox._oldest.labels(service)._value.get() > 0
    await parts.supervisor.start("nats")
    await eventually(lambda: count._value.get() == 0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_refuses_a_message_that_is_too_large(db: Sessions) -> None:
    with pytest.raises(ValueError, match="MemberRemoved has"):
        async with db.begin() as session:
            outbox.add(session, MemberRemoved(user_id="x" * outbox.MAX_EVENT_BYTES))


async def test_what_comes_in_company_leaves_together(database_url: str, db: Sessions, bus: Bus) -> None:
    async with relaying(database_url, bus):
        for _ in range(20):
            await write(db, 1)
        await eventually(lambda: settled(db))
    async with db() as session:
        marked = await session.scalars(
            select(OutboxRow.publish_time).distinct().order_by(OutboxRow.publish_time)
        )
        rounds = [time.timestamp() for time in marked if time]
    # However slow the machine is: between two rounds there is a rest.
    assert all(later - earlier > 0.09 for earlier, later in pairwise(rounds))
