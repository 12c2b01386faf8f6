"""Removes events whose time is over: those of a source with `retention_days`, and all of a deleted source.

The time counts from receipt. Partitions lie as tables.py says, so that what ends together is dropped together, which
costs nothing. Where a partition also has events that stay (a source that ends sooner than its neighbours, a setting
that was changed, a table from before there were such partitions), the events of a source are deleted from it by a
rewrite, once, when all that it has there are over: up to a day, a week or a month late, as the partition is long.

What a deleted source has said of persons goes with it, see persons.py.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import structlog
from prometheus_client import Counter
from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.event_log import MAX_LOG_SECONDS
from services.analytics_svc.event_store import EventStore, EventStoreError, UnavailableError
from services.analytics_svc.models import DeletedSource, Source, Watermark
from services.analytics_svc.persons import unlink

log = structlog.get_logger(__name__)

FIRST_SWEEP_SECONDS = 60.0
SWEEP_SECONDS = 3600.0
# As long as the event log may bring events of a source that is gone.
_REMEMBER_DELETED = timedelta(seconds=MAX_LOG_SECONDS) + timedelta(days=7)
_SOURCES_AT_ONCE = 1000

_dropped = Counter("meshboard_retention_dropped_partitions_total", "Partitions that were dropped.")
_deleted = Counter("meshboard_retention_rewrites_total", "Partitions from which some sources were deleted.")

SourceKey = tuple[str, str]


class _Share(NamedTuple):
    """What one source has in one partition."""

    partition_id: str
    source: SourceKey
    latest: datetime
    retention_days: int


class Retention:
    """`alone` is held by who inserts, so that nothing comes into a partition between the look at it and its end."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        store: EventStore,
        now: Callable[[], datetime],
        alone: asyncio.Lock,
    ) -> None:
        self.db = db
        self.store = store
        self.now = now
        self.alone = alone

    async def run(self) -> None:
        """Sweeps every hour until it is cancelled."""
        await asyncio.sleep(FIRST_SWEEP_SECONDS)
        while True:
            try:
                await self.sweep()
            except (EventStoreError, UnavailableError, OSError, SQLAlchemyError) as error:
                log.warning("retention_waits", error=str(error)[:300])
            await asyncio.sleep(SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Removes what is over now. Raises what the database and the store raise; call it again then."""
        async with self.alone:
            days, deleted = await self._settings()
            if not deleted and not any(days.values()):
                return
            now = self.now()
            partitions: dict[str, list[_Share]] = defaultdict(list)
            for share in await self._shares():
                partitions[share.partition_id].append(share)
            touched: set[SourceKey] = set()
            for partition_id, shares in partitions.items():
                over = [
                    share.source
                    for share in shares
                    if share.source in deleted or _over(share, days.get(share.source), now)
                ]
                if over:
                    await self._remove(partition_id, over, whole=len(over) == len(shares))
                    touched.update(over)
            unlinked = await unlink(self.store, deleted)
            touched.update(source for source in {*days, *deleted} if source[0] in unlinked)
            await self._forget(touched, now)

    async def _settings(self) -> tuple[dict[SourceKey, int], set[SourceKey]]:
        async with self.db() as session:
            kept = await session.execute(select(Source.workspace_id, Source.source_id, Source.retention_days))
            gone = await session.execute(select(DeletedSource.workspace_id, DeletedSource.source_id))
            return {(w, s): kept_days for w, s, kept_days in kept}, {(w, s) for w, s in gone}

    async def _shares(self) -> list[_Share]:
        found = await self.store.query(
            "SELECT _partition_id, toString(workspace_id), toString(source_id),"
            " toUnixTimestamp64Milli(max(receive_time)), max(retention_days)"
            " FROM events GROUP BY _partition_id, workspace_id, source_id",
            timeout=300,
        )
        return [
            _Share(partition, (workspace, source), datetime.fromtimestamp(int(latest) / 1000, UTC), days)
            for partition, workspace, source, latest, days in found.rows
        ]

    async def _remove(self, partition_id: str, sources: list[SourceKey], *, whole: bool) -> None:
        table = self.store.table_of("events")
        if whole:
            await self.store.execute(f"ALTER TABLE {table} DROP PARTITION ID '{_id(partition_id)}'")
            _dropped.inc()
        else:
            for start in range(0, len(sources), _SOURCES_AT_ONCE):
                some = sources[start : start + _SOURCES_AT_ONCE]
                await self.store.execute(  # begins it: the engine rewrites in the background
                    f"ALTER TABLE {table} DELETE IN PARTITION ID '{_id(partition_id)}'"
                    " WHERE workspace_id IN {workspaces:Array(UUID)} AND source_id IN {sources:Array(UUID)}",
                    {"workspaces": sorted({w for w, _ in some}), "sources": [s for _, s in some]},
                )
            _deleted.inc()
        log.info("events_removed", partition=partition_id, sources=len(sources), whole=whole)

    async def _forget(self, touched: set[SourceKey], now: datetime) -> None:
        """Makes answers that were remembered invalid, and forgets sources that were deleted long ago."""
        async with self.db.begin() as session:
            await session.execute(
                delete(DeletedSource).where(DeletedSource.delete_time < now - _REMEMBER_DELETED)
            )
            if touched:
                await session.execute(
                    update(Watermark)
                    .where(tuple_(Watermark.workspace_id, Watermark.source_id).in_(sorted(touched)))
                    .values(watermark=Watermark.watermark + 1)
                )


def _over(share: _Share, days: int | None, now: datetime) -> bool:
    """Whether all of it is over. What the source says now counts; of an unknown source, what it said at receipt."""
    kept_days = share.retention_days if days is None else days
    return bool(kept_days) and share.latest < now - timedelta(days=kept_days)


def _id(partition_id: str) -> str:
    if not partition_id.replace("-", "").isalnum():
        raise ValueError(f"no id of a partition: {partition_id}")
    return partition_id
