"""Domain events take effect exactly once: the id of an event is written in the transaction of its effect.
(`Repeatable` handlers, whose effect is the same however often, do without.)

Each type of event has a durable consumer per service. So a new type starts at the stream's beginning, an old
replica takes nothing away from a new one during a roll-out, and a type whose handler fails holds up no other.
Events may arrive in any order.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog
from google.protobuf.message import Message
from prometheus_client import Counter
from sqlalchemy import delete, func, text
from sqlalchemy import event as events
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import outbox, telemetry
from services.chassis.bus import DOMAIN, Bus, BusError, Delivery, Headers
from services.chassis.db import InboxRow, ready

log = structlog.get_logger(__name__)

Handler = Callable[[AsyncSession, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Repeatable:
    """A handler that is given all events of its type that are there, and some of them again after a crash.

    For what costs too much event by event, and is the same however often it is done: nothing is written in the inbox.
    The handler has its own transaction. After each batch it rests, so that what comes meanwhile is one batch more.
    """

    handle: Callable[[Sequence[Any]], Awaitable[None]]


# Seconds until the second attempt, the third, …; after the last one the event is a dead letter.
BACKOFF_SECONDS = (1.0, 5.0, 30.0, 120.0, 600.0)

_BATCH = 16
# For who is given many at a time; with the rest between batches it bounds how fast a consumer catches up.
_REPEATABLE_BATCH = 500
_REST_SECONDS = 0.5
_HANDLER_SECONDS = 20  # less than the consumer's ack_wait
_SWEEP_SECONDS = 3600

_events = Counter("meshboard_events_consumed", "Domain events by outcome.", ["service", "event", "outcome"])


@dataclass(frozen=True, slots=True)
class Event:
    """What is known of an event beside its message; `workspace_id` is "" above workspaces."""

    event_id: str
    workspace_id: str
    headers: Headers
    attempt: int
    store_time: datetime


current: ContextVar[Event] = ContextVar("event")


_afterwards: set[asyncio.Task[None]] = set()


def after_commit(session: AsyncSession, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Has a handler's work done once its transaction has committed: forgetting what is remembered of its rows.

    A crash in between loses it, so that what is forgotten must also end by itself.
    """

    def start(_: object) -> None:
        task = asyncio.get_running_loop().create_task(work())
        _afterwards.add(task)
        task.add_done_callback(_afterwards.discard)

    events.listen(session.sync_session, "after_commit", start, once=True)


async def consume(
    bus: Bus,
    db: async_sessionmaker[AsyncSession],
    service: str,
    handlers: Mapping[type[Message], Handler | Repeatable],
    *,
    backoff_seconds: Sequence[float] = BACKOFF_SECONDS,
) -> None:
    """Gives events to their handlers until it is cancelled; any number of replicas may do so at once.

    A handler writes with the session it is given, and has nothing to commit. One that raises is tried again
    after each of `backoff_seconds`; then the event is copied to the stream DEAD_LETTERS, under the subject
    `dead.<service>.<message name>`, and done with. While Postgres is away, the event waits and no attempt
    counts. Raises BusError when the consumers cannot be made.
    """
    async with asyncio.TaskGroup() as tasks:
        for message_type, handler in handlers.items():
            tasks.create_task(_Consumer(bus, db, service, message_type, handler, backoff_seconds).run())
        tasks.create_task(_sweep(db))


