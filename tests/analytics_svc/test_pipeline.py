"""The pipeline through crashes: every event that is in the log is counted exactly once."""

import asyncio
import itertools
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.events_pb2 import Tick
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest
from meshboard.analytics.v1.source_pb2 import Source
from sqlalchemy import select

from services.analytics_svc.completion import Receipt, completed
from services.analytics_svc.event_log import STREAM, EventLog, ensure_log, make_room
from services.analytics_svc.event_store import EventStore, UnavailableError
from services.analytics_svc.glance import glance
from services.analytics_svc.models import FailedEvent, LogPosition, Watermark
from services.analytics_svc.pipeline import APART_SECONDS, LINGER_SECONDS, Pipeline
from services.analytics_svc.tables import create_tables, insert_events
from services.analytics_svc.user_agents import AgentFields
from services.chassis import db as chassis_db
from services.chassis.bus import Bus, Received
from tests.analytics_svc.conftest import LOG_BYTES, StoreProcess, running_pipeline, running_store
from tests.conditions import eventually
from tests.harness import Identity, new_id
from tests.parts import Parts, free_port


@dataclass
class Log:
    """A log, and a store and a database of its own that a pipeline fills from it."""

    parts: Parts
    bus: Bus
    event_log: EventLog
    process: StoreProcess
    store: EventStore
    database_url: str
    source: Source

    def __post_init__(self) -> None:
        self._forms: Iterator[Callable[[LoggedBatch], bytes]] = itertools.cycle(
            [LoggedBatch.SerializeToString, self._completed]
        )

    async def append_batch(self, batch: LoggedBatch) -> None:
        """Appends events to the log as ingest does: by turns such as it completes, and such as it leaves for later."""
        await self.event_log.append(self.source, next(self._forms)(batch))

    def _completed(self, batch: LoggedBatch) -> bytes:
        request = IngestRequest.FromString(batch.SerializeToString())
        seen = glance(request.SerializeToString())
        return completed(request, seen, self.source, Receipt(Timestamp(seconds=1)), AgentFields())

    async def append(self, insert_ids: list[str], event: str = "view") -> None:
        """Appends events to the log."""
        batch = LoggedBatch()
        for insert_id in insert_ids:
            made = batch.events.add(event=event, distinct_id="ada", insert_id=insert_id)
            made.time.GetCurrentTime()
        await self.append_batch(batch)

    async def counts(self) -> tuple[int, int]:
        """How many rows the source has, and how many different insert_ids; (0, 0) while the store is away."""
        try:
            answer = await self.store.query(
                "SELECT count(), uniqExact(insert_id) FROM events WHERE source_id = {source:UUID}",
                {"source": self.source.source_id},
            )
        except UnavailableError:
            return 0, 0
        rows, different = answer.rows[0]
        return rows, different

    async def until_at_least(self, count: int) -> None:
        """Returns when so many different events are in the store."""

        async def there() -> bool:
            return (await self.counts())[1] >= count

        await eventually(there, seconds=60)

    async def until(self, count: int) -> None:
        """Returns when so many different events are in the store; fails when one is there twice."""
        await self.until_at_least(count)
        assert await self.counts() == (count, count)


@asynccontextmanager
async def fresh_log(parts: Parts) -> AsyncIterator[Log]:
    database_url = await parts.fresh_database("analytics")
    await chassis_db.migrate(database_url, "services.analytics_svc")
    bus = await Bus.connect(parts.nats_url, "test")
    await ensure_log(bus, LOG_BYTES)
    # What tests before this one left there would be judged by the constraints of this one's store.
    await bus.trim(STREAM, (await bus.state(STREAM)).last + 1)
    async with running_store() as process:
        store = EventStore(process.url)
        await create_tables(store)
        event_log = EventLog(bus, lambda: datetime.now(UTC))
        source = Source(workspace_id=new_id(), source_id=new_id())
        yield Log(parts, bus, event_log, process, store, database_url, source)
        await store.close()
    await bus.close()


@pytest.fixture
async def log(parts: Parts) -> AsyncIterator[Log]:
    async with fresh_log(parts) as made:
        yield made


