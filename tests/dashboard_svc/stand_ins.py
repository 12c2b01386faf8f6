"""Stand-ins for what dashboard_svc calls: analytics_svc with answers to order, and user_svc that knows its subjects."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.struct_pb2 import ListValue, Value
from google.rpc.status_pb2 import Status
from meshboard.analytics.v1 import internal_query_service_pb2, query_service_pb2
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetAnswer, WidgetQuestion
from meshboard.analytics.v1.internal_query_service_pb2_grpc import (
    InternalQueryServiceServicer,
    add_InternalQueryServiceServicer_to_server,
)
from meshboard.analytics.v1.query_pb2 import Column, Query, Result
from meshboard.analytics.v1.query_service_pb2_grpc import (
    QueryServiceServicer,
    add_QueryServiceServicer_to_server,
)
from meshboard.user.v1 import internal_user_service_pb2
from meshboard.user.v1.internal_user_service_pb2_grpc import (
    InternalUserServiceServicer,
    add_InternalUserServiceServicer_to_server,
)

from services.chassis import errors

Context = Any


@dataclass(frozen=True)
class Asked:
    """A question that arrived."""

    workspace_id: str
    query: Any
    known_version: bytes


class StandInAnalytics(InternalQueryServiceServicer, QueryServiceServicer):
    """Answers each question with the number that `count` has for its first source.

    `results` take the place of the number for a source, `failures` are its errors, `delays` are seconds before an
    answer. `refused` is what ValidateQuery raises, for a query of one of the sources or cohorts in `hidden`, or,
    without any there, for all. `absent` sources are not there. `problem` is what CheckWidgetQueries says of each
    question. `meanwhile` is awaited before a query is judged. `padding` makes answers long.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.failures: dict[str, errors.Error] = {}
        self.delays: dict[str, float] = {}
        self.refused: errors.Error | None = None
        self.hidden: set[str] = set()
        self.absent: set[str] = set()
        self.meanwhile: Callable[[], Awaitable[object]] | None = None
        self.asked: list[Asked] = []
        self.calls = 0
        self.results: dict[str, Result] = {}
        self.padding = ""
        self.validated: list[tuple[Query, dict[str, str]]] = []
        self.checked: list[WidgetQuestion] = []
        self.problem: errors.Error | None = None

    async def RunWidgetQueries(
        self, request: internal_query_service_pb2.RunWidgetQueriesRequest, context: Context
    ) -> AsyncIterator[internal_query_service_pb2.RunWidgetQueriesResponse]:
        self.calls += 1
        tasks = [
            asyncio.create_task(self._answer(index, request.workspace_id, question))
            for index, question in enumerate(request.questions)
        ]
        try:
            await asyncio.sleep(0)
            done, late = await asyncio.wait(tasks, timeout=0)
            if done:
                yield internal_query_service_pb2.RunWidgetQueriesResponse(
                    answers=[one.result() for one in done]
                )
            for task in asyncio.as_completed(late):
                yield internal_query_service_pb2.RunWidgetQueriesResponse(answers=[await task])
        finally:
            for each in tasks:
                each.cancel()

    async def RecallWidgetAnswers(
        self, request: internal_query_service_pb2.RecallWidgetAnswersRequest, context: Context
    ) -> internal_query_service_pb2.RecallWidgetAnswersResponse:
        """Knows what is unchanged, and nothing else."""
        self.calls += 1
        unchanged = []
        for index, question in enumerate(request.questions):
            asked = getattr(question, str(question.WhichOneof("question")))
            if question.known_version == self._version(asked) and asked.source_ids[0] not in self.failures:
                self.asked.append(Asked(request.workspace_id, asked, question.known_version))
                unchanged.append(WidgetAnswer(index=index, unchanged=True, version=question.known_version))
        return internal_query_service_pb2.RecallWidgetAnswersResponse(answers=unchanged)

    def _version(self, asked: Any) -> bytes:
        count = self.count[asked.source_ids[0]]
        return hashlib.sha256(asked.SerializeToString(deterministic=True) + str(count).encode()).digest()

    async def _answer(self, index: int, workspace_id: str, question: WidgetQuestion) -> WidgetAnswer:
        kind = str(question.WhichOneof("question"))
        asked = getattr(question, kind)
        self.asked.append(Asked(workspace_id, asked, question.known_version))
        source_id = asked.source_ids[0]
        count = self.count[source_id]
        await asyncio.sleep(self.delays.get(source_id, 0))
        if failure := self.failures.get(source_id):
            return WidgetAnswer(index=index, error=failure.status())
        version = self._version(asked)
        if version == question.known_version:
            return WidgetAnswer(index=index, unchanged=True, version=version)
        answer = WidgetAnswer(index=index, version=version)
        match kind:
            case "funnel":
                answer.funnel.total.steps.add(title="first", count=count)
            case "retention":
                answer.retention.rows.add(size=count)
            case _ if source_id in self.results:
                answer.result.CopyFrom(self.results[source_id])
            case _:
                answer.result.columns.add(name=f"count{self.padding}", type=Column.NUMBER)
                answer.result.rows.append(ListValue(values=[Value(number_value=count)]))
                answer.result.watermark = str(len(self.asked))
        return answer

    async def ValidateQuery(
        self, request: query_service_pb2.ValidateQueryRequest, context: Context
    ) -> query_service_pb2.ValidateQueryResponse:
        self.validated.append(
            (request.query, {key: str(value) for key, value in context.invocation_metadata()})
        )
        if self.meanwhile:
            await self.meanwhile()
        asked = {*request.query.source_ids}
        asked.update(filter_.cohort_id for one in request.query.any_of for filter_ in one.filters)
        if self.refused and (not self.hidden or self.hidden & asked):
            await abort(context, self.refused)
        return query_service_pb2.ValidateQueryResponse()

    async def CheckWidgetQueries(
        self, request: internal_query_service_pb2.CheckWidgetQueriesRequest, context: Context
    ) -> internal_query_service_pb2.CheckWidgetQueriesResponse:
        self.checked += request.questions
        gone = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.").status()
        other = self.problem.status() if self.problem else Status()
        asked = [
            {*each.query.source_ids, *each.funnel.source_ids, *each.retention.source_ids}
            for each in request.questions
        ]
        return internal_query_service_pb2.CheckWidgetQueriesResponse(
            problems=[gone if sources & self.absent else other for sources in asked],
            absent_source_ids=sorted(self.absent.intersection(set().union(*asked))),
        )

    def times_asked(self, source_id: str) -> int:
        """How often a query of the source was run."""
        return sum(source_id in asked.query.source_ids for asked in self.asked)


