"""Answers the questions of dashboards, many in a call, and says when the answer is still the one that the asker has."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import grpc
import grpc.aio
import structlog
from google.rpc.status_pb2 import Status
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, RetentionQuery
from meshboard.analytics.v1.internal_query_service_pb2 import (
    CheckWidgetQueriesRequest,
    CheckWidgetQueriesResponse,
    RecallWidgetAnswersRequest,
    RecallWidgetAnswersResponse,
    RunWidgetQueriesRequest,
    RunWidgetQueriesResponse,
    WidgetAnswer,
    WidgetQuestion,
)
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceServicer
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.compiler import Compiled, compile_query
from services.analytics_svc.funnels import compile_funnel, read_funnel
from services.analytics_svc.memberships import Memberships, named_in
from services.analytics_svc.periods import until_now
from services.analytics_svc.queries import Queries
from services.analytics_svc.retention import compile_retention, read_retention
from services.analytics_svc.selection import resolve_range
from services.chassis import errors
from services.chassis.db import fetch_at_once
from services.chassis.interceptor import error_of, validate
from services.chassis.kept import Kept

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# How far each source has been read into the store; None: it has no events.
Marks = Mapping[str, int | None]

# Questions of one call that are under way at once, so that a large dashboard leaves room for others.
QUESTIONS_AT_ONCE = 8
# What the compiled questions that a process remembers may take.
_PREPARED_BYTES = 16 << 20
# How many questions a process remembers to have found valid.
_VALID_QUESTIONS = 50_000
_DIGEST_BYTES = 16
# A message with more than this is sent before there is more in it.
_MESSAGE_BYTES = 1 << 20

# Asked for each look at a dashboard.
_MARKS = """
    SELECT sources.source_id::text, watermark FROM sources
    LEFT JOIN watermarks ON watermarks.workspace_id = sources.workspace_id AND watermarks.source_id = sources.source_id
    WHERE sources.workspace_id = $1 AND sources.source_id = ANY($2::uuid[])
"""


class _Asked(NamedTuple):
    """A valid question: a Query, a FunnelQuery or a RetentionQuery, and its sources in lower case."""

    kind: str
    message: Any
    raw: bytes
    digest: bytes
    source_ids: Sequence[str]
    known_version: bytes


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A question as the store is asked it, and how its rows become an answer; equal digests: the same of both."""

    compiled: Compiled
    read: Callable[[Result], WidgetAnswer]
    digest: bytes
    size: int


