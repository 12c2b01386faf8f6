"""Domain events leave through a table: an event is published if and only if what it tells was committed.

`add` writes the event in the caller's transaction. The `Relay` reads what is not marked, publishes it, and
marks it after JetStream's acknowledgement. A crash in between publishes again: JetStream drops the repetition
within two minutes, and the consumers' inbox drops it for ever.
"""

import asyncio
import contextlib
import json
import time
from contextvars import ContextVar

import asyncpg
import structlog
from google.protobuf.message import Message
from prometheus_client import Gauge
from uuid_utils.compat import uuid7

from services.chassis import telemetry
from services.chassis.bus import BEAT_SECONDS, Bus, Outgoing
from services.chassis.db import Adds, OutboxRow

log = structlog.get_logger(__name__)

EVENT_ID = "Event-Id"
WORKSPACE_ID = "Workspace-Id"
ACTOR = "Actor"

# Who causes the current change, and on whose behalf. The authentication stage sets it for a call, the inbox
# for a consumed event, so that a consequence names whoever caused the first event.
actor: ContextVar[str] = ContextVar("actor", default="")

MAX_EVENT_BYTES = 1 << 20

# "outb" in ASCII: the advisory lock of the one relay of a database.
_RELAY_LOCK = 0x6F757462
# The last one is what asyncpg says of a connection that broke in the middle of an answer.
_INTERRUPTIONS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_BATCH = 256
_REST_SECONDS = 0.1
_MEASURE_SECONDS = 5
_SWEEP_SECONDS = 600

_pending = Gauge(
    "meshboard_outbox_pending",
    "Domain events that wait to be published.",
    ["service"],
    multiprocess_mode="mostrecent",
)
_oldest = Gauge(
    "meshboard_outbox_oldest_seconds",
    "Age of the oldest domain event that waits.",
    ["service"],
    multiprocess_mode="mostrecent",
)


def add(session: Adds, message: Message, *, workspace_id: str = "") -> str:
    """Adds a domain event to the caller's transaction, and gives its id.

    Raises ValueError for a message of more than 1 MiB: an event names what changed, it does not carry files.
    """
    payload = message.SerializeToString()
    if len(payload) > MAX_EVENT_BYTES:
        raise ValueError(f"{message.DESCRIPTOR.full_name} has {len(payload)} bytes")
    headers = telemetry.trace_headers()
    if workspace_id:
        headers[WORKSPACE_ID] = workspace_id
    if who := actor.get():
        headers[ACTOR] = who
    event_id = str(uuid7())
    session.add(
        OutboxRow(id=event_id, subject=message.DESCRIPTOR.full_name, payload=payload, headers=headers)
    )
    return event_id


async def _try_lock(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _RELAY_LOCK))


class Relay:
    """Publishes the outbox of one database. Any number may run: one works, the others wait for its lock.

    While everything committed is published it emits `beat.<service>`, which tells caches of this service's
    data that they have heard all there is to hear.
    """

    def __init__(self, url: str, bus: Bus, service: str) -> None:
        """`url` must lead to Postgres itself: a lock and LISTEN need a connection that no pooler shares."""
        self._url = url
        self._bus = bus
        self._service = service
        self._published = 0  # in this round
        self._next_measure = 0.0
        self._next_sweep = 0.0

    async def run(self) -> None:
        """Works until it is cancelled, through restarts of Postgres and NATS."""
        while True:
            try:
                await self._connect_and_relay()
            except _INTERRUPTIONS as error:
                log.warning("relay_interrupted", service=self._service, error=repr(error))
                await asyncio.sleep(0.5)

    async def _connect_and_relay(self) -> None:
        connection = await asyncpg.connect(
            self._url,
            timeout=5,
            command_timeout=10,
            server_settings={"application_name": f"meshboard {self._service} relay"},
        )
        try:
            while not await _try_lock(connection):  # noqa: ASYNC110 - the holder is in another process
                await asyncio.sleep(1)
            log.info("relay_started", service=self._service)
            committed = asyncio.Event()
            await connection.add_listener("outbox", lambda *_: committed.set())
            while True:
                committed.clear()
                self._published = 0
                if await self._publish_pending(connection):
                    await self._bus.emit(f"beat.{self._service}")
                await self._measure(connection)
                await self._sweep(connection)
                if self._published:
                    # What comes by itself leaves at once. What comes in the company of others leaves with them: to
                    # select, mark and beat costs more than to publish.
                    await asyncio.sleep(_REST_SECONDS)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_SECONDS):
                        await committed.wait()
        finally:
            connection.terminate()

    async def _publish_pending(self, connection: asyncpg.Connection) -> bool:
        """Says whether everything that was committed before the call is published."""
        while True:
            rows = await connection.fetch(
                # By the mark and not by `id > last`: ids are taken before the commit, so that a smaller one may
                # become visible after a larger one was published.
                "SELECT id, subject, payload, headers FROM outbox"
                " WHERE publish_time IS NULL ORDER BY id LIMIT $1",
                _BATCH,
            )
            if not rows:
                return True
            outcomes = await self._bus.publish_many(
                [
                    Outgoing(
                        row["subject"],
                        row["payload"],
                        message_id=str(row["id"]),
                        headers={**json.loads(row["headers"]), EVENT_ID: str(row["id"])},
                    )
                    for row in rows
                ]
            )
            self._published += len(rows)
            failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            await connection.execute(
                "UPDATE outbox SET publish_time = now() WHERE id = ANY($1)",
                [row["id"] for row, outcome in zip(rows, outcomes, strict=True) if isinstance(outcome, int)],
            )
            if failures:
                log.warning(
                    "publish_failed", service=self._service, count=len(failures), error=str(failures[0])
                )
                return False
            if len(rows) < _BATCH:
                return True

    async def _measure(self, connection: asyncpg.Connection) -> None:
        if time.monotonic() < self._next_measure:
            return
        self._next_measure = time.monotonic() + _MEASURE_SECONDS
        row = await connection.fetchrow(
            "SELECT count(*) AS count, coalesce(extract(epoch FROM now() - min(create_time)), 0) AS seconds"
            " FROM outbox WHERE publish_time IS NULL"
        )
        _pending.labels(self._service).set(row["count"])
        _oldest.labels(self._service).set(row["seconds"])

    async def _sweep(self, connection: asyncpg.Connection) -> None:
        if time.monotonic() < self._next_sweep:
            return
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        await connection.execute(
            "DELETE FROM outbox WHERE id IN"
            " (SELECT id FROM outbox WHERE publish_time < now() - interval '7 days' LIMIT 10000)"
        )
