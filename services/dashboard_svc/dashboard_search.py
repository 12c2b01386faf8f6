"""Searching dashboards, by their titles, descriptions and what their widgets say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime

from meshboard.dashboard.v1 import dashboard_pb2
from sqlalchemy import Uuid, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import resources, times
from services.chassis.indexing import Corpus
from services.chassis.resources import Reach, Resource, reach
from services.chassis.rights import Rights
from services.chassis.search import Document, Engine, Found, Index, Key, Place, Query, Search, Within
from services.dashboard_svc.boards import seen_widgets, shown
from services.dashboard_svc.markdown import to_text
from services.dashboard_svc.models import Dashboard

# Characters of the texts on one dashboard that are looked at.
MAX_TEXT = 10_000
DASHBOARDS = Index("dashboards", {"title": 4, "widgets": 2, "description": 1})


class DashboardSearch:
    """Finds the dashboards that somebody may see."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        engine: Engine,
        resource: Resource,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self._db = db
        self._search = Search(engine, DASHBOARDS)
        self._resource = resource
        self._now = now

    async def find(
        self, rights: Rights, query: str, after: Place | None, limit: int
    ) -> list[Found[Dashboard]]:
        """The next hits. Raises INVALID_ARGUMENT (SEARCH_QUERY_INVALID), and UNAVAILABLE."""
        now = self._now()
        visible = resources.visible(self._resource, rights, now)

        async def load(dashboard_ids: list[str]) -> Mapping[str, Dashboard]:
            async with self._db() as session:
                rows = await session.scalars(
                    select(Dashboard).where(
                        Dashboard.workspace_id == rights.workspace_id,
                        Dashboard.dashboard_id.in_(dashboard_ids),
                        visible,
                    )
                )
            return {row.dashboard_id: row for row in rows}

        words = Query.of(query)
        async with self._db() as session:
            within = _within(rights, await reach(session, self._resource, rights, now))
        return await self._search.find(words, within, load, after, limit)


def _within(rights: Rights, reached: Reach) -> Within:
    """The user's reach, as a search engine has it."""
    parents = [*reached.parents, *([None] if reached.top else [])]
    return Within(rights.workspace_id, parents, reached.allowed, reached.denied)


def texts_of(widgets: Iterable[dashboard_pb2.Widget]) -> list[tuple[str, str]]:
    """What is searched of the widgets of a dashboard, with the names of the fields that highlights have."""
    texts: list[tuple[str, str]] = []
    room = MAX_TEXT
    for widget in widgets:
        texts.append(("widget.title", widget.title))
        if widget.html and room:
            texts.append(("widget.text", to_text(widget.html)[:room]))
            room -= len(texts[-1][1])
    return texts


async def _read(session: AsyncSession, keys: Sequence[Key]) -> list[Document]:
    """What viewers see; what is in the bin is not found."""
    rows = await session.scalars(
        select(Dashboard).where(
            tuple_(Dashboard.workspace_id, Dashboard.dashboard_id).in_(keys), Dashboard.delete_time.is_(None)
        )
    )
    found = rows.all()
    widgets = await seen_widgets(session, found)
    return [
        Document(
            row.workspace_id,
            row.dashboard_id,
            {
                "title": dashboard.title,
                "widgets": "\n".join(text for _, text in texts_of(widgets[row.dashboard_id])),
                "description": dashboard.description,
            },
            parent_id=row.folder_id,
        )
        for row, dashboard in zip(found, await shown(session, found), strict=True)
    ]


async def _scan(session: AsyncSession, after: Key | None, limit: int) -> list[Key]:
    key = (Dashboard.workspace_id, Dashboard.dashboard_id)
    keys = select(*key).where(Dashboard.delete_time.is_(None)).order_by(*key).limit(limit)
    if after is not None:
        keys = keys.where(tuple_(*key) > tuple_(*after, types=[Uuid(as_uuid=False)] * 2))
    return [(workspace_id, dashboard_id) for workspace_id, dashboard_id in await session.execute(keys)]


async def _count(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).where(Dashboard.delete_time.is_(None))) or 0


CORPUS = Corpus(DASHBOARDS, _read, _scan, _count)
