"""How documents get into the index of `search`, and how the index is built anew while people go on writing.

Triggers on the owner's tables note in `search_queue` which documents a transaction has touched, so that no write can
forget it. The `Indexer` reads the rows as they are by then, puts or removes the documents, and clears what it has
read: the same for every engine. While an engine is away the queue waits.

Two may write at the same time, for a lock can be lost unnoticed, and a rebuild writes beside the indexer. So each batch
carries a version, and an engine keeps the document with the highest one. The order of a batch is what makes that right:

    read the queue (or the keys) → see which generations there are → take a version → read the rows → write → clear

Whoever has the higher version has taken it later, so it has read the rows after the other one had read its keys, and
has seen every change that the other was to index. Rows may be newer than their version says: then the queue still
holds the change that made them so. And a generation that a batch did not see yet is filled by a rebuild that reads
its rows later.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import structlog
from prometheus_client import Gauge
from sqlalchemy import delete, exc, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis.db import SearchIndexRow, SearchQueueRow
from services.chassis.search import Away, Document, Engine, Index, Key

log = structlog.get_logger(__name__)

# "sear" and "rebu" in ASCII: the advisory locks of the one indexer and the one rebuild of an index; the second number
# is that of the index.
_INDEXER_LOCK, _REBUILD_LOCK = 0x73656172, 0x72656275
INTERRUPTIONS = (
    Away,
    OSError,
    TimeoutError,
    exc.SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_BATCH = 256
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = 0.5
_MEASURE_SECONDS = 5
_SWEEP_SECONDS = 600

_pending = Gauge(
    "meshboard_search_pending",
    "Changes that wait to be found by a search.",
    ["index"],
    multiprocess_mode="mostrecent",
)

Progress = Callable[[int, int], None]


class RebuildRuns(Exception):
    """Somebody else is building this index."""


@dataclass(frozen=True)
class Corpus:
    """What an index is made of.

    `read` gives the documents of these keys as their rows are now, and leaves out what is gone. `scan` gives the next
    keys after one, in the order of the keys; `count` says how many there are.
    """

    index: Index
    read: Callable[[AsyncSession, Sequence[Key]], Awaitable[list[Document]]]
    scan: Callable[[AsyncSession, Key | None, int], Awaitable[list[Key]]]
    count: Callable[[AsyncSession], Awaitable[int]]


class Indexer:
    """Keeps one index as the tables are. Any number may run: one works, the others wait for its lock."""

    def __init__(
        self, url: str, db: async_sessionmaker[AsyncSession], engine: Engine, corpus: Corpus
    ) -> None:
        """`url` must lead to Postgres itself: a lock and LISTEN need a connection that no pooler shares."""
        self._url = url
        self._db = db
        self._engine = engine
        self._corpus = corpus
        self._index = corpus.index
        self._next_measure = 0.0
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS

    async def run(self) -> None:
        """Works until it is cancelled, through restarts of Postgres and of the engine."""
        while True:
            try:
                async with self._lock(_INDEXER_LOCK, wait=True) as connection:
                    log.info("indexer_started", index=self._index.name, engine=self._engine.name)
                    await self._work(connection)
            except INTERRUPTIONS as error:
                log.warning("indexer_interrupted", index=self._index.name, error=repr(error))
            except RebuildRuns:
                log.info("indexer_waits_for_rebuild", index=self._index.name)
            await asyncio.sleep(_RETRY_SECONDS)

    async def _work(self, connection: asyncpg.Connection) -> None:
        touched = asyncio.Event()
        await connection.add_listener("search_queue", lambda *_: touched.set())
        with contextlib.suppress(RebuildRuns):
            await self._abandon()
        if not await self._is_built():
            await self.rebuild()
        while True:
            touched.clear()
            while await self.drain():
                pass
            await self._look_after()
            # The lock is this connection's: what is lost with it is found out here.
            await connection.fetchval("SELECT 1")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await touched.wait()

    async def _is_built(self) -> bool:
        state = await self._state()
        return bool(
            state
            and state.engine == self._engine.name
            and state.generation
            and await self._engine.exists(self._index, state.generation)
        )

    async def drain(self) -> bool:
        """Indexes what the queue holds, as much of it as makes a batch; says whether there was anything."""
        async with self._db.begin() as session:
            touched = (
                await session.execute(
                    select(SearchQueueRow.queue_id, SearchQueueRow.workspace_id, SearchQueueRow.document_id)
                    .where(SearchQueueRow.index_name == self._index.name)
                    .order_by(SearchQueueRow.queue_id)
                    .limit(_BATCH)
                )
            ).all()
            if not touched:
                return False
            state = await session.scalar(
                select(SearchIndexRow).where(SearchIndexRow.index_name == self._index.name)
            )
            if state is None or state.engine != self._engine.name:
                raise Away("the index is built for another engine")
            batch = await self._read(session, list({(row.workspace_id, row.document_id) for row in touched}))
        for generation in (state.generation, state.next_generation):
            if generation:
                await self._write(generation, batch)
        async with self._db.begin() as session:
            await session.execute(
                delete(SearchQueueRow).where(SearchQueueRow.queue_id.in_([row.queue_id for row in touched]))
            )
        return True

    async def rebuild(self, progress: Progress = lambda done, total: None) -> int:
        """Builds the index anew beside the present one, then puts it in its place; gives the number of documents.

        `progress` is told how many documents are done, of how many. Raises RebuildRuns, and Away.
        """
        async with self._lock(_REBUILD_LOCK, wait=False):
            async with self._db.begin() as session:
                generation = await _version(session)
                total = await self._corpus.count(session)
            await self._engine.create(self._index, generation)
            await self._announce(generation)
            done, last = 0, None
            progress(done, total)
            while True:
                async with self._db.begin() as session:
                    keys = await self._corpus.scan(session, last, _BATCH)
                    batch = await self._read(session, keys) if keys else None
                if batch is None:
                    break
                await self._write(generation, batch)
                done, last = done + len(batch.present), keys[-1]
                progress(done, max(done, total))
            await self._engine.switch(self._index, generation)
            async with self._db.begin() as session:
                await session.execute(
                    update(SearchIndexRow)
                    .where(SearchIndexRow.index_name == self._index.name)
                    .values(engine=self._engine.name, generation=generation, next_generation=None)
                )
            await self._engine.sweep(self._index, {generation})
        log.info("index_rebuilt", index=self._index.name, generation=generation, documents=done)
        return done

    async def _announce(self, generation: int) -> None:
        """From here on the indexer writes to the new generation too."""
        fresh = insert(SearchIndexRow).values(
            index_name=self._index.name, engine=self._engine.name, next_generation=generation
        )
        async with self._db.begin() as session:
            state = await session.get(SearchIndexRow, self._index.name)
            moved = state is not None and state.engine != self._engine.name
            await session.execute(
                fresh.on_conflict_do_update(
                    index_elements=[SearchIndexRow.index_name],
                    # What another engine has is of no use to this one.
                    set_={"next_generation": generation, "engine": self._engine.name}
                    | ({"generation": None} if moved else {}),
                )
            )

    async def _abandon(self) -> None:
        """Stops writing to a generation whose rebuild has not come to its end."""
        async with self._lock(_REBUILD_LOCK, wait=False), self._db.begin() as session:
            await session.execute(
                update(SearchIndexRow)
                .where(SearchIndexRow.index_name == self._index.name)
                .values(next_generation=None)
            )

    async def _read(self, session: AsyncSession, keys: list[Key]) -> _Batch:
        version = await _version(session)
        present = await self._corpus.read(session, keys)
        gone = set(keys) - {(document.workspace_id, document.document_id) for document in present}
        return _Batch(version, present, sorted(gone))

    async def _write(self, generation: int, batch: _Batch) -> None:
        await self._engine.write(self._index, generation, batch.version, batch.present, batch.gone)

    async def _state(self) -> SearchIndexRow | None:
        async with self._db() as session:
            return await session.get(SearchIndexRow, self._index.name)

    async def _look_after(self) -> None:
        if time.monotonic() >= self._next_measure:
            self._next_measure = time.monotonic() + _MEASURE_SECONDS
            async with self._db() as session:
                waiting = select(func.count()).where(SearchQueueRow.index_name == self._index.name)
                _pending.labels(self._index.name).set(await session.scalar(waiting) or 0)
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP_SECONDS
            if state := await self._state():
                keep = {number for number in (state.generation, state.next_generation) if number}
                await self._engine.sweep(self._index, keep)

    @asynccontextmanager
    async def _lock(self, key: int, *, wait: bool) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(
            self._url,
            timeout=5,
            command_timeout=10,
            server_settings={"application_name": f"meshboard indexer of {self._index.name}"},
        )
        try:
            while not await connection.fetchval(
                "SELECT pg_try_advisory_lock($1, hashtext($2))", key, self._index.name
            ):
                if not wait:
                    raise RebuildRuns(self._index.name)
                await asyncio.sleep(1)
            yield connection
        finally:
            connection.terminate()


@dataclass(frozen=True, slots=True)
class _Batch:
    version: int
    present: list[Document]
    gone: list[Key]


async def _version(session: AsyncSession) -> int:
    version: int = (await session.execute(text("SELECT nextval('search_versions')"))).scalar_one()
    return version
