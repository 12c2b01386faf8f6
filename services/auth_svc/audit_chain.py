"""The chain of audit entries: each seal covers the entry and the seal before it, so that no change goes unseen.

    seal = fingerprint of the key (4 bytes) || HMAC-SHA256(key, seal before || position (8 bytes, big-endian) || entry)

The seal before the first one is empty. The entry is the JSON array that `canonical` makes, a form of its own: what
protobuf writes may differ between versions. Keys are derived from the master key; the fingerprint says from which one,
so that old seals can be verified after it has changed.

Who can write to the tables but does not know the key can neither change nor remove an entry unseen. The last ones are
held by the heads that were published on NATS, which keeps them for a week.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from meshboard.auth.v1.events_pb2 import AuditEntrySealed, AuditHeadPublished
from sqlalchemy import and_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.audit import Entry, entry_to_pb
from services.auth_svc.models import AuditEntryRow, AuditSeal
from services.auth_svc.settings import AuthSettings
from services.chassis import outbox
from services.chassis.bus import DOMAIN, Bus, BusError
from services.chassis.db import Rows, driver_connection, new_id
from services.chassis.times import timestamp_of

log = structlog.get_logger(__name__)

PURPOSE = "audit"

# "seal" in ASCII: the advisory lock of the one sealer of a database.
_LOCK = 0x7365616C
_ROUND_SECONDS = 1.0
_HEAD_SECONDS = 3600.0
_BATCH = 500
_PAUSE = 3
_FINGERPRINT_BYTES = 4
_CHUNK = 1000
_PROBLEMS_KEPT = 100

# As text, for the driver itself: each sign-in has an entry, and the ORM took longer to seal it than to write it.
_UNSEALED = f"""
    SELECT {", ".join(f"audit_entries.{name}{'::text' * name.endswith('_id')}" for name in Entry._fields)}
    FROM audit_unsealed JOIN audit_entries USING (audit_entry_id)
    ORDER BY time, audit_entries.audit_entry_id LIMIT $1
"""  # noqa: S608 - names of columns
_HEAD = "SELECT position, seal FROM audit_seals ORDER BY position DESC LIMIT 1"
_SEALED = "DELETE FROM audit_unsealed WHERE audit_entry_id = ANY($1)"


def canonical(row: AuditEntryRow | Entry) -> bytes:
    """The entry as it is sealed: a JSON array in ASCII without spaces, names in `details` sorted.

    Its items are the number 1 (the version of this form), id, time in microseconds since 1970, kind, outcome, reason,
    actor, impersonator, subject, workspace or "", session, address, details.
    """
    microseconds = (row.time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    fields = [
        1,
        row.audit_entry_id,
        microseconds,
        row.kind,
        row.outcome,
        row.reason,
        row.actor_id,
        row.impersonator_id,
        row.subject_id,
        row.workspace_id or "",
        row.session_id,
        row.address,
        row.details,
    ]
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


class ChainKeys:
    """Makes seals with the first of the keys (32 bytes each), and checks those of any."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {hashlib.sha256(key).digest()[:_FINGERPRINT_BYTES]: key for key in keys}
        self._current = next(iter(self._keys))

    def seal(self, before: bytes, position: int, row: AuditEntryRow | Entry) -> bytes:
        """The seal of an entry at this position, after the seal `before`."""
        return self._seal(self._current, before, position, row)

    def knows(self, seal: bytes) -> bool:
        """Whether the key of the seal is at hand."""
        return seal[:_FINGERPRINT_BYTES] in self._keys

    def is_right(self, seal: bytes, before: bytes, position: int, row: AuditEntryRow | Entry) -> bool:
        """Whether this is the entry's seal."""
        fingerprint = seal[:_FINGERPRINT_BYTES]
        return fingerprint in self._keys and hmac.compare_digest(
            seal, self._seal(fingerprint, before, position, row)
        )

    def _seal(self, fingerprint: bytes, before: bytes, position: int, row: AuditEntryRow | Entry) -> bytes:
        content = before + position.to_bytes(8, "big") + canonical(row)
        return fingerprint + hmac.digest(self._keys[fingerprint], content, "sha256")


