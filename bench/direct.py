"""The baseline of ingest: the same batches, in the pipeline's own statement, into a chDB with nothing before it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from bench.load import LIMIT_SECONDS, LoadFailedError, Sent
from services.analytics_svc.event_store import EventStore, Value
from services.analytics_svc.tables import insert_events, statements

BATCHES_PER_INSERT = 10


def insert(batches: Callable[[], Sequence[bytes]]) -> Sent:
    """Inserts LoggedBatches, which are made before time is taken, into a fresh directory, in a process of its own.

    Raises LoadFailedError.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_insert, args=(theirs, batches), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT_SECONDS):
            raise LoadFailedError("chDB did not finish in time.")
        sent = ours.recv()
    except EOFError:
        raise LoadFailedError("chDB ended.") from None
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    assert isinstance(sent, Sent)
    return sent


class _Directory(EventStore):
    """A chDB directory in this process, in the place of one behind HTTP."""

    def __init__(self, folder: Path) -> None:
        from services.analytics_svc.store import Engine, Request  # noqa: PLC0415 - takes seconds, in one process only

        self._engine, self._request = Engine(folder), Request
        self.cluster = ""

    async def execute(
        self, sql: str, params: Mapping[str, Value] | None = None, *, timeout: float = LIMIT_SECONDS
    ) -> None:
        await self._engine.run(self._request(sql, b"", {}, {}))

    async def insert(
        self,
        sql: str,
        data: bytes,
        *,
        token: str,
        settings: Mapping[str, Value] | None = None,
        timeout: float = LIMIT_SECONDS,
    ) -> None:
        texts = {name: str(value) for name, value in (settings or {}).items()}
        await self._engine.run(self._request(sql, data, {"insert_deduplication_token": token, **texts}, {}))

    async def close(self) -> None:
        await self._engine.close()


def _insert(pipe: Connection, make: Callable[[], Sequence[bytes]]) -> None:
    batches = make()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where the engine writes the schemas that come with inserts
        pipe.send(asyncio.run(_insert_all(Path(folder), batches)))


async def _insert_all(folder: Path, batches: Sequence[bytes]) -> Sent:
    store = _Directory(folder)
    for statement in statements(cluster=""):
        await store.execute(statement)
    spent = time.process_time()
    began = time.monotonic()
    for start in range(0, len(batches), BATCHES_PER_INSERT):
        await insert_events(store, batches[start : start + BATCHES_PER_INSERT], str(start))
    sent = Sent(len(batches), began, time.monotonic(), time.process_time() - spent)
    await store.close()
    return sent
