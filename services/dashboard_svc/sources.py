"""What analytics_svc says of the sources that dashboards look at.

Queries run by the dashboard's right, so whoever writes one needs `sources.query` on its sources.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from google.rpc.status_pb2 import Status
from meshboard.analytics.v1.internal_query_service_pb2 import (
    CheckWidgetQueriesRequest,
    CheckWidgetQueriesResponse,
    WidgetQuestion,
)
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceStub
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.analytics.v1.query_service_pb2 import ValidateQueryRequest
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceStub
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Widget

from services.chassis.clients import Peer
from services.dashboard_svc.definitions import questions_of

_QUERIES_AT_ONCE = 8
_SOURCES_OF_A_QUERY = 100


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

    async def require(self, source_ids: Iterable[str]) -> None:
        """Raises NOT_FOUND or PERMISSION_DENIED unless the caller may query all of these sources."""
        wanted = sorted(set(source_ids))
        await self.validate(
            Query(source_ids=wanted[start : start + _SOURCES_OF_A_QUERY])
            for start in range(0, len(wanted), _SOURCES_OF_A_QUERY)
        )

    async def look_at(
        self, workspace_id: str, questions: Sequence[WidgetQuestion]
    ) -> CheckWidgetQueriesResponse:
        """Whether questions can be asked, by whomever."""
        if not questions:
            return CheckWidgetQueriesResponse()
        return await self._checks.CheckWidgetQueries(
            CheckWidgetQueriesRequest(workspace_id=workspace_id, questions=questions)
        )

    async def problems(
        self, workspace_id: str, content: DashboardContent
    ) -> tuple[Mapping[str, Status], set[str]]:
        """Why widgets cannot show anything, by their ids, and which sources of the content are not there."""
        asking = {
            widget.widget_id: question for widget in content.widgets if (question := question_of(widget))
        }
        questions = [*asking.values(), *(WidgetQuestion(query=q) for q in questions_of(content).values())]
        checked = await self.look_at(workspace_id, questions)
        absent = {source_id.lower() for source_id in checked.absent_source_ids}
        problems = zip(asking, checked.problems, strict=False)  # those of the widgets stand first
        return {widget_id: problem for widget_id, problem in problems if problem.code}, absent


def question_of(widget: Widget) -> WidgetQuestion | None:
    """What a widget asks; None: nothing."""
    if widget.HasField("query"):
        return WidgetQuestion(query=widget.query)
    if widget.HasField("funnel"):
        return WidgetQuestion(funnel=widget.funnel)
    if widget.HasField("retention"):
        return WidgetQuestion(retention=widget.retention)
    return None