def chain_keys(settings: AuthSettings) -> ChainKeys:
    """The keys of the chain."""
    return ChainKeys(settings.derived_keys(PURPOSE))


class Sealer:
    """Seals what was committed. Any number may run: the lock of a round lets one of them work."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], keys: ChainKeys, now: Callable[[], datetime]
    ) -> None:
        self._db = db
        self._keys = keys
        self._now = now
        self._next_head = 0.0

    async def run(self) -> None:
        """Seals each second until it is cancelled, through restarts of Postgres."""
        while True:
            try:
                # Batch by batch: a long transaction would hold up who waits for the lock.
                while await self.round() == _BATCH:
                    pass
            except (OSError, TimeoutError, SQLAlchemyError) as error:
                log.warning("sealing_failed", error=repr(error))
            await asyncio.sleep(_ROUND_SECONDS)

    async def round(self) -> int:
        """Seals at most 500 entries, the oldest first, and says how many; 0 also when another sealer is at work."""
        start, now = time.monotonic(), self._now()
        async with driver_connection(self._db) as connection, connection.transaction():
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                return 0
            rows = [Entry(*found) for found in await connection.fetch(_UNSEALED, _BATCH)]
            if not rows and start < self._next_head:
                return 0
            head = await connection.fetchrow(_HEAD)
            position, seal = head or (0, b"")
            added = Rows()
            for row in rows:
                position += 1
                seal = self._keys.seal(seal, position, row)
                added.add(AuditSeal(position=position, audit_entry_id=row.audit_entry_id, seal=seal))
                sealed = AuditEntrySealed(audit_entry=entry_to_pb(row, position), seal=seal)
                outbox.add(added, sealed, workspace_id=row.workspace_id or "")
                if position % _PAUSE == 0:
                    await asyncio.sleep(0)  # calls come in between
            if position:
                published = AuditHeadPublished(position=position, seal=seal, time=timestamp_of(now))
                outbox.add(added, published)
            await added.insert(connection)
            await connection.execute(_SEALED, [row.audit_entry_id for row in rows])
        self._next_head = start + _HEAD_SECONDS
        return len(rows)


@dataclass
class Report:
    """What `verify` has found. At most 100 of the problems are kept; `problem_count` is of all.

    `tail_unknown` says why the end of the chain could not be held against the published heads; "" when it was.
    """

    positions: int = 0
    seal: bytes = b""
    heads: int = 0
    problems: list[str] = field(default_factory=list)
    problem_count: int = 0
    tail_unknown: str = ""

    def add(self, problem: str) -> None:
        """Notes a problem."""
        self.problem_count += 1
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append(problem)


async def verify(
    db: async_sessionmaker[AsyncSession],
    keys: ChainKeys,
    bus: Bus | None,
    *,
    patience_seconds: float = 10,
) -> Report:
    """Holds the tables against the chain, and the chain against the published heads, in bounded memory.

    An entry may be without a seal for `patience_seconds`.
    """
    report = Report()
    await _walk(db, keys, report)
    await _find_unsealed(db, report, patience_seconds)
    try:
        if bus is None:
            raise BusError("no NATS server with JetStream answers")
        await _compare_heads(db, bus, report)
    except BusError as error:
        report.tail_unknown = str(error)
    return report


async def _walk(db: async_sessionmaker[AsyncSession], keys: ChainKeys, report: Report) -> None:
    # None: the seal before is not there, so that a seal cannot be computed.
    before: bytes | None = b""
    async for seal, row in _chain(db):
        position, expected = seal.position, report.positions + 1
        if position != expected:
            gap = f"{expected}" if position == expected + 1 else f"{expected} to {position - 1}"
            report.add(f"position {gap}: the seal has been removed")
            before = None
        if row is None:
            report.add(f"position {position}: the entry {seal.audit_entry_id} has been removed")
        elif not keys.knows(seal.seal):
            report.add(f"position {position}: sealed with a key that the master key file does not have")
        elif before is not None and not keys.is_right(seal.seal, before, position, row):
            report.add(
                f"position {position}: the entry {row.audit_entry_id} ({row.kind}), its seal or the seal before"
                " has been changed"
            )
        before = seal.seal
        report.positions, report.seal = position, seal.seal


async def _chain(
    db: async_sessionmaker[AsyncSession],
) -> AsyncIterator[tuple[AuditSeal, AuditEntryRow | None]]:
    last = 0
    while True:
        async with db() as session:
            pairs = (
                await session.execute(
                    select(AuditSeal, AuditEntryRow)
                    .outerjoin(AuditEntryRow, AuditEntryRow.audit_entry_id == AuditSeal.audit_entry_id)
                    .where(AuditSeal.position > last)
                    .order_by(AuditSeal.position)
                    .limit(_CHUNK)
                )
            ).all()
        for seal, row in pairs:
            yield seal, row
        if len(pairs) < _CHUNK:
            return
        last = pairs[-1][0].position


async def _find_unsealed(
    db: async_sessionmaker[AsyncSession], report: Report, patience_seconds: float
) -> None:
    last = str(UUID(int=0))
    # Ids and not times: the time of an entry is when it happened, which may be before it was heard of.
    milliseconds = (UUID(new_id()).int >> 80) - int(patience_seconds * 1000)  # RFC 9562, section 5.7
    newest = str(UUID(int=milliseconds << 80))
    while True:
        # The range holds for the seals as well: else Postgres reads them from the beginning, for each chunk.
        in_both = and_(
            AuditSeal.audit_entry_id == AuditEntryRow.audit_entry_id,
            AuditSeal.audit_entry_id > last,
            AuditSeal.audit_entry_id < newest,
        )
        async with db() as session:
            found = (
                await session.execute(
                    select(AuditEntryRow.audit_entry_id, AuditSeal.position)
                    .outerjoin(AuditSeal, in_both)
                    .where(AuditEntryRow.audit_entry_id > last, AuditEntryRow.audit_entry_id < newest)
                    .order_by(AuditEntryRow.audit_entry_id)
                    .limit(_CHUNK)
                )
            ).all()
        for audit_entry_id, position in found:
            if position is None:
                report.add(f"no position: the entry {audit_entry_id} has not been sealed")
        if len(found) < _CHUNK:
            return
        last = found[-1][0]


async def _compare_heads(db: async_sessionmaker[AsyncSession], bus: Bus, report: Report) -> None:
    """All heads that NATS has, and not the last one only: the chain may have grown again since it was cut."""
    subject = AuditHeadPublished.DESCRIPTOR.full_name
    newest = await bus.last(DOMAIN, subject)
    if newest is None:
        report.tail_unknown = "NATS has no head of the chain"
        return
    heads = await bus.pull(
        DOMAIN, f"audit-verify-{new_id()}", subject=subject, inactive_seconds=60, acks=False
    )
    try:
        sequence = 0
        while sequence < newest.sequence:
            deliveries = await heads.fetch(_CHUNK, timeout=10)
            if not deliveries:
                raise BusError("NATS stopped in the middle of the heads")
            published = [AuditHeadPublished.FromString(delivery.payload) for delivery in deliveries]
            await _compare(db, published, report)
            sequence = deliveries[-1].sequence
    finally:
        await heads.close()


async def _compare(
    db: async_sessionmaker[AsyncSession], heads: Sequence[AuditHeadPublished], report: Report
) -> None:
    async with db() as session:
        rows: Any = await session.execute(
            select(AuditSeal.position, AuditSeal.seal).where(
                AuditSeal.position.in_({head.position for head in heads})
            )
        )
        seals: dict[int, bytes] = dict(rows.all())
    for head in heads:
        report.heads += 1
        when = head.time.ToDatetime(UTC).isoformat(timespec="seconds")
        if head.position not in seals:
            report.add(f"position {head.position}: published at {when}, and not in the table")
        elif seals[head.position] != head.seal:
            report.add(f"position {head.position}: published at {when} with another seal")
