"""A `Query` becomes SQL: values are always bound parameters, identifiers come from the tables below.

`compile_query` is a pure function. Its SQL runs on chDB and on a ClickHouse server.
"""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import NoReturn
from zoneinfo import available_timezones

from google.protobuf import struct_pb2
from meshboard.analytics.v1.query_pb2 import Breakdown, Column, Filter, Measure, Query, TimeRange

from services.analytics_svc.event_store import Value
from services.chassis import errors

DEFAULT_LIMIT = 1000
MAX_FILLED_BUCKETS = 50_000
VISIT_GAP_SECONDS = 30 * 60

# Built-in properties and their expressions; `visit_id` is a column of the visits' subquery only.
BUILT_INS = {
    name: name
    for name in (
        "event",
        "distinct_id",
        "visit_id",
        "url",
        "path",
        "host",
        "referrer",
        "referrer_host",
        "user_agent",
        "browser",
        "os",
        "device",
        "country",
        "utm_source",
        "utm_medium",
        "utm_campaign",
        "utm_term",
        "utm_content",
    )
} | {"is_robot": "if(is_robot, 'true', 'false')"}

_OWN = "properties."

# The start of the bucket that `time` is in. An hour is cut by hand: toStartOfHour is half an hour off in zones whose
# summer time moves the clock by half an hour (Australia/Lord_Howe).
_BUCKETS = {
    Query.MINUTE: "toStartOfMinute(time, {zone:String})",
    Query.HOUR: "toDateTime(toUnixTimestamp(time)"
    " - modulo(toUnixTimestamp(time) + timezoneOffset(toTimeZone(time, {zone:String})), 3600), {zone:String})",
    Query.DAY: "toStartOfDay(time, {zone:String})",
    Query.WEEK: "toDateTime(toStartOfWeek(time, 1, {zone:String}), {zone:String})",
    Query.MONTH: "toDateTime(toStartOfMonth(time, {zone:String}), {zone:String})",
}
# Steps that hit every bucket; shorter than any of its kind, also where a clock moves.
_STEP_SECONDS = {Query.MINUTE: 60, Query.HOUR: 1800, Query.DAY: 3600, Query.WEEK: 3600, Query.MONTH: 3600}
_SHORTEST_SECONDS = {
    Query.MINUTE: 60,
    Query.HOUR: 3600,
    Query.DAY: 82_800,
    Query.WEEK: 601_200,
    Query.MONTH: 2_415_600,
}

# Percentiles are exact and interpolated linearly between neighbours (NIST's R-7: PERCENTILE.INC, numpy's default).
# OrNull: what is computed of no number is null.
_NUMERIC = {
    Measure.SUM: "sumOrNullIf({value}, {condition})",
    Measure.AVERAGE: "avgOrNullIf({value}, {condition})",
    Measure.MINIMUM: "minOrNullIf({value}, {condition})",
    Measure.MAXIMUM: "maxOrNullIf({value}, {condition})",
} | {
    aggregation: f"quantileExactInclusiveOrNullIf({level})({{value}}, {{condition}})"
    for aggregation, level in (
        (Measure.P50, 0.5),
        (Measure.P75, 0.75),
        (Measure.P90, 0.9),
        (Measure.P95, 0.95),
        (Measure.P99, 0.99),
    )
}

