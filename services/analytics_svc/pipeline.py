"""From the event log into the event store: read in order, enrich, drop duplicates, link persons, insert, tell.

One insert is one fixed range of the log, and the range is its deduplication token. The range is written to Postgres
before the insert, so that after a crash the same range is inserted again under the same token. The place in the log is
kept there too: messages are not acknowledged one by one.

What a step refuses, be it by a fault of ours, is put among the failed events, one by one, and holds up no other.

One pipeline runs for a log. Where two do, each change of the place is conditional on the place it started from, and the
one that comes too late ends.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import structlog
from google.protobuf.message import DecodeError
from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.events_pb2 import Tick
from meshboard.analytics.v1.source_pb2 import Source
from prometheus_client import Counter, Gauge, Histogram
from sqlalchemy import exc, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc import crash_points
from services.analytics_svc.duplicates import Duplicates
from services.analytics_svc.event_keys import keys_of
from services.analytics_svc.event_log import STREAM, LogReader, LogReplacedError, ensure_log, make_room
from services.analytics_svc.event_store import DataRefusedError, EventStore, EventStoreError, UnavailableError
from services.analytics_svc.failures import Failure, note_failures
from services.analytics_svc.models import LogPosition
from services.analytics_svc.persons import Persons, links_of
from services.analytics_svc.removals import Retention
from services.analytics_svc.settings import AnalyticsSettings
from services.analytics_svc.store_metrics import follow_store
from services.analytics_svc.tables import check_events, create_tables, insert_events, prepare_check
from services.analytics_svc.user_agents import parse_user_agent
from services.chassis import db, telemetry
from services.chassis.bus import Bus, BusError
from services.chassis.db import fetch_at_once
from services.chassis.process import private_http, until_stopped

log = structlog.get_logger(__name__)

# How long the first message of a range waits for company, which bounds the number of parts that the store has to merge:
# for a moment; longer when much has come in that moment, because an insert costs the store 20 ms and 3 µs an event, and
# when the last insert was a moment ago: what trickles in all the time would keep the store and live dashboards busy.
LINGER_SECONDS = 0.05
APART_SECONDS = 0.2
_MUCH_BYTES = 256 << 10
# How often a range that grows beside an insert looks whether that has ended.
_BUSY_SECONDS = 0.01
_KEY_BYTES = 8
# How often the size of the log is looked at.
_LOOK_SECONDS = 5.0
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
# How often the store may fail at events in the same way before it is asked which of them it is.
_TRIES = 5
# What the store takes if it takes any event.
_BLAMELESS = LoggedBatch(
    workspace_id=str(UUID(int=0)), source_id=str(UUID(int=0)), events=[LoggedEvent(event="check")]
).SerializeToString()

_events = Counter("meshboard_pipeline_events_total", "Events by what became of them.", ["outcome"])
_inserted, _duplicate, _failed, _robot = (
    _events.labels(outcome) for outcome in ("inserted", "duplicate", "failed", "robot")
)
_insert_seconds = Histogram(
    "meshboard_pipeline_insert_seconds", "Seconds from having read a range to its tick."
)
_place = Gauge("meshboard_pipeline_position", "Sequence of the last message of the log that is in the store.")

# Each a transaction by itself, because they are on the way of each insert. $3 is where the row may be.
_PLAN = """
    UPDATE log_positions SET planned_sequence = $4
    WHERE log = $1 AND epoch = $2 AND last_sequence = ANY($3) AND planned_sequence = ANY($3)
    RETURNING log
"""
# Retries that have come to their end without having been refused again are no failed events any more. After a replaced
# log sequences begin again, but a watermark never falls.
_FINISH = """
    WITH moved AS (
        UPDATE log_positions SET last_sequence = $4
        WHERE log = $1 AND epoch = $2 AND last_sequence = ANY($3) AND planned_sequence = ANY($3)
        RETURNING log
    ), retried AS (
        DELETE FROM failed_events USING moved WHERE retry_id = ANY($5::uuid[])
    ), told AS (
        INSERT INTO watermarks AS before (workspace_id, source_id, watermark)
        SELECT source.*, $4 FROM moved, unnest($6::uuid[], $7::uuid[]) AS source
        ON CONFLICT (workspace_id, source_id) DO UPDATE SET watermark =
            CASE WHEN before.watermark < excluded.watermark THEN excluded.watermark ELSE before.watermark + 1 END
    )
    SELECT log FROM moved
