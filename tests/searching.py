"""What tests of searches have in common: an indexer that runs, and a look into the index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis.db import SearchDocumentRow, SearchIndexRow, SearchQueueRow
from services.chassis.indexing import Corpus, Indexer
from services.chassis.search import Document, Engine, Key
from services.chassis.search_engines import Elasticsearch
from tests.conditions import eventually


def engine_settings(elasticsearch_url: str) -> dict[str, Any]:
    """The settings of an engine, with names that nobody else uses."""
    return {"elasticsearch_url": elasticsearch_url, "elasticsearch_prefix": f"t{uuid4().hex[:12]}"}


class Indexed:
    """An index, and the tables that it is made of."""

    def __init__(
        self, url: str, db: async_sessionmaker[AsyncSession], engine: Engine, corpus: Corpus
    ) -> None:
        self.url = url
        self.db = db
        self.engine = engine
        self.corpus = corpus

    def indexer(self) -> Indexer:
        """One more indexer."""
        return Indexer(self.url, self.db, self.engine, self.corpus)

    @asynccontextmanager
    async def indexing(self) -> AsyncIterator[None]:
        """Runs an indexer, once there is an index."""
        running = asyncio.create_task(self.indexer().run())
        try:
            await eventually(self._is_built, 150)
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def settled(self, seconds: float = 60) -> None:
        """Returns when searches find all that is written."""
        await eventually(self._nothing_waits, seconds)
        if isinstance(self.engine, Elasticsearch):
            async with self.engine.answering(10) as client:
                await client.indices.refresh(index=f"{self.engine.alias(self.corpus.index)}*")

    async def write(self, version: int, present: Sequence[Document], gone: Sequence[Key] = ()) -> None:
        """Writes to the engine past the queue, as an indexer that is ahead, or behind, would."""
        async with self.db() as session:
            state = await session.get_one(SearchIndexRow, self.corpus.index.name)
        assert state.generation
        await self.engine.write(self.corpus.index, state.generation, version, present, gone)

    async def content(self) -> dict[str, list[str]]:
        """The words of each document in the index by id, without those of other workspaces with the same id."""
        await self.settled()
        fields = self.corpus.index.fields
        if isinstance(self.engine, Elasticsearch):
            async with self.engine.answering(10) as client:
                found = await client.search(index=self.engine.alias(self.corpus.index), size=10_000)
            documents = [hit["_source"] for hit in found["hits"]["hits"]]
            return {
                f"{d['workspace_id']}/{d['document_id']}": [d["texts"][field] for field in fields]
                for d in documents
            }
        async with self.db() as session:
            rows = await session.scalars(
                select(SearchDocumentRow)
                .join(SearchIndexRow, SearchIndexRow.generation == SearchDocumentRow.generation)
                .where(SearchDocumentRow.gone_time.is_(None))
            )
        return {
            f"{row.workspace_id}/{row.document_id}": [words.strip() for words in row.texts] for row in rows
        }

    async def expected(self) -> dict[str, list[str]]:
        """What `content` is when the index is as the tables."""
        documents: list[Document] = []
        async with self.db() as session:
            keys = await self.corpus.scan(session, None, 7)
            while keys:
                documents += await self.corpus.read(session, keys)
                keys = await self.corpus.scan(session, keys[-1], 7)
        fields = self.corpus.index.fields
        return {f"{d.workspace_id}/{d.document_id}": [d.words(field) for field in fields] for d in documents}

    async def _is_built(self) -> bool:
        async with self.db() as session:
            state = await session.get(SearchIndexRow, self.corpus.index.name)
        return bool(state and state.engine == self.engine.name and state.generation)

    async def _nothing_waits(self) -> bool:
        async with self.db() as session:
            return not await session.scalar(select(func.count()).select_from(SearchQueueRow))
