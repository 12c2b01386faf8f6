"""What widgets ask of analytics_svc, looked at before they are stored: may the writer ask this, and can anybody?

A widget's questions run by the right of its dashboard. So whoever writes them needs the right to each of their sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, RetentionQuery
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetQuestion
from meshboard.analytics.v1.query_pb2 import AnyOf, Filter, Query
from meshboard.dashboard.v1.dashboard_pb2 import Variable, Widget
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.dashboard_svc.definitions import REFERENCE
from services.dashboard_svc.library import shown_widgets
from services.dashboard_svc.sources import Sources

# Filters in one AnyOf.
_ALTERNATIVES = 20

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
        queries += [_right_to(insight) for insight in insights]
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


def _right_to(insight: FunnelQuery | RetentionQuery) -> Query:
    """A query that takes the rights that the insight takes: to its sources, and to see its cohorts."""
    cohort_ids = sorted({filter_.cohort_id for filter_ in filters_of(insight)} - {""})
    return Query(
        source_ids=insight.source_ids,
        any_of=[
            AnyOf(filters=[Filter(cohort_id=cohort_id) for cohort_id in cohort_ids[at : at + _ALTERNATIVES]])
            for at in range(0, len(cohort_ids), _ALTERNATIVES)
        ],
    )
