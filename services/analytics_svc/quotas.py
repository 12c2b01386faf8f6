"""How many events a source has taken, and how many it may.

A process sets room aside in Postgres, a hundredth of the quota at a time but no more than 100,000 events, and counts
down in memory; every second it gives back what it has not used. So Postgres is asked a few times a second at most for a
source, and no quota is ever exceeded while Postgres answers; while it does not, events are taken and counted later.

A batch may be refused too early: by what other processes have set aside, for a second, or by what a process that was
killed had set aside, until the day and the month end. Sources without a quota are counted in the same way, without
asking first: a process that is killed forgets its last second.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import structlog
from meshboard.analytics.v1.source_pb2 import Source
from sqlalchemy import exc, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.models import SourceUsage
from services.chassis import db as chassis_db
from services.chassis import errors

log = structlog.get_logger(__name__)

SETTLE_SECONDS = 1.0
# Once there is no room, Postgres is not asked again for so long.
FULL_SECONDS = 1.0
_HUNDREDTH = 100
_AT_ONCE = 100_000

# A source that is gone is not counted. The order keeps processes from waiting for each other in a circle.
_COUNT = text("""
    INSERT INTO source_usage (workspace_id, source_id, day, event_count)
    SELECT s.workspace_id, s.source_id, used.day, used.event_count
    FROM unnest(
        CAST(:workspace_ids AS uuid[]), CAST(:source_ids AS uuid[]), CAST(:days AS date[]), CAST(:counts AS bigint[])
    ) AS used (workspace_id, source_id, day, event_count)
    JOIN sources AS s USING (workspace_id, source_id)
    ORDER BY 1, 2, 3
    ON CONFLICT (workspace_id, source_id, day)
    DO UPDATE SET event_count = source_usage.event_count + excluded.event_count
""")


@dataclass(slots=True)
class _Account:
    """The events of a source on a day, in this process."""

    workspace_id: str
    source_id: str
    day: date
    # Room that is set aside and not used; below 0: events that Postgres does not know of yet.
    left: int = 0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    # What was found when there was not room enough, and until when it is believed.
    full: "_Full | None" = None


@dataclass(frozen=True, slots=True)
class _Full:
    limits: tuple[int, int]
    room: int
    error: errors.Error
    until: float


class Quotas:
    """`run` must run beside the calls."""

    def __init__(self, db: async_sessionmaker[AsyncSession], now: Callable[[], datetime]) -> None:
        self.db = db
        self.now = now
        self._accounts: dict[tuple[str, date], _Account] = {}

    async def take(self, source: Source, count: int) -> Callable[[], None]:
        """Counts events. Returns what gives them back, for when they are not logged after all.

        Raises RESOURCE_EXHAUSTED (QUOTA_EXHAUSTED) when not all of them fit in.
        """
        day = self.now().date()
        account = self._accounts.get((source.source_id, day))
        if account is None:
            account = _Account(source.workspace_id, source.source_id, day)
            self._accounts[source.source_id, day] = account
        limits = source.events_per_day, source.events_per_month
        # Others may take what was set aside while this call waits: it looks again.
        while any(limits) and account.left < count and await self._make_room(account, limits, count):
            pass
        account.left -= count

        def give_back() -> None:
            account.left += count

        return give_back

    async def run(self) -> None:
        """Tells Postgres every second what was taken, until it is cancelled; then once more."""
        try:
            while True:
                await asyncio.sleep(SETTLE_SECONDS)
                await self.settle()
        finally:
            await self.settle()

    async def settle(self) -> None:
        """Tells Postgres what was taken since the last time, and gives back what was set aside."""
        yesterday = self.now().date() - timedelta(days=1)
        accounts = [account for account in self._accounts.values() if account.left]
        used = [-account.left for account in accounts]
        for account in accounts:
            account.left = 0
        try:
            if accounts:
                await self._count(accounts, used)
        except (OSError, exc.SQLAlchemyError) as error:
            for account, count in zip(accounts, used, strict=True):
                account.left -= count
            log.warning("usage_not_counted", error=str(error)[:300])
        for key in [key for key, account in self._accounts.items() if account.day < yesterday]:
            del self._accounts[key]

    async def _make_room(self, account: _Account, limits: tuple[int, int], count: int) -> bool:
        """Whether room was set aside; False when Postgres does not answer. Raises RESOURCE_EXHAUSTED."""
        async with account.asking:
            needed = count - account.left
            if needed <= 0:
                return True
            full = account.full
            if full and full.limits == limits and needed > full.room and time.monotonic() < full.until:
                raise full.error
            try:
                rooms = await self._set_aside(account, limits, needed)
            except (OSError, exc.SQLAlchemyError) as failure:
                if not chassis_db.is_away(failure):
                    raise
                log.warning("quota_not_checked", error=str(failure)[:300])
                return False
            short = [period for period, room in rooms.items() if room < needed]
            if not short:
                return True
            error = _exhausted(short[-1], limits, self.now())  # a month is longer to wait for than a day
            account.full = _Full(limits, min(rooms.values()), error, time.monotonic() + FULL_SECONDS)
            raise error

    async def _set_aside(self, account: _Account, limits: tuple[int, int], needed: int) -> dict[str, int]:
        """Sets room aside for `needed` events and a few more, if they fit in; gives the room there was by period."""
        where = (
            SourceUsage.workspace_id == account.workspace_id,
            SourceUsage.source_id == account.source_id,
        )
        async with self.db.begin() as session:
            # Counting none makes the row and locks it: who else wants room waits, and then sees what is taken here.
            await session.execute(_COUNT, _parameters([account], [0]))
            today = await session.scalar(
                select(SourceUsage.event_count).where(*where, SourceUsage.day == account.day)
            )
            if today is None:
                raise errors.unauthenticated("WRITE_KEY_INVALID", "The source of this write key is gone.")
            month = await session.scalar(
                select(func.sum(SourceUsage.event_count)).where(
                    *where, SourceUsage.day.between(account.day.replace(day=1), account.day)
                )
            )
            used = {"day": today, "month": int(month or 0)}
            rooms = {
                period: max(0, limit - used[period])
                for period, limit in zip(used, limits, strict=True)
                if limit
            }
            room = min(rooms.values())
            if room >= needed:
                spare = min(min(filter(None, limits)) // _HUNDREDTH, _AT_ONCE)
                aside = min(room, max(needed, spare))
                await session.execute(_COUNT, _parameters([account], [aside]))
        if room >= needed:
            account.left += aside
        return rooms

    async def _count(self, accounts: list[_Account], used: list[int]) -> None:
        async with self.db.begin() as session:
            await session.execute(_COUNT, _parameters(accounts, used))


def _parameters(accounts: list[_Account], used: list[int]) -> dict[str, Any]:
    return {
        "workspace_ids": [account.workspace_id for account in accounts],
        "source_ids": [account.source_id for account in accounts],
        "days": [account.day for account in accounts],
        "counts": used,
    }


def _exhausted(period: str, limits: tuple[int, int], now: datetime) -> errors.Error:
    tomorrow = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    renewal = tomorrow if period == "day" else (tomorrow.replace(day=1) + timedelta(days=32)).replace(day=1)
    if period == "month" and tomorrow.day == 1:
        renewal = tomorrow
    limit = limits[0] if period == "day" else limits[1]
    return errors.resource_exhausted(
        "QUOTA_EXHAUSTED",
        f"The source takes {limit:,} events a {period}, and has no room for these.",
        retry_seconds=(renewal - now).total_seconds(),
        limit=limit,
        period=period,
    )
