"""Things to be found, in a service that has nothing else, and an engine that finds them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import db as chassis_db
from services.chassis.indexing import Corpus
from services.chassis.search import Document, Found, Index, Key, Query, Search, Within
from services.chassis.search_engines import engine_of
from services.chassis.settings import Settings
from tests.harness import make_settings, new_id
from tests.parts import Parts
from tests.searching import Indexed, engine_settings

THINGS = Index("things", {"title": 3, "body": 1})


async def _read(session: AsyncSession, keys: Sequence[Key]) -> list[Document]:
    rows = await session.execute(
        text("""
            SELECT workspace_id::text, thing_id::text, parent_id::text, title, body
            FROM things JOIN unnest(cast(:workspaces AS uuid[]), cast(:things AS uuid[])) AS wanted (w, t)
              ON workspace_id = w AND thing_id = t
        """),
        {"workspaces": [key[0] for key in keys], "things": [key[1] for key in keys]},
    )
    return [
        Document(workspace_id, thing_id, {"title": title, "body": body}, parent_id)
        for workspace_id, thing_id, parent_id, title, body in rows
    ]


async def _scan(session: AsyncSession, after: Key | None, limit: int) -> list[Key]:
    rows = await session.execute(
        text("""
            SELECT workspace_id::text, thing_id::text FROM things
            WHERE (workspace_id, thing_id) > (cast(:workspace_id AS uuid), cast(:thing_id AS uuid))
            ORDER BY workspace_id, thing_id LIMIT :limit
        """),
        {
            "workspace_id": after[0] if after else "0" * 32,
            "thing_id": after[1] if after else "0" * 32,
            "limit": limit,
        },
    )
    return [(workspace_id, thing_id) for workspace_id, thing_id in rows]


async def _count(session: AsyncSession) -> int:
    return await session.scalar(text("SELECT count(*) FROM things")) or 0


CORPUS = Corpus(THINGS, _read, _scan, _count)


class Library(Indexed):
    """A database of things, and their index."""

    async def put(
        self,
        workspace_id: str,
        title: str,
        body: str = "",
        *,
        parent_id: str | None = None,
        thing_id: str = "",
    ) -> str:
        """Writes a thing, a new one by default; gives its id."""
        values = {
            "workspace_id": workspace_id,
            "thing_id": thing_id or new_id(),
            "parent_id": parent_id,
            "title": title,
            "body": body,
        }
        async with self.db.begin() as session:
            await session.execute(
                text("""
                    INSERT INTO things VALUES (:workspace_id, :thing_id, :parent_id, :title, :body)
                    ON CONFLICT (workspace_id, thing_id) DO UPDATE SET title = :title, body = :body
                """),
                values,
            )
        return str(values["thing_id"])

    async def remove(self, thing_id: str) -> None:
        """Deletes a thing."""
        async with self.db.begin() as session:
            await session.execute(text("DELETE FROM things WHERE thing_id = :id"), {"id": thing_id})

    async def find(
        self,
        workspace_id: str,
        query: str,
        *,
        within: Within | None = None,
        after: Any = None,
        limit: int = 1000,
        hidden: Sequence[str] = (),
    ) -> list[Found[str]]:
        """The next hits, each with its title; `hidden` are those that the owner does not give out."""

        async def load(thing_ids: list[str]) -> Mapping[str, str]:
            async with self.db() as session:
                rows = await session.execute(
                    text("SELECT thing_id::text, title FROM things WHERE thing_id::text = ANY(:ids)"),
                    {"ids": thing_ids},
                )
            return {thing_id: title for thing_id, title in rows if thing_id not in hidden}

        return await Search(self.engine, THINGS).find(
            Query.of(query), within or Within(workspace_id), load, after, limit
        )

    async def titles(self, workspace_id: str, query: str) -> list[str]:
        """The titles of the hits, the best first."""
        return [found.row for found in await self.find(workspace_id, query)]


@asynccontextmanager
async def running_library(parts: Parts, keys: Any, elasticsearch_url: str) -> AsyncIterator[Library]:
    """A new database, with an indexer."""
    url = await parts.fresh_database("user")
    await chassis_db.migrate(url, "tests.chassis.example_svc")
    db = chassis_db.connect(url)
    settings = make_settings(Settings, parts, keys, url, **engine_settings(elasticsearch_url))
    engine = engine_of(settings, db)
    library = Library(url, db, engine, CORPUS)
    try:
        async with library.indexing():
            yield library
    finally:
        await engine.close()
        await chassis_db.engine(db).dispose()
