"""The event log: a JetStream stream of accepted events, which the pipeline reads into the store.

A message is a serialized `LoggedBatch` of one source, on the subject of the source. JetStream syncs each write, so what
is confirmed is on disk.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.source_pb2 import Source
from uuid_utils.compat import uuid7

from services.analytics_svc import crash_points
from services.chassis import telemetry
from services.chassis.bus import Bus, BusError, Delivery, PullConsumer

STREAM = "EVENTS"
# Below NATS' max_payload of 8 MiB.
MAX_PUBLISH_BYTES = 6 << 20
MAX_LOG_SECONDS = 30 * 86_400.0
PUBLISH_SECONDS = 10.0
# How long small requests that came while another was published wait for more of them: a publish costs NATS and the
# pipeline as much as the whole way of some events.
GATHER_SECONDS = 0.003
_SMALL_BYTES = 64 << 10
_FETCH_AT_ONCE = 64
_CHECK_SECONDS = 2.0


async def ensure_log(bus: Bus, max_bytes: int) -> None:
    """Makes the stream. It forgets by age, and when it is full it refuses new events. Raises BusError."""
    await bus.ensure_stream(
        STREAM, ["events.>"], max_age_seconds=MAX_LOG_SECONDS, max_bytes=max_bytes, discard_new=True
    )


async def make_room(bus: Bus, max_bytes: int, position: int) -> None:
    """Removes the oldest quarter of what has been read up to `position` when four fifths of the log are full.

    So the log is never full of what the store has, and never loses what it has not. Raises BusError.
    """
    log = await bus.state(STREAM)
    if log.size > max_bytes * 4 // 5:
        await bus.trim(STREAM, log.first + (position - log.first + 4) // 4)


@dataclass(slots=True)
class _Group:
    """Events of one source that are published together, and the traces of the requests that brought them."""

    events: list[bytes] = field(default_factory=list)
    traces: list[dict[str, str]] = field(default_factory=list)
    size: int = 0
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class EventLog:
    """Appends events. Requests that come while an earlier publish of their source is under way share the next one.

    Who comes alone is served at once.
    """

    def __init__(self, bus: Bus, now: Callable[[], datetime]) -> None:
        self._bus = bus
        self._now = now
        self._waiting: dict[str, deque[_Group]] = {}
        self._publishing: set[asyncio.Task[None]] = set()

    async def append(self, source: Source, events: bytes) -> None:
        """Returns when the events, field 2 of a serialized LoggedBatch, are on disk. Raises BusError."""
        crash_points.reached("receive")
        groups = self._waiting.get(source.source_id)
        if groups is None:
            groups = self._waiting[source.source_id] = deque()
            task = asyncio.create_task(self._publish_groups(source, groups))
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)
        if not groups or groups[-1].size + len(events) > MAX_PUBLISH_BYTES:
            groups.append(_Group())
        group = groups[-1]
        group.events.append(events)
        group.traces.append(telemetry.trace_headers())
        group.size += len(events)
        await asyncio.shield(group.done)  # whoever goes away leaves the others their answer
        crash_points.reached("publish")

    async def _publish_groups(self, source: Source, groups: deque[_Group]) -> None:
        in_company = False
        while groups:
            if in_company and groups[0].size < _SMALL_BYTES:
                await asyncio.sleep(GATHER_SECONDS)
            in_company = True
            group = groups.popleft()
            try:
                # In the trace of the first request, linked to the others: the task began in an earlier one.
                with telemetry.span("append events", carrier=group.traces[0], links=group.traces[1:]):
                    await self._publish(source, group.events)
            except Exception as error:  # it is for those who wait
                group.done.set_exception(error)
                group.done.exception()  # it may be that nobody waits any more
            else:
                group.done.set_result(None)
        del self._waiting[source.source_id]

    async def _publish(self, source: Source, events: list[bytes]) -> None:
        head = LoggedBatch(
            workspace_id=source.workspace_id,
            source_id=source.source_id,
            robots=source.robots,
            retention_days=source.retention_days,
        )
        head.receive_time.FromDatetime(self._now())
        subject = f"events.{source.workspace_id}.{source.source_id}"
        payload = b"".join([*events, head.SerializeToString()])
        # The id lets the bus send it again when the connection breaks.
        await self._bus.publish(subject, payload, message_id=uuid7().hex, timeout=PUBLISH_SECONDS)


class LogReader:
    """Reads the log that was made at `create_time` in order, each message once, from the one after `position`."""

    def __init__(self, bus: Bus, position: int, create_time: datetime) -> None:
        self.position = position
        self._create_time = create_time
        self._bus = bus
        self._consumer: PullConsumer | None = None
        self._continues = False
        self._next_check = 0.0

    async def fetch(self, timeout: float) -> list[Delivery]:
        """The next messages, in order; [] after `timeout` seconds. Raises BusError, and LogReplacedError."""
        if self._consumer is None:
            # A consumer of its own for each attempt: what was brought to an earlier one is brought again.
            self._continues = False
            self._consumer = await self._bus.pull(
                STREAM,
                f"pipeline-{uuid7().hex}",
                start_sequence=self.position + 1,
                acks=False,
                inactive_seconds=60,
            )
            try:
                await self._check_log()
            except (BusError, LogReplacedError):
                await self.close()
                raise
        found = await self._consumer.fetch(_FETCH_AT_ONCE, timeout)
        if self._consumer.remade:
            # What it brings may be of another log: the next one begins behind what has been read, and is checked.
            await self.close()
            return []
        messages: list[Delivery] = []
        for delivery in found:
            if delivery.sequence <= self.position:
                continue
            if self._continues and delivery.sequence != self.position + 1:
                # Either lost with a connection, or gone from the log: a new consumer will tell.
                await self.close()
                return messages
            self.position, self._continues = delivery.sequence, True
            messages.append(delivery)
        if not messages and time.monotonic() >= self._next_check:
            await self._check_log()
        return messages

    async def close(self) -> None:
        """Gives the consumer back."""
        if self._consumer is not None:
            await self._consumer.close()
            self._consumer = None

    async def _check_log(self) -> None:
        self._next_check = time.monotonic() + _CHECK_SECONDS
        log = await self._bus.state(STREAM)
        if log.create_time != self._create_time:
            raise LogReplacedError(
                f"the event log is one of {log.create_time}, and that of {self._create_time} was read"
            )
        if log.last < self.position:
            raise LogReplacedError(f"the event log ends at {log.last}, and {self.position} has been read")


class LogReplacedError(Exception):
    """The log is a new one, whose sequences begin again."""
