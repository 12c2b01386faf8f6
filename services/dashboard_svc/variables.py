"""What viewers can choose for the variables of dashboards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Query
from meshboard.dashboard.v1 import variable_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Variable, WidgetData
from meshboard.dashboard.v1.variable_service_pb2_grpc import VariableServiceServicer

from services.chassis import auth, errors
from services.chassis.paging import Pages
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.questions import question_of, range_of, settled
from services.dashboard_svc.scopes import Scope, scope_of, values_of

Context = Any
DEFAULT_LIMIT = 100


class VariableServicer(VariableServiceServicer):
    """meshboard.dashboard.v1.VariableService."""

    def __init__(self, boards: Boards, pages: Pages, answers: Answers) -> None:
        self.boards = boards
        self.pages = pages
        self.answers = answers

    async def ListVariableValues(
        self, request: pb.ListVariableValuesRequest, context: Context
    ) -> pb.ListVariableValuesResponse:
        """Asks by the dashboard's right."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        dashboard = await self.boards.dashboard(workspace_id, request.dashboard_id.lower())
        time_range = request.time_range if request.HasField("time_range") else None
        scope = scope_of(dashboard.variables, request.choices, time_range)
        found = await values_to_choose(self.answers, dashboard, request.name, scope, request.query)
        values, next_page_token = page.close(page.rest(found, _key), _key)
        return pb.ListVariableValuesResponse(values=values, next_page_token=next_page_token)


async def values_to_choose(
    answers: Answers, dashboard: Dashboard, name: str, scope: Scope, query: str = ""
) -> Sequence[pb.VariableValue]:
    """What begins with the query, whatever the case, of what can be chosen for a variable: the most frequent first.

    Raises NOT_FOUND (VARIABLE_NOT_FOUND), and as queries do.
    """
    for index, variable in enumerate(dashboard.variables):
        if variable.name == name:
            if variable.HasField("property_values"):
                question = question_of(_query(dashboard, index, scope, query))
                answer = (await answers.ask(dashboard.workspace_id, [question]))[question.key]
                return _read(WidgetData.FromString(answer.data))
            return _options(variable.list, query.casefold())
    raise errors.not_found("VARIABLE_NOT_FOUND", "The dashboard has no such variable.", variable=name)


def _options(choices: Variable.OptionList, beginning: str) -> list[pb.VariableValue]:
    return [
        pb.VariableValue(value=option.value, title=option.title or option.value)
        for option in choices.options
        if (option.title or option.value).casefold().startswith(beginning)
    ]


def _query(dashboard: Dashboard, index: int, scope: Scope, beginning: str) -> Query:
    asked = dashboard.variables[index].property_values
    query = Query(
        source_ids=[asked.source_id],
        time_range=range_of(dashboard, scope),
        breakdowns=[Breakdown(property=asked.property)],
        filters=[Filter(property=asked.property, operator=Filter.EXISTS)],
        limit=asked.limit or DEFAULT_LIMIT,
    )
    if beginning:
        pattern = query.filters.add(property=asked.property, operator=Filter.MATCHES)
        pattern.values.add(string_value=f"(?i)^{re.escape(beginning)}")
    query.filters.extend(settled(asked.filters, values_of(dashboard.variables[:index], scope)))
    query.filters.extend(map(Filter.FromString, scope.filters))
    return query


def _read(answer: WidgetData) -> list[pb.VariableValue]:
    if answer.HasField("error"):
        raise errors.from_status(answer.error)
    found = [
        pb.VariableValue(
            value=value.string_value, title=value.string_value, event_count=int(count.number_value)
        )
        for value, count in (row.values for row in answer.result.rows)
        if value.string_value
    ]
    return sorted(found, key=_key)


def _key(value: pb.VariableValue) -> tuple[int, str]:
    return (-value.event_count, value.value)
