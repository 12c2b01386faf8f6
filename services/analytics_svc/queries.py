"""Answers queries: compiled to SQL, run in the event store, and remembered until new events of the sources arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context as ContextVars
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import Message
from meshboard.analytics.v1.query_pb2 import Query, Result
from meshboard.analytics.v1.query_service_pb2 import (
    ExplainQueryRequest,
    ExplainQueryResponse,
    RunQueryRequest,
    RunQueryResponse,
    ValidateQueryRequest,
    ValidateQueryResponse,
)
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceServicer
from prometheus_client import Counter, Histogram
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.compiler import Compiled, compile_query
from services.analytics_svc.event_store import EventStore, Rows, TooExpensiveError, UnavailableError, Value
from services.analytics_svc.memberships import Memberships, check_visible, memberships, named_in
from services.analytics_svc.selection import resolve_range
from services.chassis import auth, errors, telemetry
from services.chassis.db import fetch_at_once
from services.chassis.kept import Kept

Context = grpc.aio.ServicerContext[Any, Any]

# What the answers that are remembered in one process may take, as they are sent.
CACHED_BYTES = 64 << 20
# What the compiled queries may take.
COMPILED_BYTES = 8 << 20
# How many queries of a workspace may wait in one process, for each that may be under way.
WAITING_FOR_EACH = 50
# What the engine bounds by default is too little for the longest queries that the contract allows.
_SQL_BYTES = 1 << 20
_EXCEEDED = {158: "rows", 159: "time", 160: "time", 307: "rows", 396: "rows", 241: "memory", 394: "time"}
_WORDS = {
    "time": "The query needs more time than a query may have",
    "memory": "The query needs more memory than a query may have",
    "rows": "The query reads more events than a query may",
}

# On the way of every query, also where its answer is remembered.
_ALL_WATERMARKS = "SELECT watermark FROM watermarks WHERE workspace_id = $1 ORDER BY source_id"
_WATERMARKS = _ALL_WATERMARKS.replace(" ORDER", " AND source_id = ANY($2::uuid[]) ORDER")

_answers = Counter("meshboard_query_answers_total", "Answers by where they came from.", ["from"])
_seconds = Histogram(
    "meshboard_query_seconds", "Seconds that queries took in the event store, waiting included."
)
_rows_read = Counter("meshboard_query_rows_read_total", "Events that queries have read in the event store.")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may take, and how many of a workspace may be under way in one process. `rows` 0 is no limit."""

    seconds: float = 10.0
    memory_bytes: int = 1_000_000_000
    rows: int = 2_000_000_000
    per_workspace: int = 4

    @property
    def settings(self) -> dict[str, Value]:
        """As the event store's settings."""
        return {
            "max_memory_usage": self.memory_bytes,
            "max_rows_to_read": self.rows,
            "max_threads": 2,
            "max_query_size": _SQL_BYTES,
            "max_ast_elements": 500_000,
            "max_expanded_ast_elements": 5_000_000,
            "readonly": 2,
        }


@dataclass(eq=False, slots=True)
class _Flight:
    """Something under way, and how many wait for it."""

    task: asyncio.Task[Any]
    waiting: int = 0


@dataclass(slots=True)
class _Lane:
    """The queries of one workspace: a few at a time, so that those of others get their turn."""

    free: asyncio.Semaphore
    inside: int = 0