class StandInUsers(InternalUserServiceServicer):
    """Knows the subjects in `known`; finds `found` whatever is asked, or raises `failure`."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.found: list[internal_user_service_pb2.MemberHit] = []
        self.searches: list[internal_user_service_pb2.SearchMembersRequest] = []
        self.failure: errors.Error | None = None

    async def CheckSubjects(
        self, request: internal_user_service_pb2.CheckSubjectsRequest, context: Context
    ) -> internal_user_service_pb2.CheckSubjectsResponse:
        return internal_user_service_pb2.CheckSubjectsResponse(
            user_ids=[i for i in request.user_ids if i in self.known],
            team_ids=[i for i in request.team_ids if i in self.known],
        )

    async def SearchMembers(
        self, request: internal_user_service_pb2.SearchMembersRequest, context: Context
    ) -> internal_user_service_pb2.SearchMembersResponse:
        self.searches.append(request)
        if self.failure:
            await abort(context, self.failure)
        hits = sorted(self.found, key=lambda hit: (hit.score, hit.user.user_id), reverse=True)
        if request.HasField("after"):
            place = (request.after.score, request.after.id)
            hits = [hit for hit in hits if (hit.score, hit.user.user_id) < place]
        return internal_user_service_pb2.SearchMembersResponse(hits=hits[: request.limit])


async def abort(context: Context, failure: errors.Error) -> None:
    """Fails a call as the chassis does."""
    await context.abort(
        failure.code, failure.message, ((errors.DETAILS_KEY, failure.status().SerializeToString()),)
    )


@asynccontextmanager
async def serving_stand_ins(analytics: StandInAnalytics, users: StandInUsers) -> AsyncIterator[str]:
    """Runs both on one port; gives their address."""
    server = grpc.aio.server()
    add_InternalQueryServiceServicer_to_server(analytics, server)
    add_QueryServiceServicer_to_server(analytics, server)
    add_InternalUserServiceServicer_to_server(users, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