class InternalQueryServicer(InternalQueryServiceServicer):
    """For dashboard_svc, which has decided that the dashboard may be seen."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries
        self._valid: set[bytes] = set()
        self._prepared: Kept[tuple[object, ...], _Prepared] = Kept(_PREPARED_BYTES)

    async def RunWidgetQueries(
        self, request: RunWidgetQueriesRequest, context: Context
    ) -> AsyncIterator[RunWidgetQueriesResponse]:
        """Gives what is known at once, then the rest as it comes. Each message of a stream costs as much as a call."""
        workspace_id, questions = request.workspace_id, self._read(request.questions)
        marks = await self._marks(workspace_id, questions)
        room = asyncio.Semaphore(QUESTIONS_AT_ONCE)
        running: set[asyncio.Task[WidgetAnswer]] = set()
        try:
            known = RunWidgetQueriesResponse()
            size = 0
            for index, question in enumerate(questions):
                answer = await self._at_once(workspace_id, question, marks)
                if not isinstance(answer, WidgetAnswer):
                    running.add(asyncio.create_task(_numbered(index, answer, room)))
                    continue
                answer.index = index
                known.answers.append(answer)
                size += answer.ByteSize()
                if size > _MESSAGE_BYTES:
                    yield known
                    known, size = RunWidgetQueriesResponse(), 0
            if known.answers:
                yield known
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield RunWidgetQueriesResponse(answers=[task.result()])
        finally:
            for task in running:
                task.cancel()

    async def RecallWidgetAnswers(
        self, request: RecallWidgetAnswersRequest, context: Context
    ) -> RecallWidgetAnswersResponse:
        """Gives what is known at once, as far as it has room in one message."""
        workspace_id, questions = request.workspace_id, self._read(request.questions)
        marks = await self._marks(workspace_id, questions)
        response, size = RecallWidgetAnswersResponse(), 0
        for index, question in enumerate(questions):
            answer = await self._at_once(workspace_id, question, marks)
            if isinstance(answer, WidgetAnswer):
                answer.index = index
                response.answers.append(answer)
                size += answer.ByteSize()
                if size > _MESSAGE_BYTES:
                    break
        return response

    async def CheckWidgetQueries(
        self, request: CheckWidgetQueriesRequest, context: Context
    ) -> CheckWidgetQueriesResponse:
        """Compiles each question, and looks for its sources."""
        questions = self._read(request.questions)
        marks = await self._marks(request.workspace_id, questions)
        problems = []
        for question in questions:
            try:
                await self._prepare(request.workspace_id, question, marks)
                problems.append(Status())
            except errors.Error as error:
                problems.append(error.status())
        absent = {each for question in questions for each in question.source_ids} - marks.keys()
        return CheckWidgetQueriesResponse(problems=problems, absent_source_ids=sorted(absent))

    def _read(self, questions: Iterable[WidgetQuestion]) -> list[_Asked]:
        """Validates each question once: dashboards ask the same ones again and again, and it took a fifth of a call.

        Raises INVALID_ARGUMENT (VALIDATION_FAILED).
        """
        found = []
        for index, question in enumerate(questions):
            kind = str(question.WhichOneof("question"))
            asked: Any = getattr(question, kind, question)  # without any question it is not valid
            raw = asked.SerializeToString(deterministic=True)
            digest = _digest(kind.encode(), raw)
            # The version of an answer belongs to no question; one that cannot be of here is looked at too.
            if digest not in self._valid or len(question.known_version) > _DIGEST_BYTES:
                validate(question, f"questions[{index}]")
                if len(self._valid) >= _VALID_QUESTIONS:
                    self._valid.clear()
                self._valid.add(digest)
            source_ids = sorted({source_id.lower() for source_id in asked.source_ids})
            found.append(_Asked(kind, asked, raw, digest, source_ids, question.known_version))
        return found

    async def _at_once(
        self, workspace_id: str, question: _Asked, marks: Marks
    ) -> "WidgetAnswer | _Computing":
        """The answer, or how to compute it where the store must be asked."""
        try:
            prepared = await self._prepare(workspace_id, question, marks)
            if prepared.compiled.looks_beyond_sources:
                watermarks = await self.queries.watermarks(workspace_id, [])
            else:
                known = (marks[source_id] for source_id in question.source_ids)
                watermarks = tuple(mark for mark in known if mark is not None)
            version = _digest(prepared.digest, repr(watermarks).encode())
            if version == question.known_version:
                return WidgetAnswer(unchanged=True, version=version)
            if (found := self.queries.remembered(prepared.compiled, watermarks)) is not None:
                answer = prepared.read(found)
                answer.version = version
                return answer
        except Exception as failure:
            return _failed(failure)

        async def compute(room: asyncio.Semaphore) -> WidgetAnswer:
            try:
                async with room:
                    found = await self.queries.run_at(prepared.compiled, workspace_id, watermarks)
                answer = prepared.read(found)
            except Exception as failure:
                return _failed(failure)
            answer.version = version
            return answer

        return compute

    async def _prepare(self, workspace_id: str, question: _Asked, marks: Marks) -> _Prepared:
        """The question, compiled. Raises what `RunQuery` fails with; NOT_FOUND (SOURCE_NOT_FOUND)."""
        if not marks.keys() >= set(question.source_ids):
            # Without its id: who looks at the dashboard may not know of it.
            raise errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
        asked, now = question.message, self.queries.now()
        key: tuple[object, ...] = (workspace_id, question.digest, *resolve_range(asked.time_range, now))
        if question.kind == "retention":  # what is over, and what has begun, goes by the clock
            key = (*key, int(now.timestamp() // 60), until_now(now))
        if (found := self._prepared.get(key)) is not None:
            return found
        cohorts = await self.queries.cohorts(asked, workspace_id)
        prepared = _prepare(question, workspace_id, now, cohorts)
        if not named_in(asked):  # a cohort changes by itself, and with the clock
            self._prepared.keep(key, prepared, prepared.size)
        return prepared

    async def _marks(self, workspace_id: str, questions: Iterable[_Asked]) -> Marks:
        """The sources of the questions that are of the workspace, in one statement for all."""
        source_ids = sorted({source_id for question in questions for source_id in question.source_ids})
        rows = await fetch_at_once(self.queries.db, _MARKS, workspace_id, source_ids)
        return dict(rows)


_Computing = Callable[[asyncio.Semaphore], Any]


async def _numbered(index: int, compute: _Computing, room: asyncio.Semaphore) -> WidgetAnswer:
    answer: WidgetAnswer = await compute(room)
    answer.index = index
    return answer


def _prepare(question: _Asked, workspace_id: str, now: datetime, cohorts: Memberships) -> _Prepared:
    # What is remembered has copies: a part of a message keeps all of it alive.
    read: Callable[[Result], WidgetAnswer]
    current = 0
    match question.kind:
        case "funnel":
            funnel = FunnelQuery.FromString(question.raw)
            compiled = compile_funnel(funnel, workspace_id, now, cohorts)

            def read(found: Result) -> WidgetAnswer:
                return WidgetAnswer(funnel=read_funnel(funnel, found))

        case "retention":
            retention = RetentionQuery.FromString(question.raw)
            compiled, periods = compile_retention(retention, workspace_id, now, cohorts)
            current = periods.number_at(now)

            def read(found: Result) -> WidgetAnswer:
                return WidgetAnswer(retention=read_retention(retention, periods, found, now))

        case _:
            compiled = compile_query(question.message, workspace_id, now, cohorts)

            def read(found: Result) -> WidgetAnswer:
                return WidgetAnswer(result=found)

    asked = repr((compiled.sql, compiled.params, current)).encode()
    return _Prepared(compiled, read, _digest(question.raw, asked), 1_000 + 2 * len(asked))


def _digest(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=_DIGEST_BYTES).digest()


def _failed(failure: Exception) -> WidgetAnswer:
    error = error_of(failure) or errors.internal()
    if error.code is grpc.StatusCode.INTERNAL:
        log.error("question_failed", exc_info=failure)
    return WidgetAnswer(error=error.status())