_COMPARISONS = {
    Filter.GREATER: ">",
    Filter.GREATER_OR_EQUAL: ">=",
    Filter.LESS: "<",
    Filter.LESS_OR_EQUAL: "<=",
}
_NEGATIONS = {
    Filter.NOT_EQUAL: Filter.EQUAL,
    Filter.NOT_CONTAINS: Filter.CONTAINS,
    Filter.NOT_EXISTS: Filter.EXISTS,
    Filter.NOT_IN: Filter.IN,
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What to ask the store, and how to read the answer: its rows have a cell for each of `columns`.

    One row more than `limit` is asked for, to know whether rows were cut off.
    """

    sql: str
    params: dict[str, Value]
    columns: list[Column]
    limit: int


def compile_query(query: Query, workspace_id: str, now: datetime) -> Compiled:
    """Compiles a query that meets the rules of its contract, over sources of the workspace.

    Raises INVALID_ARGUMENT with PROPERTY_UNKNOWN, QUERY_INVALID or TIME_ZONE_UNKNOWN and the path of the field.
    """
    return _Compilation(query, workspace_id, now).compile()


def resolve_range(time_range: TimeRange, now: datetime) -> tuple[int | None, int | None]:
    """The range in milliseconds since 1970, half-open; None is no bound.

    "The last seconds" end at the next full second, so that what has just happened is inside; ranges of more than an
    hour move in steps of a 3,600th of their length, at most a minute, so that answers can be shared.
    """
    if seconds := time_range.last_seconds:
        step = min(60, max(1, seconds // 3600))
        end = math.ceil(now.timestamp() / step) * step
        return (end - seconds) * 1000, end * 1000
    start = time_range.start_time.ToMilliseconds() if time_range.HasField("start_time") else None
    end_ = time_range.end_time.ToMilliseconds() if time_range.HasField("end_time") else None
    if start is not None and end_ is not None and start > end_:
        _invalid("query.time_range", "The range ends before it starts.")
    return start, end_


@dataclass(slots=True)
class _Compilation:
    query: Query
    workspace_id: str
    now: datetime
    params: dict[str, Value] = field(default_factory=dict)
    uses_visits: bool = False

    def compile(self) -> Compiled:
        query = self.query
        zone = query.time_zone or "UTC"
        if zone not in _time_zones():
            raise errors.invalid_argument(
                "TIME_ZONE_UNKNOWN",
                f"{zone} is no time zone.",
                field="query.time_zone",
                nearest=", ".join(difflib.get_close_matches(zone, _time_zones())),
            )
        bucket = _BUCKETS.get(query.granularity)
        if bucket:
            self.params["zone"] = zone
        groups = [bucket] if bucket else []
        columns = [Column(name="time", type=Column.TIME)] if bucket else []
        for index, breakdown in enumerate(query.breakdowns):
            groups.append(self._breakdown(breakdown, f"query.breakdowns[{index}].property"))
            columns.append(Column(name=breakdown.property, type=Column.STRING))
        aggregates: list[str] = []
        for index, measure in enumerate(query.measures or [Measure()]):
            aggregates.append(self._measure(measure, f"query.measures[{index}]"))
            columns.append(Column(name=measure.alias or _default_alias(measure), type=Column.NUMBER))
        self._check_names(columns, len(groups))
        order = self._order(columns, len(groups))

        start, end = resolve_range(query.time_range, self.now)
        conditions = self._filters(query.filters, "query.filters")
        rows = self._aggregation(groups, aggregates, self._source(start, end), conditions)
        if query.fill_gaps:
            rows = self._filled(rows, groups, query.measures or [Measure()], start, end)
        cells = [f"c{i}" for i in range(len(columns))]
        if bucket:
            cells[0] = "formatDateTime(c0, '%Y-%m-%dT%H:%i:%SZ', 'UTC')"
        limit = query.limit or DEFAULT_LIMIT
        sql = f"SELECT {', '.join(cells)} FROM ({rows})"
        if order:
            sql += f" ORDER BY {order}"
        return Compiled(f"{sql} LIMIT {limit + 1}", self.params, columns, limit)

    # Rows

    def _aggregation(
        self, groups: list[str], aggregates: list[str], source: str, conditions: list[str]
    ) -> str:
        expressions = [f"{expression} AS c{i}" for i, expression in enumerate([*groups, *aggregates])]
        sql = f"SELECT {', '.join(expressions)} FROM {source}"
        if conditions:
            sql += f" WHERE {' AND '.join(conditions)}"
        if groups:
            sql += f" GROUP BY {', '.join(f'c{i}' for i in range(len(groups)))}"
        return sql

    def _source(self, start: int | None, end: int | None) -> str:
        scope = [
            f"workspace_id = {self._bind(self.workspace_id, 'UUID')}",
            f"source_id IN {self._bind(sorted(self.query.source_ids), 'Array(UUID)')}",
        ]
        after = [f"time >= {self._instant(start)}"] if start is not None else []
        before = [f"time < {self._instant(end)}"] if end is not None else []
        in_range = f"(SELECT * FROM events WHERE {' AND '.join(scope + after + before)})"
        if not self.uses_visits:
            return in_range
        # A visit is named by its beginning, which may lie before the range: all events up to its end are looked at, of
        # those who have any in it.
        seen = f"distinct_id IN (SELECT distinct_id FROM {in_range})" if after else "1"
        window = "PARTITION BY source_id, distinct_id ORDER BY time, sequence, position"
        return f"""(
            SELECT *, lower(hex(sipHash128(source_id, distinct_id, begin))) AS visit_id
            FROM (
                SELECT *, max(if(begins, time, NULL)) OVER ({window} ROWS UNBOUNDED PRECEDING) AS begin
                FROM (
                    SELECT *, ifNull(dateDiff('millisecond', lagInFrame(toNullable(time)) OVER ({window}
                        ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING), time)
                        >= {VISIT_GAP_SECONDS * 1000}, true) AS begins
                    FROM events WHERE {" AND ".join([*scope, *before, seen])}
                )
            )
            {"WHERE " + after[0] if after else ""}
        )"""

    def _filled(
        self, rows: str, groups: list[str], measures: Sequence[Measure], start: int | None, end: int | None
    ) -> str:
        """The rows, and one for each bucket that a group lacks. Without breakdowns there is one group."""
        granularity = self.query.granularity
        if granularity not in _BUCKETS:
            _invalid("query.fill_gaps", "Gaps can be filled in a query with a granularity.")
        if start is None or end is None:
            _invalid("query.fill_gaps", "Gaps can be filled in a range with a start and an end.")
        if (end - start) / 1000 / _SHORTEST_SECONDS[granularity] > MAX_FILLED_BUCKETS:
            _invalid("query.fill_gaps", f"The range has more than {MAX_FILLED_BUCKETS} buckets.")
        step = _STEP_SECONDS[granularity] * 1000
        # Every bucket is hit by a step or by the last instant.
        buckets = f"""(
            SELECT groupUniqArray({_BUCKETS[granularity]}) FROM (
                SELECT {self._instant(start)} + toIntervalMillisecond(least(number * {step}, {end - start - 1})) AS time
                FROM numbers({(end - start + step - 1) // step + 1 if end > start else 0})
            )
        )"""
        keys = [f"c{i}" for i in range(1, len(groups))]
        numbers = [f"c{len(groups) + i}" for i in range(len(measures))]
        empty = ["toUInt64(0)" if _counts(measure) else "NULL" for measure in measures]
        kept = [f"cell.{i + 2} AS {name}" for i, name in enumerate(numbers)]
        group_by = f"GROUP BY {', '.join(keys)}" if keys else ""
        return f"""
            SELECT {", ".join(["cell.1 AS c0", *keys, *kept])}
            FROM (
                SELECT {", ".join([*keys, f"groupArray(tuple({', '.join(['c0', *numbers])})) AS cells"])}
                FROM ({rows}) {group_by}
            )
            ARRAY JOIN arrayConcat(cells, arrayMap(bucket -> tuple({", ".join(["bucket", *empty])}),
                arrayExcept({buckets}, arrayMap(cell -> cell.1, cells)))) AS cell
        """

    def _instant(self, milliseconds: int) -> str:
        clamped = min(max(milliseconds, 0), 4_102_444_800_000)  # 1970 to 2100: no event is outside
        return f"fromUnixTimestamp64Milli({self._bind(clamped, 'Int64')}, 'UTC')"

    def _order(self, columns: list[Column], group_count: int) -> str:
        indexes = {column.name: i for i, column in enumerate(columns)}
        keys: dict[int, bool] = {}
        for position, order in enumerate(self.query.order_by):
            if order.column not in indexes:
                _invalid(
                    f"query.order_by[{position}].column",
                    f"The result has no column {order.column}.",
                    columns=", ".join(indexes),
                )
            keys.setdefault(indexes[order.column], order.descending)
        if columns[0].type == Column.TIME:
            keys.setdefault(0, False)
        if not self.query.order_by:
            keys.setdefault(group_count, True)
        for index in range(group_count):  # equal rows always come in the same order
            keys.setdefault(index, False)
        if not group_count:
            return ""
        return ", ".join(
            f"c{i} {'DESC' if descending else 'ASC'} NULLS LAST" for i, descending in keys.items()
        )

    def _check_names(self, columns: list[Column], group_count: int) -> None:
        seen: set[str] = set()
        for index, column in enumerate(columns):
            if column.name in seen:
                measure = index - group_count
                where = f"query.measures[{measure}].alias" if measure >= 0 else "query.breakdowns"
                _invalid(where, f"Two columns are named {column.name}.")
            seen.add(column.name)

    # Columns

    def _breakdown(self, breakdown: Breakdown, path: str) -> str:
        return self._property(breakdown.property, path).text

    def _measure(self, measure: Measure, path: str) -> str:
        conditions = self._filters(measure.filters, f"{path}.filters")
        aggregation = measure.aggregation or Measure.COUNT
        name = measure.property
        if aggregation in _NUMERIC:
            if not name.startswith(_OWN):
                self._property(name, f"{path}.property")
                _invalid(
                    f"{path}.property",
                    f"{Measure.Aggregation.Name(aggregation)} needs a property of your own events.",
                )
            own = self._property(name, f"{path}.property")
            condition = " AND ".join([own.is_number, *conditions])
            return _NUMERIC[aggregation].format(value=own.number, condition=condition)
        if aggregation == Measure.UNIQUE:
            of = self._property(name or "distinct_id", f"{path}.property")
            return f"uniqExactIf({of.text}, {' AND '.join([of.exists, *conditions])})"
        if name:
            conditions.append(self._property(name, f"{path}.property").exists)
        return f"countIf({' AND '.join(conditions) or '1'})"

    def _filters(self, filters: Iterable[Filter], path: str) -> list[str]:
        return [self._filter(f, f"{path}[{index}]") for index, f in enumerate(filters)]

    def _filter(self, condition: Filter, path: str) -> str:
        operator = condition.operator or Filter.EQUAL
        positive = _NEGATIONS.get(operator, operator)
        sql = self._positive(positive, condition, path)
        return sql if positive == operator else f"NOT {sql}"

    def _positive(self, operator: "Filter.Operator.ValueType", condition: Filter, path: str) -> str:
        """An expression that is 0 or 1, never NULL, so that it can be negated."""
        of = self._property(condition.property, f"{path}.property")
        values = condition.values
        if operator == Filter.EXISTS:
            if values:
                _invalid(f"{path}.values", "This operator takes no value.")
            return f"({of.exists})"
        if not values or (operator != Filter.IN and len(values) != 1):
            _invalid(
                f"{path}.values",
                "Exactly one value is needed." if operator != Filter.IN else "A value is needed.",
            )
        for index, value in enumerate(values):
            kind = value.WhichOneof("kind")
            if kind not in {"string_value", "number_value", "bool_value"} or not math.isfinite(
                value.number_value
            ):
                _invalid(f"{path}.values[{index}]", "A value is a text, a number or a boolean.")
        numbers = [value.number_value for value in values if value.HasField("number_value")]
        if operator in _COMPARISONS:
            if not numbers:
                _invalid(f"{path}.values[0]", "This operator compares with a number.")
            if of.is_number == "0":
                _invalid(
                    f"{path}.property", f"{condition.property} is a text: it is not compared with a number."
                )
            bound = self._bind(numbers[0], "Float64")
            return f"({of.is_number} AND {of.number} {_COMPARISONS[operator]} {bound})"
        texts = [_value_text(value) for value in values]
        if operator == Filter.CONTAINS:
            return f"({of.exists} AND position({of.text}, {self._bind(texts[0], 'String')}) > 0)"
        if operator == Filter.STARTS_WITH:
            return f"({of.exists} AND startsWith({of.text}, {self._bind(texts[0], 'String')}))"
        same = f"({of.exists} AND {of.text} IN {self._bind(texts, 'Array(String)')})"
        if numbers and of.is_number != "0":
            bound = self._bind(numbers, "Array(Float64)")
            return f"({same} OR ({of.is_number} AND has({bound}, {of.number})))"
        return same

    def _property(self, name: str, path: str) -> "_Property":
        if name.startswith(_OWN) and len(name) > len(_OWN):
            key = self._bind(name.removeprefix(_OWN), "String")
            is_number = f"mapContains(numbers, {key})"
            return _Property(
                text=f"if({is_number}, toString(numbers[{key}]), strings[{key}])",
                exists=f"({is_number} OR mapContains(strings, {key}))",
                number=f"numbers[{key}]",
                is_number=is_number,
            )
        if name not in BUILT_INS:
            nearest = difflib.get_close_matches(name, BUILT_INS)
            raise errors.invalid_argument(
                "PROPERTY_UNKNOWN",
                f"There is no built-in property {name}."
                + (f" Did you mean {' or '.join(nearest)}?" if nearest else "")
                + f" One of your own is properties.{name}.",
                field=path,
                property=name,
                nearest=", ".join(nearest),
            )
        self.uses_visits = self.uses_visits or name == "visit_id"
        expression = BUILT_INS[name]
        return _Property(text=expression, exists=f"{expression} != ''", number="NULL", is_number="0")

    def _bind(self, value: Value, kind: str) -> str:
        name = f"p{len(self.params)}"
        self.params[name] = value
        return f"{{{name}:{kind}}}"


@dataclass(frozen=True, slots=True)
class _Property:
    """SQL about one property: its text, whether it is there, its number, and whether that is one."""

    text: str
    exists: str
    number: str
    is_number: str


@cache
def _time_zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _counts(measure: Measure) -> bool:
    return measure.aggregation in {Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT, Measure.UNIQUE}


def _default_alias(measure: Measure) -> str:
    aggregation = measure.aggregation or Measure.COUNT
    name = measure.property or ("distinct_id" if aggregation == Measure.UNIQUE else "")
    return "_".join(part for part in (Measure.Aggregation.Name(aggregation).lower(), name) if part)


def _value_text(value: struct_pb2.Value) -> str:
    """A filter's value as the store writes it: 404 and not 404.0."""
    if value.HasField("bool_value"):
        return "true" if value.bool_value else "false"
    if value.HasField("string_value"):
        return value.string_value
    number = value.number_value
    return str(int(number)) if number.is_integer() else repr(number)


def _invalid(path: str, text: str, **metadata: str) -> NoReturn:
    raise errors.invalid_argument("QUERY_INVALID", text, field=path, **metadata)
