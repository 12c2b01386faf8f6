"""What is removed when its time is over, and what stays."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from sqlalchemy import delete, insert, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.event_store import EventStore
from services.analytics_svc.models import DeletedSource, Source, Watermark
from services.analytics_svc.persons import Persons, links_of
from services.analytics_svc.pipeline import written
from services.analytics_svc.removals import Retention
from services.analytics_svc.tables import create_tables, insert_events
from services.chassis import db as chassis_db
from tests.analytics_svc.conftest import running_store
from tests.conditions import eventually
from tests.harness import new_id
from tests.parts import Parts

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)  # a Friday


@dataclass
class House:
    """A store and a database of their own, and the sweep over them at any time."""

    db: async_sessionmaker[AsyncSession]
    store: EventStore
    workspace_id: str
    time: datetime = NOW

    async def source(self, retention_days: int) -> str:
        """A new source that keeps its events for so long."""
        source_id = new_id()
        async with self.db.begin() as session:
            values = {
                "workspace_id": self.workspace_id,
                "source_id": source_id,
                "title": "Shop",
                "write_key_hash": source_id.encode(),
                "write_key_prefix": "mbw_",
                "creator_id": new_id(),
                "create_time": NOW,
                "update_time": NOW,
            }
            await session.execute(insert(Source).values(values))
            await session.execute(
                insert(Watermark).values(workspace_id=self.workspace_id, source_id=source_id, watermark=7)
            )
        await self.keep(source_id, retention_days)
        return source_id

    async def keep(self, source_id: str, retention_days: int) -> None:
        """Changes how long a source keeps its events."""
        async with self.db.begin() as session:
            await session.execute(
                text("UPDATE sources SET retention_days = :days WHERE source_id = :id"),
                {"days": retention_days, "id": source_id},
            )

    async def receive(self, source_id: str, retention_days: int, ages: Sequence[float]) -> None:
        """Puts an event into the store that was received so many days before NOW, for each age."""
        data = []
        for age in ages:
            batch = LoggedBatch(
                workspace_id=self.workspace_id, source_id=source_id, retention_days=retention_days
            )
            batch.receive_time.FromDatetime(NOW - timedelta(days=age))
            batch.events.append(LoggedEvent(event="view", distinct_id="ada", insert_id=str(age)))
            data.append(batch.SerializeToString())
        await insert_events(self.store, data, token=new_id())

    async def sweep(self, after_days: float = 0) -> None:
        """Sweeps so many days after NOW."""
        now = NOW + timedelta(days=after_days)
        await Retention(self.db, self.store, lambda: now, asyncio.Lock()).sweep()

    async def ages(self, source_id: str) -> list[float]:
        """The ages that are left of a source."""
        sql = "SELECT insert_id FROM events WHERE source_id = {source:UUID}"
        rows = (await self.store.query(sql, {"source": source_id})).rows
        return sorted(float(row[0]) for row in rows)

    async def until_ages(self, source_id: str, ages: list[float]) -> None:
        """Returns when these are left: rewrites are done in the background."""

        async def left() -> bool:
            return await self.ages(source_id) == ages

        await eventually(left)

    async def mutations(self) -> int:
        """How many rewrites there were."""
        return int((await self.store.query("SELECT count() FROM system.mutations")).rows[0][0])

    async def link(self, source_id: str, distinct_id: str, previous_id: str, workspace_id: str = "") -> None:
        """Has a source say that two ids are one person's."""
        batch = LoggedBatch(workspace_id=workspace_id or self.workspace_id, source_id=source_id)
        batch.events.append(LoggedEvent(distinct_id=distinct_id, previous_id=previous_id))
        await Persons(self.store).link(links_of([written(batch)]), 1)

    async def delete(self, source_id: str) -> None:
        async with self.db.begin() as session:
            await session.execute(delete(Source).where(Source.source_id == source_id))

    async def linked(self, scope_id: str) -> list[str]:
        """The ids that are linked in a scope."""
        sql = "SELECT distinct_id FROM persons FINAL WHERE scope_id = {scope:UUID} ORDER BY distinct_id"
        return [row[0] for row in (await self.store.query(sql, {"scope": scope_id})).rows]

    async def watermark(self, source_id: str) -> int:
        async with self.db() as session:
            row = await session.get(Watermark, (self.workspace_id, source_id))
        assert row is not None
        return row.watermark


@pytest.fixture
async def house(parts: Parts) -> AsyncIterator[House]:
    url = await parts.fresh_database("analytics")
    await chassis_db.migrate(url, "services.analytics_svc")
    db = chassis_db.connect(url)
    async with running_store() as process:
        store = EventStore(process.url)
        await create_tables(store)
        yield House(db, store, new_id())
        await store.close()
    await chassis_db.engine(db).dispose()


@pytest.mark.parametrize(
    ("retention_days", "ages", "left"),
    [
        (0, [1, 400, 4000], [1, 400, 4000]),
        (
            7,
            [0, 6, 7.2, 8.6, 40],
            [0, 6, 7.2],
        ),  # 7.2 days ago others were received that day which are not over
        (90, [0, 89, 92, 98, 200], [0, 89, 92]),  # weeks begin on Mondays
        (1000, [0, 999, 1005, 1030, 2000], [0, 999, 1005]),  # months
    ],
)
async def test_drops_whole_partitions_of_what_is_over(
    house: House, retention_days: int, ages: list[float], left: list[float]
) -> None:
    source_id = await house.source(retention_days)
    await house.receive(source_id, retention_days, ages)
    if retention_days:
        # Something of the same stretch that is not over keeps the partition.
        period = {7: 0.1, 90: 0.1, 1000: 0.1}[retention_days]
        await house.receive(source_id, retention_days, [retention_days - period])
        left = sorted([*left, retention_days - period])
    await house.sweep()
    assert await house.ages(source_id) == left
    assert await house.mutations() == 0