class Queries:
    """Computes answers, each once for all who ask for the same at the same watermark."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        store: EventStore,
        now: Callable[[], datetime],
        limits: Limits = Limits(),
    ) -> None:
        self.db = db
        self.store = store
        self.now = now
        self.limits = limits
        self._cached: Kept[tuple[object, ...], Result] = Kept(CACHED_BYTES)
        self._compiled: Kept[tuple[object, ...], Compiled] = Kept(COMPILED_BYTES)
        self._flights: dict[tuple[object, ...], _Flight] = {}
        self._lanes: dict[str, _Lane] = {}

    async def answer(self, query: Query, workspace_id: str) -> Result:
        """The answer to a query over sources that are known to be of the workspace.

        Raises INVALID_ARGUMENT, NOT_FOUND (COHORT_NOT_FOUND), RESOURCE_EXHAUSTED or UNAVAILABLE.
        """
        return await self.run(await self.compiled(query, workspace_id), workspace_id, query.source_ids)

    async def compiled(self, query: Query, workspace_id: str) -> Compiled:
        """A query, compiled as of now. Raises INVALID_ARGUMENT or NOT_FOUND (COHORT_NOT_FOUND)."""
        now, asked = self.now(), query.SerializeToString(deterministic=True)
        key = (workspace_id, asked, *resolve_range(query.time_range, now))
        if (found := self._compiled.get(key)) is None:
            found = compile_query(query, workspace_id, now, await self.cohorts(query, workspace_id))
            if not named_in(query):  # a cohort changes by itself, and with the clock
                self._compiled.keep(key, found, 1_000 + 3 * len(asked) + 3 * len(found.sql))
        return found

    async def cohorts(self, question: Message, workspace_id: str) -> Memberships:
        """The cohorts that the filters of a question name. Raises NOT_FOUND (COHORT_NOT_FOUND)."""
        return await memberships(self.db, workspace_id, named_in(question), self.now())

    async def run(self, compiled: Compiled, workspace_id: str, source_ids: Sequence[str]) -> Result:
        """The rows of what was compiled, over sources that are known to be of the workspace.

        Raises RESOURCE_EXHAUSTED or UNAVAILABLE.
        """
        # Read before the query runs: the answer has all events up to it, and maybe more, never less.
        watermarks = await self.watermarks(workspace_id, [] if compiled.looks_beyond_sources else source_ids)
        found = self.remembered(compiled, watermarks)
        return await self.run_at(compiled, workspace_id, watermarks) if found is None else found

    def remembered(self, compiled: Compiled, watermarks: tuple[int, ...]) -> Result | None:
        """The rows as they were computed at these watermarks, if that was so lately. Not to be changed."""
        key = _key_of(compiled, watermarks)
        if (found := self._cached.get(key)) is not None:
            _answers.labels("cache").inc()
        return found

    async def run_at(self, compiled: Compiled, workspace_id: str, watermarks: tuple[int, ...]) -> Result:
        """The rows, asked of the store, with at least the events up to these watermarks. Raises as `run` does."""
        key = _key_of(compiled, watermarks)

        async def compute() -> Result:
            rows = await self.rows(compiled.sql, compiled.params, workspace_id)
            result = result_of(compiled, rows, max(watermarks, default=0))
            self._keep(key, result)
            return result

        return await self.shared(key, compute)

    async def shared(self, key: tuple[object, ...], compute: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What `compute` gives, computed once for all who ask for the same key meanwhile.

        It is cancelled when the last of them has gone away.
        """
        flight = self._flights.get(key)
        if flight is None:
            _answers.labels("store").inc()
            carrier = telemetry.trace_headers()

            async def in_trace() -> T:
                with telemetry.span("shared answer", carrier=carrier):
                    return await compute()

            # In an empty context: it runs for several calls, in the trace of the first, and has none's deadline.
            flight = self._flights[key] = _Flight(asyncio.create_task(in_trace(), context=ContextVars()))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        else:
            _answers.labels("shared").inc()
        flight.waiting += 1
        try:
            result: T = await asyncio.shield(flight.task)
            return result
        finally:
            flight.waiting -= 1
            if not flight.waiting:  # the last one to wait has gone away: the store need not go on
                flight.task.cancel()
                self._land(key, flight)

    async def watermarks(self, workspace_id: str, source_ids: Sequence[str]) -> tuple[int, ...]:
        """How far each of the sources that have events has been read into the store, in the order of their ids.

        All sources of the workspace when none is named.
        """
        found = (
            await fetch_at_once(self.db, _WATERMARKS, workspace_id, list(source_ids))
            if source_ids
            else await fetch_at_once(self.db, _ALL_WATERMARKS, workspace_id)
        )
        return tuple(row["watermark"] for row in found)

    async def rows(self, sql: str, params: Mapping[str, Value], workspace_id: str) -> Rows:
        """Runs a SELECT for a workspace, within the limits of a query.

        Raises RESOURCE_EXHAUSTED (QUERY_TOO_EXPENSIVE or QUERIES_QUEUED) or UNAVAILABLE.
        """
        with _seconds.time():
            async with self._lane(workspace_id):
                try:
                    found = await self.store.query(
                        sql, params, settings=self.limits.settings, timeout=self.limits.seconds
                    )
                except TooExpensiveError as error:
                    limit = _EXCEEDED[error.code]
                    raise errors.resource_exhausted(
                        "QUERY_TOO_EXPENSIVE", f"{_WORDS[limit]}: narrow it.", limit=limit
                    ) from error
                except UnavailableError as error:
                    raise errors.unavailable("The event store does not answer.") from error
        _rows_read.inc(found.rows_read)
        return found

    @asynccontextmanager
    async def _lane(self, workspace_id: str) -> AsyncIterator[None]:
        lane = self._lanes.get(workspace_id)
        if lane is None:
            lane = self._lanes[workspace_id] = _Lane(asyncio.Semaphore(self.limits.per_workspace))
        if lane.inside >= self.limits.per_workspace * (1 + WAITING_FOR_EACH):
            raise errors.resource_exhausted(
                "QUERIES_QUEUED",
                "Too many queries of the workspace wait for the event store.",
                retry_seconds=self.limits.seconds / 2,
            )
        lane.inside += 1
        try:
            async with lane.free:
                yield
        finally:
            lane.inside -= 1
            if not lane.inside:
                del self._lanes[workspace_id]

    def _land(self, key: tuple[object, ...], flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # whoever waited has been told

    def _keep(self, key: tuple[object, ...], result: Result) -> None:
        copy = Result()
        copy.CopyFrom(result)
        copy.cached = True
        self._cached.keep(key, copy, copy.ByteSize())


def result_of(compiled: Compiled, rows: Rows, watermark: int) -> Result:
    """The store's rows as an answer."""
    result = Result(
        columns=compiled.columns, watermark=str(watermark), truncated=len(rows.rows) > compiled.limit
    )
    for row in rows.rows[: compiled.limit]:
        result.rows.add().extend(row)
    return result


def _key_of(compiled: Compiled, watermarks: tuple[int, ...]) -> tuple[object, ...]:
    names = tuple(column.name for column in compiled.columns)
    return (compiled.sql, hashable(compiled.params), names, watermarks)


def hashable(params: Mapping[str, Value]) -> tuple[object, ...]:
    """Parameters as part of a key."""
    return tuple(
        (name, value if isinstance(value, str | int | float) else tuple(value))
        for name, value in params.items()
    )


class QueryServicer(QueryServiceServicer):
    """The access stage has checked `sources.query` on each source."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def RunQuery(self, request: RunQueryRequest, context: Context) -> RunQueryResponse:
        check_visible(request.query)
        return RunQueryResponse(result=await self.queries.answer(request.query, auth.caller().workspace_id))

    async def ValidateQuery(self, request: ValidateQueryRequest, context: Context) -> ValidateQueryResponse:
        check_visible(request.query)
        workspace_id = auth.caller().workspace_id
        compiled = await self.queries.compiled(request.query, workspace_id)
        return ValidateQueryResponse(columns=compiled.columns)

    async def ExplainQuery(self, request: ExplainQueryRequest, context: Context) -> ExplainQueryResponse:
        check_visible(request.query)
        workspace_id = auth.caller().workspace_id
        compiled = await self.queries.compiled(request.query, workspace_id)
        found = await self.queries.rows(compiled.sql, compiled.params, workspace_id)
        return ExplainQueryResponse(
            sql=compiled.sql,
            parameters={name: str(value) for name, value in compiled.params.items()},
            rows_read=found.rows_read,
            bytes_read=found.bytes_read,
            milliseconds=found.seconds * 1000,
            row_count=min(len(found.rows), compiled.limit),
        )