@dataclass(frozen=True)
class _Consumer:
    bus: Bus
    db: async_sessionmaker[AsyncSession]
    service: str
    message_type: type[Message]
    handler: Handler | Repeatable
    backoff_seconds: Sequence[float]

    @property
    def name(self) -> str:
        return self.message_type.DESCRIPTOR.full_name

    async def run(self) -> None:
        deliveries = await self.bus.pull(
            DOMAIN,
            f"{self.service}-{self.name.replace('.', '-')}",
            subject=self.name,
            inactive_seconds=30 * 86_400,
        )
        batch = _REPEATABLE_BATCH if isinstance(self.handler, Repeatable) else _BATCH
        try:
            while True:
                fetched = await deliveries.fetch(batch, timeout=60)
                if isinstance(self.handler, Repeatable) and len(fetched) > 1:
                    await self._receive_all(fetched, self.handler)
                else:
                    for delivery in fetched:
                        await self._receive(delivery)
                if isinstance(self.handler, Repeatable) and fetched:
                    await asyncio.sleep(_REST_SECONDS)
        finally:
            await deliveries.close()

    async def _receive_all(self, deliveries: Sequence[Delivery], handler: Repeatable) -> None:
        with telemetry.span(f"{self.name} process", "CONSUMER", links=[d.headers for d in deliveries]):
            try:
                async with asyncio.timeout(_HANDLER_SECONDS):
                    await handler.handle([self.message_type.FromString(d.payload) for d in deliveries])
            except Exception as error:  # one of them, perhaps
                log.warning("events_one_by_one", type=self.name, count=len(deliveries), error=repr(error))
                for delivery in deliveries:
                    await self._receive(delivery)
                return
            for delivery in deliveries:
                await delivery.ack()
        _events.labels(self.service, self.name, "done").inc(len(deliveries))

    async def _receive(self, delivery: Delivery) -> None:
        with telemetry.span(f"{self.name} process", "CONSUMER", delivery.headers):
            try:
                outcome = await self._apply(delivery)
            except Exception as error:
                outcome = await self._retry_or_bury(delivery, error)
            else:
                await delivery.ack()
        _events.labels(self.service, self.name, outcome).inc()

    async def _apply(self, delivery: Delivery) -> str:
        event = Event(
            delivery.headers[outbox.EVENT_ID],
            delivery.headers.get(outbox.WORKSPACE_ID, ""),
            delivery.headers,
            delivery.attempt,
            delivery.store_time,
        )
        message = self.message_type.FromString(delivery.payload)
        current.set(event)
        outbox.actor.set(delivery.headers.get(outbox.ACTOR, ""))
        while True:
            try:
                async with asyncio.timeout(_HANDLER_SECONDS):
                    return await self._handle(event, message)
            except (OSError, TimeoutError, SQLAlchemyError) as error:
                if await ready(self.db):
                    raise
                log.warning("event_waits_for_postgres", type=self.name, error=repr(error))
                await delivery.extend()
                await asyncio.sleep(1)

    async def _handle(self, event: Event, message: Message) -> str:
        if isinstance(self.handler, Repeatable):
            await self.handler.handle([message])
            return "done"
        async with self.db.begin() as session:
            if not await self._is_new(session, event):
                return "repeated"
            await self.handler(session, message)
        return "done"

    async def _is_new(self, session: AsyncSession, event: Event) -> bool:
        # Another replica that holds the same event makes this wait for the end of its transaction.
        written = await session.scalar(
            insert(InboxRow)
            .values(consumer=self.service, event_id=event.event_id)
            .on_conflict_do_nothing()
            .returning(InboxRow.event_id)
        )
        return written is not None

    async def _retry_or_bury(self, delivery: Delivery, error: Exception) -> str:
        log.exception(
            "event_failed",
            type=self.name,
            event_id=delivery.headers.get(outbox.EVENT_ID),
            attempt=delivery.attempt,
        )
        if delivery.attempt <= len(self.backoff_seconds):
            await delivery.nak(self.backoff_seconds[delivery.attempt - 1])
            return "failed"
        try:
            await self.bus.publish(
                f"dead.{self.service}.{delivery.subject}",
                delivery.payload,
                message_id=f"{self.service}.{delivery.sequence}",
                headers={**delivery.headers, "Error": _first_line(error)},
            )
        except BusError as lost:
            log.warning("dead_letter_failed", type=self.name, error=str(lost))
            await delivery.nak(self.backoff_seconds[-1] if self.backoff_seconds else 1)
            return "failed"
        await delivery.ack()
        return "dead"


def _first_line(error: Exception) -> str:
    # What Postgres says after the first line quotes rows.
    return f"{type(error).__name__}: {error}".partition("\n")[0][:500]


async def _sweep(db: async_sessionmaker[AsyncSession]) -> None:
    # Twice the time that streams and outboxes keep an event, after which it cannot come again.
    old = InboxRow.receive_time < func.now() - text("interval '14 days'")
    while True:
        try:
            async with db.begin() as session:
                await session.execute(delete(InboxRow).where(old))
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            log.warning("inbox_sweep_failed", error=repr(error))
        await asyncio.sleep(_SWEEP_SECONDS)