async def test_tells_who_has_new_events(log: Log) -> None:
    ticks: list[Tick] = []

    def note(message: Received) -> None:
        ticks.append(Tick.FromString(message.payload))

    subscription = await log.bus.listen(f"tick.{log.source.source_id}", note)
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["a", "b"])
        await log.until(2)
        await eventually(lambda: len(ticks) > 0)
    last = (await log.bus.state(STREAM)).last
    # Other pipelines of this run read the same log, and tell of it as well.
    assert {(t.workspace_id, t.watermark) for t in ticks} == {(log.source.workspace_id, last)}
    db = chassis_db.connect(log.database_url)

    async def noted() -> bool:
        async with db() as session:
            row = await session.get(Watermark, (log.source.workspace_id, log.source.source_id))
        return row is not None and row.watermark == last

    # The tick may have been another pipeline's; ours writes its place down in its own time.
    try:
        await eventually(noted)
    finally:
        await chassis_db.engine(db).dispose()
    await subscription.unsubscribe()


async def test_begins_again_with_the_range_that_was_being_inserted(log: Log) -> None:
    """The crash in the middle: inserted, and the place not yet moved."""
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["a", "b", "c"])
        await log.until(3)
        db = chassis_db.connect(log.database_url)

        async def moved() -> bool:
            return await _position(db) == (await log.bus.state(STREAM)).last

        await eventually(moved)
    async with db.begin() as session:
        row = (await session.scalars(select(LogPosition))).one()
        row.last_sequence -= 1
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["d"])
        await log.until(4)
        await eventually(moved)
    await chassis_db.engine(db).dispose()


async def test_drops_what_the_insert_under_way_has(log: Log) -> None:
    """The next range is read while the store is busy: what is in both must wait for the first."""
    db = chassis_db.connect(log.database_url)
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["first"])
        await log.until(1)
        insert_ids = [str(number) for number in range(500)]
        for _ in range(20):  # more than a range: each is inserted as soon as the one before has ended
            await log.append(insert_ids)
            await asyncio.sleep(0.02)
        await log.append(["last"])
        await log.until(502)

        async def at_rest() -> bool:
            return await _position(db) == (await log.bus.state(STREAM)).last

        await eventually(at_rest)
        assert await log.counts() == (502, 502)
    await chassis_db.engine(db).dispose()


async def _position(db: Any) -> int:
    async with db() as session:
        return int(await session.scalar(select(LogPosition.last_sequence)))


async def test_a_token_stands_for_all_of_an_insert(store: EventStore) -> None:
    """What remains when an insert happens after all, though it was given up for lost."""
    source_id = new_id()
    batches = []
    for sequence in (1, 2):
        batch = LoggedBatch(workspace_id=new_id(), source_id=source_id, sequence=sequence)
        batch.events.extend(
            LoggedEvent(event=f"e{n}", distinct_id="ada", insert_id=str(n)) for n in range(2_000)
        )
        batches.append(batch.SerializeToString())
    for _ in range(2):
        await insert_events(store, batches, token=source_id)
    count = "SELECT count() FROM events WHERE source_id = {source:UUID}"
    assert (await store.query(count, {"source": source_id})).rows == [[4_000]]


async def test_keeps_what_the_store_refuses_and_goes_on(log: Log) -> None:
    await log.store.execute("ALTER TABLE events ADD CONSTRAINT no_poison CHECK event != 'poison'")
    last = (await log.bus.state(STREAM)).last  # what other tests have put there fails here as well
    await log.append([f"before {n}" for n in range(40)])
    await log.append(["bad 1"], event="poison")
    await log.bus.publish(f"events.x.{log.source.source_id}", b"\xff no protobuf")
    stranger = LoggedBatch(workspace_id="no id", source_id="none", events=[LoggedEvent(event="view")])
    await log.bus.publish(f"events.x.{log.source.source_id}", stranger.SerializeToString())
    await log.append([f"after {n}" for n in range(40)])
    await log.append(["bad 2"], event="poison")
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.until(80)
        db = chassis_db.connect(log.database_url)

        async def all_failed() -> bool:
            return len(await _failed(db, last)) == 4

        await eventually(all_failed)
        failed = await _failed(db, last)
        await chassis_db.engine(db).dispose()
    kept = [LoggedBatch.FromString(row.batch) for row in failed if row.source_id == log.source.source_id]
    assert sorted(event.insert_id for batch in kept for event in batch.events) == ["bad 1", "bad 2"]
    assert all("no_poison" in row.error for row in failed if row.source_id)


