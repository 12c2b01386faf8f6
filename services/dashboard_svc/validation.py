"""What widgets ask of analytics_svc, looked at before they are stored: may the writer ask this, and can anybody?

A widget's questions run by the right of its dashboard. So whoever writes them needs the right to each of their sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, RetentionQuery
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetQuestion
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Variable, Widget
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.dashboard_svc.definitions import REFERENCE
from services.dashboard_svc.library import shown_widgets
from services.dashboard_svc.sources import Sources, right_to

# How many users of a variable an error names.
MAX_NAMED = 20

Question = TypeVar("Question", Query, FunnelQuery, RetentionQuery)


def filters_of(question: Message) -> Iterator[Filter]:
    """All filters in a question, at any depth."""
    if isinstance(question, Filter):
        yield question
        return
    for field, value in question.ListFields():
        # What is not ours holds no filter, and options of widgets of their own kind are maps.
        if field.message_type is not None and field.message_type.full_name.startswith("meshboard."):
            for part in value if field.is_repeated else [value]:
                yield from filters_of(part)


def cohorts_of(question: Message) -> set[str]:
    """The cohorts that a question, or all questions of a content, filter by."""
    return {filter_.cohort_id for filter_ in filters_of(question)} - {""}


def variable_of(filter_: Filter) -> str:
    """The name of the variable that the filter compares with; "" when it compares with its values."""
    if len(filter_.values) != 1:
        return ""
    named = REFERENCE.fullmatch(filter_.values[0].string_value)
    return named[1] if named else ""


def check_variables(widget: Widget, variables: Iterable[Variable]) -> None:
    """Raises INVALID_ARGUMENT (VARIABLE_UNKNOWN) when the widget names a variable that is not among these."""
    known = {variable.name: variable for variable in variables}
    named = {variable_of(filter_) for filter_ in filters_of(widget)} - {""}
    if unknown := sorted(named - known.keys()):
        raise errors.invalid_argument(
            "VARIABLE_UNKNOWN",
            f"The dashboard has no variable {unknown[0]!r}. A plain $ is written $$.",
            field="filters",
            variable=unknown[0],
        )
    name = widget.time_range_variable
    if name and not (name in known and known[name].HasField("time_span")):
        raise errors.invalid_argument(
            "VARIABLE_UNKNOWN",
            f"The dashboard has no variable {name!r} of the kind time_span.",
            field="time_range_variable",
            variable=name,
        )


def require_unused(before: Iterable[Variable], content: DashboardContent) -> None:
    """Raises FAILED_PRECONDITION (VARIABLE_IN_USE) when the content names one of the variables that it has no more.

    What it lacked before as well may be named: that is there already. Widgets say what those of the library say.
    """
    kept = {variable.name: variable.HasField("time_span") for variable in content.variables}
    gone = [each for each in before if each.name not in kept or each.HasField("time_span") > kept[each.name]]
    for name in (variable.name for variable in gone):
        widgets = [
            widget
            for widget in content.widgets
            if widget.time_range_variable == name or (name not in kept and _compares(widget, name))
        ]
        marks = [
            query.title for query in content.annotation_queries if name not in kept and _compares(query, name)
        ]
        if users := [*(widget.title or widget.widget_id for widget in widgets), *marks]:
            raise errors.failed_precondition(
                "VARIABLE_IN_USE",
                f"The variable {name!r} is named by {', '.join(map(repr, users[:MAX_NAMED]))}.",
                variable=name,
                widgets=", ".join(widget.widget_id for widget in widgets[:MAX_NAMED]),
                count=len(users),
            )


def _compares(asking: Message, name: str) -> bool:
    return any(variable_of(filter_) == name for filter_ in filters_of(asking))


class Validation:
    """What analytics_svc says of widgets. Never to be called inside a transaction."""

    def __init__(self, db: async_sessionmaker[AsyncSession], sources: Sources) -> None:
        self._db = db
        self._sources = sources

    async def check(self, workspace_id: str, widgets: Sequence[Widget]) -> None:
        """Fails as analytics_svc does: when the caller may not ask what the widgets ask, or nobody can.

        Widgets that show one of the library ask what that one asks.
        """
        async with self._db() as session:
            asking = await shown_widgets(session, workspace_id, map(_copy, widgets))
        insights: list[FunnelQuery | RetentionQuery] = [
            insight
            for widget in asking
            for insight in (widget.funnel, widget.retention)
            if insight.source_ids
        ]
        queries = [plain(widget.query) for widget in asking if widget.HasField("query")]
        queries += [
            query for insight in insights for query in right_to(insight.source_ids, cohorts_of(insight))
        ]
        once = {query.SerializeToString(deterministic=True): query for query in queries}
        await self._sources.validate(once.values())
        questions = [
            WidgetQuestion(funnel=plain(insight))
            if isinstance(insight, FunnelQuery)
            else WidgetQuestion(retention=plain(insight))
            for insight in insights
        ]
        for problem in (await self._sources.look_at(workspace_id, questions)).problems:
            if problem.code:
                raise errors.from_status(problem)


def _copy(widget: Widget) -> Widget:
    # Without the text, of which nothing is asked and much would be made.
    return Widget(
        library_widget_id=widget.library_widget_id,
        query=widget.query if widget.HasField("query") else None,
        funnel=widget.funnel if widget.HasField("funnel") else None,
        retention=widget.retention if widget.HasField("retention") else None,
    )


def plain(question: Question) -> Question:
    """The question with each variable in it replaced by what any value may stand for: that the property is there."""
    copy = type(question)()
    copy.CopyFrom(question)
    for filter_ in filters_of(copy):
        if variable_of(filter_):
            filter_.operator = Filter.EXISTS
            del filter_.values[:]
    return copy
