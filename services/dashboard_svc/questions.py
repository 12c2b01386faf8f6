"""What widgets ask analytics_svc, once it is settled who looks at them and what has been chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.rpc.status_pb2 import Status
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, RetentionQuery
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetQuestion
from meshboard.analytics.v1.query_pb2 import AnyOf, Filter, Query, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget

from services.chassis import errors
from services.chassis.interceptor import validate
from services.chassis.kept import Kept
from services.dashboard_svc import library, markdown
from services.dashboard_svc.scopes import Scope, Values, span_of, values_of

Asked = Query | FunnelQuery | RetentionQuery

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
# What compares with one value, and what with several.
_OF_SEVERAL = {
    Filter.OPERATOR_UNSPECIFIED: Filter.IN,
    Filter.EQUAL: Filter.IN,
    Filter.NOT_EQUAL: Filter.NOT_IN,
    Filter.IN: Filter.IN,
    Filter.NOT_IN: Filter.NOT_IN,
}
_OF_NUMBERS = {Filter.GREATER, Filter.GREATER_OR_EQUAL, Filter.LESS, Filter.LESS_OR_EQUAL}
# A sparkline has at most about this many points: the granularity is the finest that has no more.
_POINTS = 125
_SECONDS = {
    Query.MINUTE: 60,
    Query.HOUR: 3600,
    Query.DAY: 86_400,
    Query.WEEK: 604_800,
    Query.MONTH: 2_592_000,
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question to analytics_svc. `key` is the serialized WidgetQuestion: equal keys ask the same.

    `source_ids`, in lower case, are those whose events can change the answer; `last_seconds` is the length of a range
    that slides, 0 for one that does not.
    """

    key: bytes
    source_ids: tuple[str, ...]
    last_seconds: int


@dataclass(frozen=True, slots=True)
class Tile:
    """What a widget asks: nothing, one question, or two with a sparkline; or the problem why it cannot ask.

    `html` is that of a text in which something was chosen.
    """

    widget_id: str
    question: Question | None = None
    sparkline: Question | None = None
    problem: Status | None = None
    html: str = ""

    @property
    def questions(self) -> list[Question]:
        """The questions."""
        return [question for question in (self.question, self.sparkline) if question is not None]


def resolve(widgets: Iterable[Widget], dashboard: Dashboard, scope: Scope) -> list[Tile]:
    """What each of the widgets asks, in their order. What is wrong with one is its own problem."""
    values = values_of(dashboard.variables, scope)
    return [_tile(widget, dashboard, scope, values) for widget in widgets]


class Tiles:
    """What dashboards ask, remembered for as long as the very same messages are asked about.

    That is so while they are in the cache of the process, from which readers are given the messages themselves.
    """

    def __init__(self, max_bytes: int = 16 << 20) -> None:
        # The messages are held, so that no other can have their identity.
        self._found: Kept[tuple[object, ...], tuple[list[Tile], Dashboard, Sequence[Widget]]] = Kept(
            max_bytes
        )

    def of(self, widgets: Sequence[Widget], dashboard: Dashboard, scope: Scope) -> list[Tile]:
        """As `resolve`. The messages, and the answer, are not to be changed."""
        key = (scope, id(dashboard), *map(id, widgets))
        if (found := self._found.get(key)) is not None:
            return found[0]
        tiles = resolve(widgets, dashboard, scope)
        self._found.keep(key, (tiles, dashboard, widgets), _size(tiles))
        return tiles


def _size(tiles: Sequence[Tile]) -> int:
    asked = sum(500 + 3 * len(question.key) for tile in tiles for question in tile.questions)
    return 1_000 + asked + sum(len(tile.html) for tile in tiles)


def _tile(widget: Widget, dashboard: Dashboard, scope: Scope, values: Values) -> Tile:
    if widget.library_widget_id and not widget.kind:
        return Tile(widget.widget_id, problem=library.absent().status())
    asked = _asked(widget)
    try:
        if asked is None:
            return Tile(widget.widget_id, html=markdown.filled(widget.html, values))
        _settle(asked, widget, dashboard, scope, values)
        line = None
        if isinstance(asked, Query) and widget.kind == Widget.NUMBER and widget.display.sparkline:
            line = question_of(_sparkline(asked))
        return Tile(widget.widget_id, question_of(asked), line)
    except errors.Error as error:
        return Tile(widget.widget_id, problem=error.status())


def _asked(widget: Widget) -> Asked | None:
    """A copy of the widget's question as it was written; None when it has none."""
    match widget.kind:
        case Widget.FUNNEL:
            return FunnelQuery.FromString(widget.funnel.SerializeToString())
        case Widget.RETENTION:
            return RetentionQuery.FromString(widget.retention.SerializeToString())
        case _:
            has_query = widget.HasField("query")
            return Query.FromString(widget.query.SerializeToString()) if has_query else None


def _settle(asked: Asked, widget: Widget, dashboard: Dashboard, scope: Scope, values: Values) -> None:
    time_range = _time_range(widget, dashboard, scope, values)
    if time_range is not None:
        asked.time_range.CopyFrom(time_range)
    if dashboard.settings.time_zone and not isinstance(asked, FunnelQuery):  # which has no buckets
        asked.time_zone = dashboard.settings.time_zone
    for filters in _all_filters(asked):
        replaced = settled(filters, values)
        del filters[:]
        filters.extend(replaced)
    if isinstance(asked, Query):
        any_of = [AnyOf(filters=_alternatives(one.filters, values)) for one in asked.any_of]
        del asked.any_of[:]
        asked.any_of.extend(one for one in any_of if one.filters)
    asked.filters.extend(map(Filter.FromString, scope.filters))


