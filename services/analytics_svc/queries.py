"""Answers queries: compiled to SQL, run in the event store, and remembered until new events of the sources arrive."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.analytics.v1.internal_query_service_pb2 import RunWidgetQueryRequest, RunWidgetQueryResponse
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceServicer
from meshboard.analytics.v1.query_pb2 import Query, Result
from meshboard.analytics.v1.query_service_pb2 import (
    RunQueryRequest,
    RunQueryResponse,
    ValidateQueryRequest,
    ValidateQueryResponse,
)
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceServicer
from prometheus_client import Counter
from sqlalchemy import func, select, true
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.compiler import Compiled, compile_query
from services.analytics_svc.event_store import EventStore, TooExpensiveError, UnavailableError
from services.analytics_svc.models import Source, Watermark
from services.chassis import auth, errors

Context = grpc.aio.ServicerContext[Any, Any]

QUERY_SECONDS = 10.0
# Cells that are remembered in one process: about 100 bytes each.
CACHED_CELLS = 200_000
_LIMITS = {"max_memory_usage": 1_000_000_000, "max_threads": 2, "readonly": 2}

_answers = Counter("meshboard_query_answers_total", "Answers by where they came from.", ["from"])


@dataclass(eq=False, slots=True)
class _Flight:
    """A query under way, and how many wait for it."""

    task: asyncio.Task[Result]
    waiting: int = 0


class Queries:
    """Computes answers, each once for all who ask for the same at the same watermark."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], store: EventStore, now: Callable[[], datetime]
    ) -> None:
        self.db = db
        self.store = store
        self.now = now
        self._cached: OrderedDict[tuple[object, ...], Result] = OrderedDict()
        self._cells = 0
        self._flights: dict[tuple[object, ...], _Flight] = {}

    async def answer(self, query: Query, workspace_id: str) -> Result:
        """The answer to a query over sources that are known to be of the workspace.

        Raises INVALID_ARGUMENT, RESOURCE_EXHAUSTED or UNAVAILABLE.
        """
        compiled = compile_query(query, workspace_id, self.now())
        # Read before the query runs: the answer has all events up to it, and maybe more, never less.
        watermark = await self._watermark(
            workspace_id, [] if compiled.looks_beyond_sources else query.source_ids
        )
        params = tuple((name, _hashable(value)) for name, value in compiled.params.items())
        key = (compiled.sql, params, tuple(column.name for column in compiled.columns), watermark)
        if (found := self._cached.get(key)) is not None:
            self._cached.move_to_end(key)
            _answers.labels("cache").inc()
            return found
        flight = self._flights.get(key)
        if flight is None:
            _answers.labels("store").inc()
            task = asyncio.create_task(self._compute(compiled, watermark))
            flight = self._flights[key] = _Flight(task)
            task.add_done_callback(lambda task: self._keep(key, task))
        else:
            _answers.labels("shared").inc()
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:  # the last one to wait has gone away: the store need not go on
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _watermark(self, workspace_id: str, source_ids: Sequence[str]) -> int:
        """That of the sources; of all sources of the workspace when none is named."""
        async with self.db() as session:
            found = await session.scalar(
                select(func.max(Watermark.watermark)).where(
                    Watermark.workspace_id == workspace_id,
                    Watermark.source_id.in_(source_ids) if source_ids else true(),
                )
            )
        return found or 0

    async def _compute(self, compiled: Compiled, watermark: int) -> Result:
        try:
            found = await self.store.query(
                compiled.sql, compiled.params, settings=_LIMITS, timeout=QUERY_SECONDS
            )
        except TooExpensiveError as error:
            raise errors.resource_exhausted(
                "QUERY_TOO_EXPENSIVE", "The query needs more time or memory than a query may have: narrow it."
            ) from error
        except UnavailableError as error:
            raise errors.unavailable("The event store does not answer.") from error
        result = Result(
            columns=compiled.columns,
            watermark=str(watermark),
            truncated=len(found.rows) > compiled.limit,
        )
        for row in found.rows[: compiled.limit]:
            result.rows.add().extend(row)
        return result

    def _keep(self, key: tuple[object, ...], task: "asyncio.Task[Result]") -> None:
        if task.cancelled() or task.exception() is not None:
            return
        copy = Result()
        copy.CopyFrom(task.result())
        copy.cached = True
        self._cached[key] = copy
        self._cells += _cells(copy)
        while self._cells > CACHED_CELLS:
            _, oldest = self._cached.popitem(last=False)
            self._cells -= _cells(oldest)


def _cells(result: Result) -> int:
    return len(result.columns) * (len(result.rows) + 1)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else tuple(value)


class QueryServicer(QueryServiceServicer):
    """The access stage has checked `sources.query` on each source."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def RunQuery(self, request: RunQueryRequest, context: Context) -> RunQueryResponse:
        return RunQueryResponse(result=await self.queries.answer(request.query, auth.caller().workspace_id))

    async def ValidateQuery(self, request: ValidateQueryRequest, context: Context) -> ValidateQueryResponse:
        compiled = compile_query(request.query, auth.caller().workspace_id, self.queries.now())
        return ValidateQueryResponse(columns=compiled.columns)


class InternalQueryServicer(InternalQueryServiceServicer):
    """For dashboard_svc, which has decided that the dashboard may be seen."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries

    async def RunWidgetQuery(
        self, request: RunWidgetQueryRequest, context: Context
    ) -> RunWidgetQueryResponse:
        await self._require_sources(request.workspace_id, request.query.source_ids)
        return RunWidgetQueryResponse(result=await self.queries.answer(request.query, request.workspace_id))

    async def _require_sources(self, workspace_id: str, source_ids: Sequence[str]) -> None:
        async with self.queries.db() as session:
            count = await session.scalar(
                select(func.count())
                .select_from(Source)
                .where(Source.workspace_id == workspace_id, Source.source_id.in_(source_ids))
            )
        if count != len(source_ids):
            raise errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
