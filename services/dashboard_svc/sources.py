"""What analytics_svc says of the sources that dashboards look at.

Queries run by the dashboard's right, so whoever writes one needs `sources.query` on its sources.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from meshboard.analytics.v1.internal_query_service_pb2 import (
    CheckWidgetQueriesRequest,
    CheckWidgetQueriesResponse,
    WidgetQuestion,
)
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceStub
from meshboard.analytics.v1.query_pb2 import AnyOf, Filter, Query
from meshboard.analytics.v1.query_service_pb2 import ValidateQueryRequest
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceStub
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Widget
from meshboard.dashboard.v1.version_service_pb2 import RestoreVersionResponse

from services.chassis.clients import Peer
from services.dashboard_svc.definitions import marks_question, values_question

Problem = RestoreVersionResponse.Problem

_QUERIES_AT_ONCE = 8
_SOURCES_OF_A_QUERY = 100
# Filters in one AnyOf, and of these in a query.
_ALTERNATIVES = 20
_ANY_OFS = 10


class Sources:
    """Asks analytics_svc, partly as the caller. Never to be called inside a transaction."""

    def __init__(self, analytics: Peer) -> None:
        self._queries = analytics.stub(QueryServiceStub)
        self._checks = analytics.stub(InternalQueryServiceStub)

    async def validate(self, queries: Iterable[Query]) -> None:
        """Fails as `ValidateQuery` does: when the caller may not ask one of these, or nobody can."""
        room = asyncio.Semaphore(_QUERIES_AT_ONCE)

        async def validate(query: Query) -> None:
            async with room:
                await self._queries.ValidateQuery(ValidateQueryRequest(query=query))

        await asyncio.gather(*map(validate, queries))

    async def require(self, source_ids: Iterable[str], cohort_ids: Iterable[str] = ()) -> None:
        """Raises NOT_FOUND or PERMISSION_DENIED unless the caller may query these sources and see these cohorts."""
        await self.validate(right_to(source_ids, cohort_ids))

    async def look_at(
        self, workspace_id: str, questions: Sequence[WidgetQuestion]
    ) -> CheckWidgetQueriesResponse:
        """Whether questions can be asked, by whomever."""
        if not questions:
            return CheckWidgetQueriesResponse()
        return await self._checks.CheckWidgetQueries(
            CheckWidgetQueriesRequest(workspace_id=workspace_id, questions=questions)
        )

    async def problems(self, workspace_id: str, content: DashboardContent) -> tuple[list[Problem], set[str]]:
        """What of the content cannot be asked, and which of its sources are not there."""
        asking = [
            (Problem(widget_id=widget.widget_id), question)
            for widget in content.widgets
            if (question := question_of(widget))
        ]
        asking += [
            (Problem(variable=variable.name), WidgetQuestion(query=values_question(variable)))
            for variable in content.variables
            if variable.HasField("property_values")
        ]
        asking += [
            (Problem(annotation_query=query.title), WidgetQuestion(query=marks_question(query)))
            for query in content.annotation_queries
        ]
        checked = await self.look_at(workspace_id, [question for _, question in asking])
        problems = []
        for (problem, _), error in zip(asking, checked.problems, strict=True):
            if error.code:
                problem.error.CopyFrom(error)
                problems.append(problem)
        return problems, {source_id.lower() for source_id in checked.absent_source_ids}


def right_to(source_ids: Iterable[str], cohort_ids: Iterable[str]) -> list[Query]:
    """Queries that take the right to query these sources, and to see these cohorts; none without a source."""
    sources, cohorts = sorted(set(source_ids)), sorted(set(cohort_ids))
    parts = [sources[at : at + _SOURCES_OF_A_QUERY] for at in range(0, len(sources), _SOURCES_OF_A_QUERY)]
    any_of = [
        AnyOf(filters=[Filter(cohort_id=cohort_id) for cohort_id in cohorts[at : at + _ALTERNATIVES]])
        for at in range(0, len(cohorts), _ALTERNATIVES)
    ]
    queries = [Query(source_ids=part) for part in parts]
    for at in range(0, len(any_of) if parts else 0, _ANY_OFS):
        if at:
            queries.append(Query(source_ids=parts[0]))
        queries[-1 if at else 0].any_of.extend(any_of[at : at + _ANY_OFS])
    return queries


def question_of(widget: Widget) -> WidgetQuestion | None:
    """What a widget asks; None: nothing."""
    if widget.HasField("query"):
        return WidgetQuestion(query=widget.query)
    if widget.HasField("funnel"):
        return WidgetQuestion(funnel=widget.funnel)
    if widget.HasField("retention"):
        return WidgetQuestion(retention=widget.retention)
    return None