async def _failed(db: Any, after: int = 0) -> list[FailedEvent]:
    async with db() as session:
        return list(await session.scalars(select(FailedEvent).where(FailedEvent.sequence > after)))


async def replace_log(log: Log) -> None:
    await log.bus._jetstream.delete_stream(STREAM)
    await ensure_log(log.bus, LOG_BYTES)


@pytest.mark.parametrize("messages", [1, 2, 5])
async def test_goes_on_with_a_log_that_was_replaced(log: Log, messages: int) -> None:
    """Also by one that is as long at once as the one before."""
    await replace_log(log)  # so that sequences begin with 1
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["a"])
        await log.append(["b"])
        await log.until(2)
        await replace_log(log)
        for number in range(messages):
            await log.append(["a", f"{number}"])
        await log.until(2 + messages)


async def test_begins_with_a_log_that_was_replaced_while_it_was_away(log: Log) -> None:
    await replace_log(log)
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.append(["a"])
        await log.until(1)
    await replace_log(log)
    await log.append(["b"])
    await log.append(["c"])
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.until(3)


async def test_makes_room_in_the_log_with_what_has_been_read(log: Log) -> None:
    for number in range(8):
        await log.append([f"{number}"])
    full = await log.bus.state(STREAM)
    await make_room(log.bus, full.size * 2, full.last)
    assert await log.bus.state(STREAM) == full
    await make_room(log.bus, full.size, full.last - 4)
    assert full.first < (await log.bus.state(STREAM)).first <= full.last - 3
    for _ in range(20):
        await make_room(log.bus, 1, full.last - 4)
    left = await log.bus.state(STREAM)
    assert (left.first, left.last) == (full.last - 3, full.last)  # what has not been read stays
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.until(4)


Harm = Callable[[Log, "PipelineProcess"], Awaitable[None]]


