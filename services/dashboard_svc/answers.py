"""What widgets show: the answers of analytics_svc to their queries, asked by the right of the dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from meshboard.analytics.v1.internal_query_service_pb2 import RunWidgetQueryRequest
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceStub
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import Widget, WidgetData

from services.chassis import errors
from services.chassis.clients import Peer
from services.chassis.deadline import seconds_left

QUERY_SECONDS = 10.0
# Queries of one dashboard that run at once.
QUERIES_AT_ONCE = 8
_TRANSIENT = {grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}


def key_of(query: Query) -> bytes:
    """Equal for equal queries."""
    return query.SerializeToString(deterministic=True)


def of_widget(widget_id: str, answer: WidgetData) -> WidgetData:
    """The answer as the data of a widget."""
    if answer.HasField("error"):
        return WidgetData(widget_id=widget_id, error=answer.error)
    return WidgetData(widget_id=widget_id, result=answer.result)


def is_transient(answer: WidgetData) -> bool:
    """Whether there is no answer for a reason that passes by itself."""
    return answer.HasField("error") and answer.error.code in _TRANSIENT


class Answers:
    """Asks analytics_svc. What fails becomes the `error` of the widget in question."""

    def __init__(self, analytics: Peer) -> None:
        self._queries = analytics.stub(InternalQueryServiceStub)

    async def answer(self, workspace_id: str, query: Query, seconds: float = QUERY_SECONDS) -> WidgetData:
        """The answer to one query, as data without a widget's id."""
        request = RunWidgetQueryRequest(workspace_id=workspace_id, query=query)
        try:
            response = await self._queries.RunWidgetQuery(request, timeout=seconds)
        except errors.Error as error:
            return WidgetData(error=error.status())
        return WidgetData(result=response.result)

    async def answer_all(self, workspace_id: str, widgets: Sequence[Widget]) -> list[WidgetData]:
        """The data of each widget, in their order; equal queries are asked once.

        Returns shortly before the call's deadline, with errors in place of what is not there yet.
        """
        seconds = min(QUERY_SECONDS, 0.9 * seconds_left())
        room = asyncio.Semaphore(QUERIES_AT_ONCE)

        async def answer(query: Query) -> WidgetData:
            try:
                async with asyncio.timeout(seconds), room:
                    return await self.answer(workspace_id, query, seconds)
            except TimeoutError:
                return WidgetData(
                    error=errors.deadline_exceeded("The query did not finish in time.").status()
                )

        async with asyncio.TaskGroup() as tasks:
            running = {
                key: tasks.create_task(answer(query))
                for key, query in {key_of(widget.query): widget.query for widget in widgets}.items()
            }
        return [of_widget(widget.widget_id, running[key_of(widget.query)].result()) for widget in widgets]