"""

T = TypeVar("T")
B = TypeVar("B", LoggedBatch, WrittenBatch)


class OvertakenError(Exception):
    """Another pipeline has moved the place in the log."""


class _Message(NamedTuple):
    sequence: int
    payload: bytes
    headers: dict[str, str]


class _Range(NamedTuple):
    """What one insert puts into the store: the messages up to `end`, and the places of events that may be known."""

    end: int
    traces: list[dict[str, str]]
    batches: list[WrittenBatch]
    suspected: list[list[int]]


class Pipeline:
    """Inserts a range when it has `flush_bytes`, or `flush_seconds` after its first message, once the store is free.

    `enriching` is what finds out what events tell of themselves; absent: `enrich`.

    `deduplicate` is switched off by the fault test only, to see that it would notice.
    """

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        bus: Bus,
        store: EventStore,
        now: Callable[[], datetime],
        *,
        max_log_bytes: int,
        flush_bytes: int = 16 << 20,
        flush_seconds: float = 0.15,
        enriching: Callable[[LoggedBatch], None] | None = None,
        deduplicate: bool = True,
    ) -> None:
        self.max_log_bytes = max_log_bytes
        self.flush_bytes = flush_bytes
        self.flush_seconds = flush_seconds
        self.db = db
        self.bus = bus
        self.store = store
        self.now = now
        self.enrich = enriching or enrich
        self.persons = Persons(store)
        self.duplicates = Duplicates(store) if deduplicate else None
        self.alone = asyncio.Lock()  # held by who changes the store
        self._held: deque[_Message] = deque()
        self._next_look = 0.0
        self._collected = -inf  # when the range before was complete, on the loop's clock
        self._epoch = 0
        self._position = 0

    async def run(self) -> None:
        """Works until it is cancelled. Waits for whatever does not answer; ends with OvertakenError."""
        if (duplicates := self.duplicates) is not None:
            await self._persist(lambda: duplicates.remember(self.now()))
        while True:
            reader: LogReader | None = None
            try:
                reader, planned = await self._open()
                if planned > self._position:
                    messages = await self._collect_again(reader, planned)
                    await self._insert_alone(await self._prepare(messages, planned))
                await self._follow(reader)
            except LogReplacedError as error:
                log.error("event_log_replaced", error=str(error))
                await self._begin_again()
            finally:
                self._held.clear()
                if reader is not None:
                    await reader.close()

    # The place in the log

    async def _open(self) -> tuple[LogReader, int]:
        """Reads the place, and gives a reader from there, and the end of the range that was being inserted.

        Raises LogReplacedError.
        """
        log = await self._persist(lambda: self.bus.state(STREAM))

        async def read() -> LogPosition:
            async with self.db.begin() as session:
                await session.execute(insert(LogPosition).values(log=STREAM).on_conflict_do_nothing())
                row = await session.get_one(LogPosition, STREAM, with_for_update=True)
                row.log_create_time = row.log_create_time or log.create_time
                return row

        row = await self._persist(read)
        self._epoch, self._position = row.epoch, row.last_sequence
        if row.log_create_time != log.create_time:
            raise LogReplacedError(
                f"the event log is one of {log.create_time}, not that of {row.log_create_time}"
            )
        return LogReader(self.bus, self._position, log.create_time), row.planned_sequence

    async def _begin_again(self) -> None:
        async def write() -> None:
            async with self.db.begin() as session:
                await session.execute(
                    update(LogPosition)
                    .where(LogPosition.log == STREAM, LogPosition.epoch == self._epoch)
                    .values(epoch=self._epoch + 1, last_sequence=0, planned_sequence=0, log_create_time=None)
                )

        await self._persist(write)

    async def _move(self, sql: str, to: int, *arguments: object) -> None:
        """Changes the row if it is where this pipeline left it, or where a lost answer to this call has put it."""
        if not await fetch_at_once(self.db, sql, STREAM, self._epoch, [self._position, to], to, *arguments):
            raise OvertakenError(f"another pipeline has passed {self._position}")

    # A range

    async def _follow(self, reader: LogReader) -> None:
        """Inserts range after range; reads, parses and judges the next while the store is busy with the one before."""
        inserting: asyncio.Task[None] | None = None
        try:
            while True:
                messages = await self._collect(reader, inserting)
                following = await self._prepare(messages, messages[-1].sequence) if messages else None
                if inserting is not None:
                    await inserting
                    inserting = None
                if following is None:
                    await self._make_room()  # the log may have filled up while the store was away
                else:
                    inserting = asyncio.create_task(self._insert_alone(following))
        except LogReplacedError:
            if inserting is not None:
                await inserting  # it is of the log that was there before
            raise
        finally:
            if inserting is not None and inserting.cancel():
                await asyncio.wait([inserting])

    async def _collect(self, reader: LogReader, inserting: asyncio.Task[None] | None) -> list[_Message]:
        """The messages of a new range: what arrives within a moment of the first; [] after a second without any.

        While the store is busy with the range before, this one grows: the more there is, the larger are the inserts.
        """
        loop = asyncio.get_running_loop()
        message = await self._next(reader, 1.0)
        messages, size, began = [], 0, loop.time()
        little = max(began + min(LINGER_SECONDS, self.flush_seconds), self._collected + APART_SECONDS)
        while message is not None:
            messages.append(message)
            size += len(message.payload)
            until = began + self.flush_seconds if size >= _MUCH_BYTES else little
            message = None
            while message is None and size < self.flush_bytes:
                left = until - loop.time()
                if left <= 0 and (inserting is None or inserting.done()):
                    break
                message = await self._next(reader, left if left > 0 else _BUSY_SECONDS)
        if messages:
            self._collected = loop.time()
        return messages

    async def _collect_again(self, reader: LogReader, end: int) -> list[_Message]:
        """The messages of the range that was being inserted, as far as the log still has them."""
        messages = []
        while reader.position < end or self._held:
            message = await self._next(reader, 1.0)
            if message is not None and message.sequence > end:
                self._held.appendleft(message)
                break
            if message is not None:
                messages.append(message)
        return messages

    async def _prepare(self, messages: Sequence[_Message], end: int) -> _Range:
        """All that can be found out about a range without the store."""
        crash_points.reached("fetch")
        batches = await self._read(messages)
        crash_points.reached("read")
        duplicates = self.duplicates
        suspected = [duplicates.suspects(batch) for batch in batches] if duplicates else []
        return _Range(end, [message.headers for message in messages], batches, suspected)

    async def _next(self, reader: LogReader, timeout: float) -> _Message | None:
        if not self._held and timeout > 0:
            try:
                for delivery in await reader.fetch(timeout):
                    self._held.append(_Message(delivery.sequence, delivery.payload, dict(delivery.headers)))
            except BusError as error:
                log.warning("event_log_away", error=str(error))
                await asyncio.sleep(_RETRY_SECONDS[-1])
        return self._held.popleft() if self._held else None

    async def _insert_alone(self, prepared: _Range) -> None:
        async with self.alone:
            await self._insert_range(prepared)

    async def _insert_range(self, prepared: _Range) -> None:
        end, batches = prepared.end, prepared.batches
        token = f"{STREAM} {self._epoch} {self._position + 1}-{end}" if self.duplicates else ""
        sources = {(batch.workspace_id, batch.source_id) for batch in batches}
        retry_ids = [retry_id for batch in batches for retry_id in batch.retry_ids]
        with _insert_seconds.time(), telemetry.span("pipeline", "CONSUMER", links=prepared.traces):
            if (duplicates := self.duplicates) is not None:
                _duplicate.inc(await self._persist(lambda: duplicates.drop(batches, prepared.suspected)))
            batches = [batch for batch in batches if batch.events]
            crash_points.reached("drop")
            await self._persist(lambda: self._plan(end))
            crash_points.reached("plan")
            # Before the events: who sees one also sees whose it is, and what is dropped after a crash has been linked.
            links = links_of(batches)
            await self._persist(lambda: self.persons.link(links, (self._epoch << 44) + end))
            crash_points.reached("link")
            await self._insert(batches, token, retry_ids)
            crash_points.reached("insert")
            await self._persist(lambda: self._finish(end, sources, retry_ids))
            crash_points.reached("finish")
        self._position = end
        _place.set(end)
        await self._tell(end, sources)
        crash_points.reached("tell")
        await self._make_room()

    async def _read(self, messages: Sequence[_Message]) -> list[WrittenBatch]:
        """The batches that messages hold, enriched; what cannot be read or enriched is put among the failed events."""
        batches, failures = [], []
        for message in messages:
            try:
                batch = WrittenBatch.FromString(message.payload)
                UUID(batch.workspace_id), UUID(batch.source_id), batch.receive_time.ToDatetime()
                batch.sequence = message.sequence
                if _KEY_BYTES * len(batch.events) != sum(map(len, batch.keys)):
                    batch, refused = self._enriched(LoggedBatch.FromString(message.payload), message)
                    failures += refused
            except (DecodeError, ValueError, OverflowError) as error:
                failures.append(
                    Failure(LoggedBatch(sequence=message.sequence), message.payload, "read", error)
                )
                continue
            batches.append(batch)
        await self._fail(failures)
        return batches

    def _enriched(self, batch: LoggedBatch, message: _Message) -> tuple[WrittenBatch, list[Failure]]:
        """What ingest has left as it was sent."""
        batch.sequence = message.sequence
        failures: list[Failure] = []
        try:
            self.enrich(batch)
        except Exception:  # whatever it is, it must not hold up the others
            log.exception("batch_not_enriched", sequence=message.sequence)
            failures = self._enrich_one_by_one(batch, message.payload)
        return written(batch), failures

    def _enrich_one_by_one(self, batch: LoggedBatch, payload: bytes) -> list[Failure]:
        """Leaves the events in the batch that can be enriched, and gives the others."""
        failures = []
        original = LoggedBatch.FromString(payload)
        del batch.events[:]
        head = _with_events(batch, [])
        for event in original.events:
            alone = _with_events(head, [event])
            try:
                self.enrich(alone)
            except Exception as error:
                failed = _with_events(head, [event]).SerializeToString()
                failures.append(Failure(alone, failed, "enrich", error, batch.retry_ids))
            else:
                batch.events.extend(alone.events)
        return failures

    async def _plan(self, end: int) -> None:
        await self._move(_PLAN, end)

    async def _finish(self, end: int, sources: set[tuple[str, str]], retry_ids: Sequence[str]) -> None:
        workspace_ids, source_ids = zip(*sorted(sources), strict=True) if sources else ((), ())
        await self._move(_FINISH, end, retry_ids, workspace_ids, source_ids)

    async def _insert(self, batches: Sequence[WrittenBatch], token: str, retry_ids: Sequence[str]) -> None:
        """Inserts all of them, in one insert also when the store refuses some."""
        while batches:
            data = [batch.SerializeToString() for batch in batches]
            try:
                await self._persist(partial(insert_events, self.store, data, token), tries=_TRIES)
            except EventStoreError:
                await self._persist(lambda: prepare_check(self.store))
                # Pieces have no token of their own: after a crash halfway they would be other ones.
                batches, failures = await self._sort_out(batches, retry_ids)
                await self._fail(failures)
                if not failures:  # it is not the events: the disk is full, or the like
                    await asyncio.sleep(_RETRY_SECONDS[-1])
            else:
                _inserted.inc(sum(len(batch.events) for batch in batches))
                return

    async def _sort_out(
        self, batches: Sequence[WrittenBatch], retry_ids: Sequence[str]
    ) -> tuple[list[WrittenBatch], list[Failure]]:
        """What the store takes, and the events that it refuses; halves what has both."""
        data = [batch.SerializeToString() for batch in batches]
        halves = _halves(batches)
        error = await self._refusal(data, 1 if halves else _TRIES)
        if error is None:
            return list(batches), []
        if halves is None:
            # Without the text, which quotes the event.
            log.error("event_refused", sequence=batches[0].sequence, code=error.code)
            return [], [Failure(LoggedBatch.FromString(data[0]), data[0], "insert", error, retry_ids)]
        (one, refused), (other, also_refused) = [await self._sort_out(half, retry_ids) for half in halves]
        return one + other, refused + also_refused

    async def _refusal(self, data: Sequence[bytes], tries: int) -> EventStoreError | None:
        """What the store says against these events. What it says against any event is its own trouble: that passes."""
        while True:
            try:
                await self._persist(lambda: check_events(self.store, data), tries=tries)
                return None
            except DataRefusedError as error:
                return error
            except EventStoreError as error:
                with suppress(EventStoreError):
                    await self._persist(lambda: check_events(self.store, [_BLAMELESS]), tries=1)
                    return error
            await asyncio.sleep(_RETRY_SECONDS[-1])
            await self._persist(lambda: prepare_check(self.store))

    async def _fail(self, failures: Sequence[Failure]) -> None:
        if failures:
            await self._persist(lambda: note_failures(self.db, failures, self._epoch, self.now()))
            _failed.inc(len(failures))

    async def _tell(self, watermark: int, sources: set[tuple[str, str]]) -> None:
        for workspace_id, source_id in sources:
            tick = Tick(workspace_id=workspace_id, source_id=source_id, watermark=watermark)
            await self.bus.emit(f"tick.{source_id}", tick.SerializeToString())

    async def _make_room(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        try:
            await make_room(self.bus, self.max_log_bytes, self._position)
        except BusError as error:
            log.warning("event_log_away", error=str(error))

    async def _persist(self, attempt: Callable[[], Awaitable[T]], *, tries: float = inf) -> T:
        """Repeats what fails because Postgres, the store or the log is away, for as long as it takes.

        Raises DataRefusedError at once, and another error of the store when it comes `tries` times on end.
        """
        failures = same = code = 0
        while True:
            try:
                return await attempt()
            except DataRefusedError:
                raise
            except (UnavailableError, EventStoreError, BusError, OSError, exc.SQLAlchemyError) as error:
                # Not the text of the store's errors, which may quote events.
                why = f"{error.code}" if isinstance(error, EventStoreError) else str(error)[:300]
                log.warning("pipeline_waits", error=f"{type(error).__name__}: {why}", failures=failures)
                last, code = code, error.code if isinstance(error, EventStoreError) else 0
                same = same + 1 if code == last else 1
                if code and same >= tries:
                    raise
                await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1


def enrich(batch: LoggedBatch) -> None:
    """Fills in what the user agent tells, and drops robots where the source wants none.

    What a URL tells, the engine finds out by itself.
    """
    for event in batch.events:
        if event.user_agent:
            event.browser, event.os, event.device, event.is_robot = parse_user_agent(event.user_agent)
    if batch.robots == Source.DROP:
        robots = [index for index, event in enumerate(batch.events) if event.is_robot]
        for index in reversed(robots):
            del batch.events[index]
        _robot.inc(len(robots))
    elif batch.robots == Source.KEEP:
        for event in batch.events:
            event.is_robot = False


def written(batch: LoggedBatch) -> WrittenBatch:
    """The same as ingest hands it over: nothing is to be found out of its events any more."""
    made = WrittenBatch.FromString(batch.SerializeToString())
    made.keys[:] = [keys_of(batch.source_id, (event.insert_id.encode() for event in batch.events))]
    made.has_links = any(event.previous_id for event in batch.events)
    return made


def _halves(batches: Sequence[WrittenBatch]) -> tuple[list[WrittenBatch], list[WrittenBatch]] | None:
    """Two parts that have an event each at least; None for a single event."""
    if len(batches) > 1:
        middle = len(batches) // 2
        return list(batches[:middle]), list(batches[middle:])
    (batch,) = batches
    if len(batch.events) == 1:
        return None
    middle = len(batch.events) // 2
    return [_with_events(batch, batch.events[:middle])], [_with_events(batch, batch.events[middle:])]


def _with_events(batch: B, events: Iterable[Any]) -> B:
    """A batch of the same source and moment."""
    other = type(batch)()
    other.CopyFrom(batch)
    del other.events[:]
    other.ClearField("retry_ids")
    other.ClearField("keys")
    other.events.extend(events)
    return other


async def serve(settings: AnalyticsSettings) -> None:
    """Runs the pipeline until the process is told to stop."""
    crash_points.arm(settings.crash_at)
    await db.migrate(settings.postgres_url, "services.analytics_svc")
    sessions = db.connect(settings.postgres_url, pool_size=4)
    store = EventStore(settings.event_store_url, cluster=settings.event_store_cluster)
    await create_tables(store)
    bus = await Bus.connect(settings.nats_url, "pipeline")
    await ensure_log(bus, settings.event_log_bytes)
    pipeline = Pipeline(
        sessions,
        bus,
        store,
        lambda: datetime.now(UTC),
        max_log_bytes=settings.event_log_bytes,
        flush_bytes=settings.flush_bytes,
        flush_seconds=settings.flush_seconds,
        deduplicate=not settings.unsafe_no_deduplication,
    )
    retention = Retention(sessions, store, pipeline.now, pipeline.alone)

    async def ready() -> bool:
        return bus.connected and await store.ready() and await db.ready(sessions)

    private = await private_http(settings.private_listen, ready)
    try:
        await until_stopped(pipeline.run(), bus.beat("beat.pipeline"), retention.run(), follow_store(store))
    finally:
        await private.cleanup()
        await bus.close()
        await store.close()
        await db.engine(sessions).dispose()