class PipelineProcess:
    """`python -m services.analytics_svc --role pipeline`."""

    def __init__(self, log: Log, identity: Identity, **settings: str) -> None:
        keys = identity.keys
        self._settings = {
            "MESHBOARD_POSTGRES_URL": log.database_url,
            "MESHBOARD_REDIS_URL": log.parts.redis_url,
            "MESHBOARD_NATS_URL": log.parts.nats_url,
            "MESHBOARD_EVENT_STORE_URL": log.process.url,
            "MESHBOARD_LISTEN": "unused",
            "MESHBOARD_PRIVATE_LISTEN": f"127.0.0.1:{free_port()}",
            "MESHBOARD_KEYS_DIR": str(keys),
            "MESHBOARD_MASTER_KEY_FILE": str(keys / "master.key"),
            **settings,
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **settings: str) -> None:
        arguments = ("-m", "services.analytics_svc", "--role", "pipeline")
        environment = {**os.environ, **self._settings, **settings}
        self._process = await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment)

    async def ended(self) -> None:
        assert self._process is not None
        async with asyncio.timeout(120):
            assert await self._process.wait() == -signal.SIGKILL

    async def kill(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def kill_the_pipeline(log: Log, pipeline: PipelineProcess) -> None:
    await pipeline.kill()
    await pipeline.start()


async def kill_the_store(log: Log, pipeline: PipelineProcess) -> None:
    await log.process.kill()
    await log.process.start()


async def run_through(log: Log, identity: Identity, harms: Sequence[Harm], **settings: str) -> int:
    """Sends events, some of them twice, while harm is done. Gives how many different ones were sent."""
    pipeline = PipelineProcess(log, identity, **settings)
    await pipeline.start()
    sent = 0
    dice = random.Random(len(harms))
    done = asyncio.Event()

    async def send() -> None:
        nonlocal sent
        while not done.is_set():
            insert_ids = [f"event {sent + n}" for n in range(200)]
            await log.append(insert_ids)
            if dice.random() < 0.3:
                await log.append(insert_ids)  # a client that missed the answer
            sent += len(insert_ids)
            await asyncio.sleep(0.05)  # a bounded load, whatever the machine can do

    sending = asyncio.create_task(send())
    try:
        for harm in harms:
            before = (await log.counts())[1]
            await log.until_at_least(before + 400)
            await asyncio.sleep(dice.random() * 0.1)  # harm at any moment of the pipeline's round
            await harm(log, pipeline)
        done.set()
        await sending
        await log.until_at_least(sent)
    finally:
        sending.cancel()
        await pipeline.kill()
    return sent


async def test_counts_once_through_kill_9_of_pipeline_and_store(log: Log, identity: Identity) -> None:
    sent = await run_through(log, identity, [kill_the_pipeline, kill_the_store, kill_the_pipeline])
    assert await log.counts() == (sent, sent)


async def test_would_notice_without_the_check(log: Log, identity: Identity) -> None:
    sent = await run_through(log, identity, [kill_the_pipeline], MESHBOARD_UNSAFE_NO_DEDUPLICATION="1")
    rows, different = await log.counts()
    assert different == sent
    assert rows > sent


class Story:
    """Events that say what must be in the store in the end: a chain of ids of one person, duplicates, and poison."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.chapters = 0

    async def goes_on(self) -> None:
        """Appends 20 events, the half of them twice, and one that the store refuses."""
        batch, number = LoggedBatch(), 20 * self.chapters
        for n in [*range(number, number + 20), *range(number, number + 10)]:
            event = batch.events.add(
                event="view", distinct_id=f"id {n + 1}", previous_id=f"id {n}", insert_id=f"{n}"
            )
            event.time.GetCurrentTime()
        event = batch.events.add(event="poison", distinct_id="p", insert_id=f"poison {self.chapters}")
        event.time.GetCurrentTime()
        await self.log.append_batch(batch)
        self.chapters += 1

    async def ends_well(self) -> None:
        """Returns when all of it is in the store; fails when something is there twice, or not as it was told."""
        await self.log.until(20 * self.chapters)
        people = await self.log.store.query(
            "SELECT count(), uniqExact(person_id) FROM persons FINAL WHERE scope_id = {source:UUID}",
            {"source": self.log.source.source_id},
        )
        assert people.rows == [[20 * self.chapters + 1, 1]]
        db = chassis_db.connect(self.log.database_url)
        failed = [row for row in await _failed(db) if row.source_id == self.log.source.source_id]
        await chassis_db.engine(db).dispose()
        assert sorted(row.identity.decode() for row in failed) == sorted(
            f"poison {chapter}" for chapter in range(self.chapters)
        )


# In the order in which the pipeline passes them.
CRASH_POINTS = ("fetch", "read", "drop", "plan", "link", "insert", "finish", "tell")


async def tell_with_crashes(log: Log, identity: Identity, points: Sequence[str]) -> None:
    """Has the pipeline end at each point in turn, most times while it makes up for the end before."""
    await log.store.execute("ALTER TABLE events ADD CONSTRAINT no_poison CHECK event != 'poison'")
    pipeline, story = PipelineProcess(log, identity), Story(log)
    try:
        for point in points:
            await story.goes_on()
            await pipeline.start(MESHBOARD_CRASH_AT=point)
            await pipeline.ended()
        await log.process.kill()
        # It ends behind the persons and two of the halves that are checked, before the events.
        await log.process.start(MESHBOARD_CRASH_AT="write:3")
        await story.goes_on()
        await pipeline.start()
        async with asyncio.timeout(120):
            await log.process.ended()
        await log.process.start()
        await story.ends_well()
    finally:
        await pipeline.kill()


@pytest.mark.timeout(600)
async def test_counts_once_after_a_crash_at_each_step(log: Log, identity: Identity) -> None:
    await tell_with_crashes(log, identity, CRASH_POINTS)


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_counts_once_after_crashes_at_all_pairs_of_steps(log: Log, identity: Identity) -> None:
    pairs = [point for pair in itertools.product(CRASH_POINTS, repeat=2) for point in pair]
    await tell_with_crashes(log, identity, pairs)


async def test_poison_holds_up_nobody(log: Log) -> None:
    """500 events that a step chokes on, among 100,000."""
    for number in range(100):
        batch = LoggedBatch()
        for n in range(1_000):
            poison = n % 200 == number
            batch.events.add(
                event="indigestible" if poison else "view", distinct_id="a", insert_id=f"{number} {n}"
            )
        await log.event_log.append(log.source, batch.SerializeToString())
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.until(99_500)
        db = chassis_db.connect(log.database_url)
        failed = [row for row in await _failed(db) if row.source_id == log.source.source_id]
        await chassis_db.engine(db).dispose()
    assert len({row.identity for row in failed}) == len(failed) == 500
    assert all(row.error.startswith("RuntimeError: cannot swallow ") for row in failed)


async def test_what_comes_after_a_pause_does_not_wait_as_a_trickle_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unused: Any = None
    pipeline = Pipeline(unused, unused, unused, unused, max_log_bytes=1, deduplicate=False)
    message = SimpleNamespace(payload=b"")
    coming, waits = iter([None, message]), list[float]()

    async def take_next(_reader: object, timeout: float) -> object:
        waits.append(timeout)
        return next(coming, None)

    monkeypatch.setattr(pipeline, "_next", take_next)
    assert await pipeline._collect(unused, None) == []
    assert await pipeline._collect(unused, None) == [message]
    assert max(waits[2:]) <= LINGER_SECONDS


async def test_what_trickles_in_all_the_time_is_inserted_a_few_times_a_second(log: Log) -> None:
    loop = asyncio.get_running_loop()
    await log.store.execute("SYSTEM STOP MERGES events")  # so that each insert leaves a part
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        start = loop.time()
        for number in range(60):
            await log.append([f"{number}"])
            await asyncio.sleep(0.02)  # the trickle
        await log.until(60)
        seconds = loop.time() - start
    answer = await log.store.query("SELECT uniqExact(_part), uniqExact(_partition_id) FROM events")
    parts, partitions = answer.rows[0]
    assert partitions < parts <= partitions * (seconds / APART_SECONDS + 2)


@pytest.mark.parametrize(
    ("poisoned", "total"), [(10, 5_000), pytest.param(500, 100_000, marks=pytest.mark.long)]
)
@pytest.mark.timeout(900)
async def test_what_the_store_refuses_holds_up_nobody(log: Log, poisoned: int, total: int) -> None:
    await log.store.execute("ALTER TABLE events ADD CONSTRAINT no_poison CHECK event != 'poison'")
    every = total // poisoned
    for start in range(0, total, 1_000):
        batch = LoggedBatch()
        for n in range(start, start + 1_000):
            name = "poison" if n % every == every // 2 else "view"
            batch.events.add(event=name, distinct_id="a", insert_id=f"{n}")
        await log.append_batch(batch)
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await eventually(lambda: _has_rows(log, total - poisoned), seconds=600)
    assert await log.counts() == (total - poisoned, total - poisoned)


async def test_what_the_store_fails_at_holds_up_nobody(log: Log) -> None:
    """An error that is not known as one of data: it may pass, and here it never does."""
    await log.store.execute("ALTER TABLE events ADD CONSTRAINT strange CHECK throwIf(event = 'poison') = 0")
    batch = LoggedBatch()
    for n in range(200):
        batch.events.add(event="poison" if n in {7, 150} else "view", distinct_id="a", insert_id=f"{n}")
    await log.event_log.append(log.source, batch.SerializeToString())
    async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
        await log.until(198)
        await log.append(["next"])
        await log.until(199)
        db = chassis_db.connect(log.database_url)
        failed = [row for row in await _failed(db) if row.source_id == log.source.source_id]
        await chassis_db.engine(db).dispose()
    assert {row.identity for row in failed} == {b"7", b"150"}
    assert all(row.step == "insert" and "FUNCTION_THROW_IF" in row.error for row in failed)


async def test_what_the_store_fails_at_whatever_it_is_waits(log: Log) -> None:
    """An error of the store itself is no event's fault, however long it lasts."""
    await log.store.execute("ALTER TABLE events ADD CONSTRAINT ill CHECK throwIf(1) = 0")
    db = chassis_db.connect(log.database_url)
    with structlog.testing.capture_logs() as said:
        async with running_pipeline(log.database_url, log.parts.nats_url, log.process.url):
            await log.append(["a", "b"])
            await eventually(lambda: sum(entry["event"] == "pipeline_waits" for entry in said) > 8)
            assert not [row for row in await _failed(db) if row.source_id == log.source.source_id]
            await log.store.execute("ALTER TABLE events DROP CONSTRAINT ill")
            await log.until(2)
    await chassis_db.engine(db).dispose()


async def _has_rows(log: Log, count: int) -> bool:
    return (await log.counts())[1] >= count


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_counts_once_through_many_kills(log: Log, identity: Identity) -> None:
    dice = random.Random(7)
    harms = [dice.choice([kill_the_pipeline, kill_the_store]) for _ in range(30)]
    sent = await run_through(log, identity, harms)
    assert await log.counts() == (sent, sent)
