"""Data of one moment, and how it is watched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from meshboard.dashboard.v1.share_link_pb2 import SnapshotContent
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis.cache import Cache, CachedMessages
from services.dashboard_svc import cursors, share_links
from services.dashboard_svc.feeds import News
from services.dashboard_svc.models import Snapshot
from services.dashboard_svc.scopes import Scope
from services.dashboard_svc.share_links import Link

# Each may have some megabytes.
_REMEMBERED = 16


class Snapshots:
    """Reads what is kept. The messages are shared: not to be changed."""

    def __init__(self, db: async_sessionmaker[AsyncSession], cache: Cache) -> None:
        self._db = db
        self._contents = CachedMessages(cache, "snapshots", SnapshotContent, max_entries=_REMEMBERED)

    async def content(self, link: Link) -> SnapshotContent:
        """What the link shows. Raises NOT_FOUND when it has just been deleted."""
        content = await self._contents.get(".".join(link.key), partial(self._load, link.key))
        if content is None:
            raise share_links.absent()
        return content

    async def _load(self, key: tuple[str, str, str]) -> SnapshotContent | None:
        async with self._db() as session:
            row = await session.get(Snapshot, key)
        return SnapshotContent.FromString(row.content) if row else None


class Frozen:
    """A state that never changes, for who watches it as they watch a `Feed`."""

    ready = True
    changes = 0
    doubts = 0

    def __init__(self, content: SnapshotContent, dashboard_id: str, cursor_key: bytes) -> None:
        self.told: set[Callable[[], None]] = set()
        self._content = content
        self._dashboard_id = dashboard_id
        self._cursor_key = cursor_key

    def wake(self) -> None:
        """Has all watchers look at it."""
        for told in tuple(self.told):
            told()

    def news(self, has: cursors.Digests | None) -> News | None:
        """What leads a client that has this data to the state; None when nothing is new."""
        digests = {data.widget_id: cursors.digest(data) for data in self._content.widgets}
        if has == digests:
            return None
        if has is None:
            response = WatchDashboardResponse(
                snapshot=WatchDashboardResponse.Snapshot(widgets=self._content.widgets)
            )
        else:
            response = WatchDashboardResponse(
                changes=[d for d in self._content.widgets if has.get(d.widget_id) != digests[d.widget_id]],
                removed_widget_ids=has.keys() - digests.keys(),
            )
        response.cursor = self.cursor(digests)
        return News(response, digests)

    def cursor(self, has: cursors.Digests) -> str:
        """What a client that has this data takes the stream up with."""
        return cursors.encode(self._cursor_key, self._dashboard_id, has, Scope())

    def read_cursor(self, cursor: str) -> cursors.Digests:
        """The opposite. Raises INVALID_ARGUMENT (CURSOR_INVALID)."""
        return cursors.decode(self._cursor_key, self._dashboard_id, cursor, Scope())
