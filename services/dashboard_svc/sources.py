"""What analytics_svc says of the sources that dashboards look at.

Queries run by the dashboard's right, so whoever writes one needs `sources.query` on its sources.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

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
SOURCES_OF_A_QUERY = 100
# Filters in one AnyOf, and of these in a query.
_ALTERNATIVES = 20
_ANY_OFS = 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Findings:
    """What of a content cannot be asked, what can be, and which of its sources are not there, in lower case."""

    problems: list[Problem] = field(default_factory=list)
    askable: DashboardContent = field(default_factory=DashboardContent)
    absent_source_ids: set[str] = field(default_factory=set)


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

    async def look_through(self, workspace_id: str, content: DashboardContent) -> Findings:
        """Looks at all that the content asks."""
        asking = [
            (Problem(widget_id=widget.widget_id), question, DashboardContent(widgets=[widget]))
            for widget in content.widgets
            if (question := question_of(widget))
        ]
        asking += [
            (
                Problem(variable=variable.name),
                WidgetQuestion(query=values_question(variable)),
                DashboardContent(variables=[variable]),
            )
            for variable in content.variables
            if variable.HasField("property_values")
        ]
        asking += [
            (
                Problem(annotation_query=marks.title),
                WidgetQuestion(query=marks_question(marks)),
                DashboardContent(annotation_queries=[marks]),
            )
            for marks in content.annotation_queries
        ]
        checked = await self.look_at(workspace_id, [question for _, question, _ in asking])
        found = Findings(absent_source_ids=set(map(str.lower, checked.absent_source_ids)))
        for (problem, _, part), error in zip(asking, checked.problems, strict=True):
            if error.code:
                problem.error.CopyFrom(error)
                found.problems.append(problem)
            else:
                found.askable.MergeFrom(part)
        return found


def right_to(source_ids: Iterable[str], cohort_ids: Iterable[str]) -> list[Query]:
    """Queries that take the right to query these sources, and to see these cohorts; none without a source."""
    sources, cohorts = sorted(set(source_ids)), sorted(set(cohort_ids))
    if not sources:
        return []
    first, *others = _parts(sources, SOURCES_OF_A_QUERY)
    any_of = [
        AnyOf(filters=[Filter(cohort_id=cohort_id) for cohort_id in part])
        for part in _parts(cohorts, _ALTERNATIVES)
    ]
    asking = [Query(source_ids=first, any_of=part) for part in _parts(any_of, _ANY_OFS) or [[]]]
    return [*asking, *(Query(source_ids=part) for part in others)]


def _parts(whole: Sequence[T], size: int) -> list[Sequence[T]]:
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def question_of(widget: Widget) -> WidgetQuestion | None:
    """What a widget asks; None: nothing."""
    if widget.HasField("query"):
        return WidgetQuestion(query=widget.query)
    if widget.HasField("funnel"):
        return WidgetQuestion(funnel=widget.funnel)
    if widget.HasField("retention"):
        return WidgetQuestion(retention=widget.retention)
    return None