def _time_range(widget: Widget, dashboard: Dashboard, scope: Scope, values: Values) -> TimeRange | None:
    """What takes the place of the query's own range; None: nothing does."""
    if widget.own_time_range:
        return None
    if widget.time_range_variable:
        chosen = _chosen(widget.time_range_variable, values)
        if chosen:
            return span_of(widget.time_range_variable, chosen[0])
    return range_of(dashboard, scope)


def range_of(dashboard: Dashboard, scope: Scope) -> TimeRange | None:
    """The time that is looked at: what the viewer has chosen, else the dashboard's; None: neither says."""
    if scope.time_range:
        return TimeRange.FromString(scope.time_range)
    return dashboard.settings.time_range if dashboard.settings.HasField("time_range") else None


def _all_filters(asked: Asked) -> Iterator[RepeatedCompositeFieldContainer[Filter]]:
    """The conditions of a question, but for those of `any_of`."""
    yield asked.filters
    match asked:
        case Query():
            for measure in asked.measures:
                yield measure.filters
        case FunnelQuery():
            for step in asked.steps:
                yield step.filters
            for exclusion in asked.exclusions:
                yield exclusion.events.filters
        case _:
            for name in ("start", "returning"):
                if asked.HasField(name):
                    yield getattr(asked, name).filters


def settled(filters: Iterable[Filter], values: Values) -> list[Filter]:
    """Conditions that all hold, with what was chosen in place of variables; without those for which nothing was.

    Raises INVALID_ARGUMENT: VARIABLE_UNKNOWN or VARIABLE_UNFIT.
    """
    return [found for found in (_settled(one, values) for one in filters) if found is not None]


def _alternatives(filters: Iterable[Filter], values: Values) -> list[Filter]:
    """Conditions of which one holds; none when one of them does not filter."""
    found = [_settled(one, values) for one in filters]
    return [] if None in found else [one for one in found if one is not None]


def _settled(condition: Filter, values: Values) -> Filter | None:
    if len(condition.values) != 1 or not condition.values[0].string_value.startswith("$"):
        return condition
    text = condition.values[0].string_value[1:]
    replaced = Filter()
    replaced.CopyFrom(condition)
    if text.startswith("$"):
        replaced.values[0].string_value = text
        return replaced
    if not _NAME.fullmatch(text):
        return condition
    chosen = _chosen(text, values)
    if not chosen:
        return None
    if len(chosen) > 1 or condition.operator in {Filter.IN, Filter.NOT_IN}:
        if condition.operator not in _OF_SEVERAL:
            name = Filter.Operator.Name(condition.operator)
            raise _unfit(text, f"{name} compares with one value, and several are chosen")
        replaced.operator = _OF_SEVERAL[condition.operator]
    del replaced.values[:]
    for value in chosen:
        if condition.operator in _OF_NUMBERS:
            replaced.values.add(number_value=_number(text, value))
        else:
            replaced.values.add(string_value=value)
    return replaced


def _chosen(name: str, values: Values) -> Sequence[str]:
    if name not in values:
        raise errors.invalid_argument(
            "VARIABLE_UNKNOWN",
            f"The dashboard has no variable {name}; the text itself is written $${name}.",
            variable=name,
        )
    return values[name]


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _unfit(name, "a number is needed")
    return number


def _unfit(name: str, why: str) -> errors.Error:
    return errors.invalid_argument(
        "VARIABLE_UNFIT", f"What is chosen for {name} cannot be compared with: {why}.", variable=name
    )


def _sparkline(query: Query) -> Query:
    """How the number went: the same query over time, without what would be in the way of a line."""
    line = Query()
    line.CopyFrom(query)
    for field in ("comparison", "order_by", "limit", "top", "others"):
        line.ClearField(field)
    seconds = _length_of(query.time_range)
    line.granularity = next((g for g, step in _SECONDS.items() if seconds <= step * _POINTS), Query.MONTH)
    line.fill_gaps = 0 < seconds < math.inf
    return line


def _length_of(time_range: TimeRange) -> float:
    """Seconds; infinite for a range without a start or an end."""
    if time_range.last_seconds:
        return time_range.last_seconds
    if not (time_range.HasField("start_time") and time_range.HasField("end_time")):
        return math.inf
    return time_range.end_time.ToSeconds() - time_range.start_time.ToSeconds()


def question_of(asked: Asked) -> Question:
    """A question as it is asked. Raises INVALID_ARGUMENT (VALIDATION_FAILED) when it breaks a rule of its contract."""
    match asked:
        case Query():
            question = WidgetQuestion(query=asked)
        case FunnelQuery():
            question = WidgetQuestion(funnel=asked)
        case _:
            question = WidgetQuestion(retention=asked)
    validate(question)
    return Question(
        key=question.SerializeToString(deterministic=True),
        source_ids=tuple(map(str.lower, asked.source_ids)),
        last_seconds=asked.time_range.last_seconds,
    )