async def test_ends_no_earlier_than_promised_and_not_much_later(house: House) -> None:
    source_id = await house.source(30)
    await house.receive(source_id, 30, [0])
    await house.sweep(after_days=29.99)
    assert await house.ages(source_id) == [0]
    await house.sweep(after_days=30.01)
    assert await house.ages(source_id) == []
    assert await house.watermark(source_id) == 8  # answers that were remembered are not given again


async def test_leaves_neighbours_that_are_kept_for_longer(house: House) -> None:
    short, long = await house.source(7), await house.source(30)
    await house.receive(short, 7, [1, 10])
    await house.receive(long, 30, [1, 10])
    await house.sweep()
    await house.until_ages(short, [1])
    assert await house.ages(long) == [1, 10]
    assert (await house.watermark(short), await house.watermark(long)) == (8, 7)
    done = await house.mutations()
    await house.sweep()
    assert await house.mutations() == done  # nothing is rewritten twice


async def test_follows_a_setting_that_was_changed(house: House) -> None:
    shortened, lengthened = await house.source(0), await house.source(7)
    await house.receive(shortened, 0, [1, 100])
    await house.receive(lengthened, 7, [1, 100])
    await house.keep(shortened, 30)
    await house.keep(lengthened, 0)
    await house.sweep()
    await house.until_ages(shortened, [1])
    assert await house.ages(lengthened) == [1, 100]


async def test_removes_what_a_deleted_source_has_and_what_still_comes_of_it(house: House) -> None:
    gone, kept = await house.source(0), await house.source(0)
    for source_id in (gone, kept):
        await house.receive(source_id, 0, [0, 100])
    async with house.db.begin() as session:
        await session.execute(text("DELETE FROM sources WHERE source_id = :id"), {"id": gone})
    await house.sweep()
    await house.until_ages(gone, [])
    await house.receive(gone, 0, [1])  # the log had it still
    await house.sweep()
    await house.until_ages(gone, [])
    assert await house.ages(kept) == [0, 100]
    async with house.db() as session:
        assert await session.get(DeletedSource, (house.workspace_id, gone)) is not None
    await Retention(
        house.db, house.store, lambda: datetime.now(UTC) + timedelta(days=40), asyncio.Lock()
    ).sweep()
    async with house.db() as session:
        assert await session.get(DeletedSource, (house.workspace_id, gone)) is None


async def test_keeps_to_what_was_said_at_receipt_of_a_source_that_nobody_knows(house: House) -> None:
    unknown = new_id()
    await house.source(7)  # there is something to sweep for
    await house.receive(unknown, 0, [100])
    await house.receive(unknown, 30, [100])
    await house.sweep()
    assert await house.ages(unknown) == [100]


async def test_works_on_a_table_from_before_there_were_such_partitions(house: House) -> None:
    old = (
        "CREATE TABLE events AS {} ENGINE = MergeTree PARTITION BY toYYYYMM(receive_time) ORDER BY source_id"
    )
    await house.store.execute("RENAME TABLE events TO model")
    await house.store.execute(old.format("model"))
    await house.store.execute(
        "ALTER TABLE events DROP PROJECTION quarters, DROP INDEX sequences, DROP COLUMN retention_days"
    )
    await create_tables(house.store)
    short, long = await house.source(30), await house.source(0)
    await house.receive(short, 30, [0, 62, 100])
    await house.receive(long, 0, [0, 100])
    await house.sweep()
    await house.until_ages(short, [0])
    assert await house.ages(long) == [0, 100]


async def test_waits_for_the_insert_under_way(house: House) -> None:
    alone = asyncio.Lock()
    source_id = await house.source(7)
    await house.receive(source_id, 7, [100])
    async with alone:
        sweeping = asyncio.create_task(Retention(house.db, house.store, lambda: NOW, alone).sweep())
        done, _ = await asyncio.wait([sweeping], timeout=0.3)
        assert not done
        assert await house.ages(source_id) == [100]
    await sweeping
    assert await house.ages(source_id) == []


async def test_takes_what_a_deleted_source_has_said_of_persons(house: House) -> None:
    gone, kept = await house.source(0), await house.source(0)
    await house.link(gone, "ada", "cookie-1")
    await house.link(gone, "bob", "cookie-2")
    await house.link(kept, "ada", "phone")
    elsewhere = new_id()  # a workspace in which the same ids are linked
    await house.link(gone, "bob", "cookie-2", elsewhere)
    await house.delete(gone)
    await house.sweep()
    assert await house.linked(gone) == ["bob", "cookie-2"]  # those of the other workspace
    assert await house.linked(elsewhere) == ["bob", "cookie-2"]
    assert await house.linked(kept) == ["ada", "phone"]
    assert await house.linked(house.workspace_id) == ["ada", "phone"]
    assert await house.watermark(kept) == 8  # answers that know of the links are not given again
    done = await house.mutations()
    await house.sweep()
    assert (await house.mutations(), await house.watermark(kept)) == (done, 8)
    await house.link(gone, "bob", "cookie-2")  # the log may bring it late
    await house.sweep()
    assert await house.linked(house.workspace_id) == ["ada", "phone"]
