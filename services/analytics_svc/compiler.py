"""A `Query` becomes SQL: values are always bound parameters, identifiers come from tables.

`compile_query` is a pure function. Its SQL runs on chDB and on a ClickHouse server.
"""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from calendar import monthrange
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any
from zoneinfo import ZoneInfo

from meshboard.analytics.v1.query_pb2 import Breakdown, Column, Comparison, Measure, Query

from services.analytics_svc.event_store import Value
from services.analytics_svc.formulas import compile_formula
from services.analytics_svc.selection import (
    BUCKETS,
    ODD_ZONES,
    OWN,
    QUARTERED,
    Selection,
    invalid,
    resolve_range,
)

DEFAULT_LIMIT = 1000
MAX_FILLED_BUCKETS = 50_000
# The engine plans a statement of this length in seconds, and cannot be stopped meanwhile.
MAX_SQL_LENGTH = 64 << 10
# Before the names of columns of the earlier period.
PREVIOUS = "previous_"

# Steps that hit every bucket; shorter than any of its kind, also where a clock moves.
_STEP_SECONDS = {Query.MINUTE: 60, Query.HOUR: 1800} | dict.fromkeys(
    (Query.DAY, Query.WEEK, Query.MONTH, Query.QUARTER, Query.YEAR), 3600
)
_SHORTEST_SECONDS = {
    Query.MINUTE: 60,
    Query.HOUR: 3600,
    Query.DAY: 82_800,
    Query.WEEK: 601_200,
    Query.MONTH: 2_415_600,
    Query.QUARTER: 7_772_400,
    Query.YEAR: 31_532_400,
}

_COUNTS = {Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT}
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


@dataclass(frozen=True, slots=True)
class Compiled:
    """What to ask the store, and how to read the answer: its rows have a cell for each of `columns`.

    One row more than `limit` is asked for, to know whether rows were cut off. `looks_beyond_sources` says that events
    of other sources of the workspace can change the answer.
    """

    sql: str
    params: dict[str, Value]
    columns: list[Column]
    limit: int
    looks_beyond_sources: bool = False

    @classmethod
    def of(cls, sql: str, events: Selection, columns: list[Column], limit: int) -> "Compiled":
        """The SQL of a question. Raises INVALID_ARGUMENT (QUERY_INVALID) when it is longer than a statement can be."""
        events.check_size()
        if len(sql) > MAX_SQL_LENGTH:
            invalid("query", "The query has too many conditions and measures.")
        return cls(sql, events.params, columns, limit, events.looks_beyond_sources)


def compiled(sql: str, events: Selection, names: Iterable[str], limit: int) -> Compiled:
    """A question whose answer is made into a message of its own, with the names of the columns. Raises as `of` does."""
    return Compiled.of(sql, events, [Column(name=name) for name in names], limit)


def cells_of(row: Any) -> list[Any]:
    """The cells of a row, or of an array in one."""
    return list(row)


def compile_query(
    query: Query,
    workspace_id: str,
    now: datetime,
    cohorts: Mapping[str, Callable[[Selection], str]] = MappingProxyType({}),
    *,
    from_counts: bool = True,
) -> Compiled:
    """Compiles a query that meets the rules of its contract, over sources of the workspace.

    `cohorts` are those that its filters name. Without `from_counts`, which tests and the bench switch off, events are
    read also where the counts that the store keeps would give the same answer. Raises INVALID_ARGUMENT with
    PROPERTY_UNKNOWN, QUERY_INVALID, FORMULA_INVALID, PATTERN_INVALID or TIME_ZONE_UNKNOWN and the path of the field.
    """
    start, end = resolve_range(query.time_range, now)
    events = Selection(workspace_id, query.source_ids, start, end, cohorts)
    events.bind_zone(query.time_zone)
    measures = list(query.measures) or [Measure()]
    from_counts = from_counts and _asks_for_counts(query, measures)
    return _Compilation(query, events, measures, from_counts).compile()


@dataclass(slots=True)
class _Compilation:
    """Rows are made in layers, each a subquery over the one before: groups, the earlier period, gaps, formulas.

    In all of them `k0`, `k1`, … are the keys of the groups (a bucket of time as seconds since 1970), `m0`, `m1`, … the
    measures by their places in the query, and `e0`, `e1`, … those of the earlier period.
    """

    query: Query
    events: Selection
    measures: list[Measure]
    # Whether the counts that the store keeps by quarters of an hour answer it, so that no event is read.
    from_counts: bool
    names: list[str] = field(default_factory=list)
    # The places of the measures that have a number of the earlier period.
    compared: list[int] = field(default_factory=list)

    def compile(self) -> Compiled:
        query, events = self.query, self.events
        bucket = BUCKETS.get(query.granularity)
        columns = [Column(name="time", type=Column.TIME)] if bucket else []
        cells = ["formatDateTime(toDateTime(k0, 'UTC'), '%Y-%m-%dT%H:%i:%SZ', 'UTC')"] if bucket else []
        keys = [f"toUnixTimestamp({bucket})"] if bucket else []
        breakdowns = [
            self._breakdown(breakdown, f"query.breakdowns[{index}].property")
            for index, breakdown in enumerate(query.breakdowns)
        ]
        columns += [Column(name=breakdown.property, type=Column.STRING) for breakdown in query.breakdowns]
        cells += [f"k{len(keys) + i}" for i in range(len(breakdowns))]
        aggregates = {
            index: self._measure(measure, f"query.measures[{index}]")
            for index, measure in enumerate(self.measures)
            if not measure.formula
        }
        self.names = [measure.alias or _default_alias(measure) for measure in self.measures]
        formulas = self._formulas()
        for letter, places in (("m", range(len(self.measures))), ("e", self.compared)):
            for index in places:
                if not self.measures[index].hidden:
                    name = self.names[index] if letter == "m" else f"{PREVIOUS}{self.names[index]}"
                    columns.append(Column(name=name, type=Column.NUMBER))
                    cells.append(f"{letter}{index}")
        self._check_names(columns, len(keys) + len(breakdowns))
        order = self._order(columns, cells, len(keys) + len(breakdowns))

        conditions = events.filters(query.filters, "query.filters")
        for index, alternatives in enumerate(query.any_of):
            one_of = events.filters(alternatives.filters, f"query.any_of[{index}].filters")
            conditions.append(f"({' OR '.join(one_of)})")
        groups = _Groups(keys, breakdowns, aggregates, conditions)
        compared = query.HasField("comparison")
        source = self._both_periods() if compared else self._events(events)
        if query.top or query.others:
            source, groups = self._top(source, groups)
        rows = self._compared(source, groups) if compared else groups.rows(source)
        if query.fill_gaps:
            rows = self._filled(rows, len(keys) + len(breakdowns), list(aggregates))
        for letter, index, formula in formulas:
            rows = f"SELECT *, {formula} AS {letter}{index} FROM ({rows})"
        limit = query.limit or DEFAULT_LIMIT
        shown = ", ".join(f"{cell} AS c{i}" for i, cell in enumerate(cells))
        sql = f"SELECT {shown} FROM ({rows})"
        if order:
            sql += f" ORDER BY {order}"
        return Compiled.of(f"{sql} LIMIT {limit + 1}", events, columns, limit)

    # Rows

    def _events(self, events: Selection) -> str:
        return events.quarters() if self.from_counts else events.rows()

    def _top(self, source: str, groups: "_Groups") -> tuple[str, "_Groups"]:
        """The groups that have most of the first measure; all others are null, or left out."""
        if not self.query.top:
            invalid("query.others", "There are others in a query with a top.")
        if not groups.breakdowns:
            invalid("query.top", "There is a top of the breakdowns: name one.")
        names = [f"k{i}" for i in range(len(groups.breakdowns))]
        first = next(iter(groups.aggregates.items()), (0, self._count([])))
        best = f"""
            SELECT tuple({", ".join(names)})
            FROM ({_Groups([], groups.breakdowns, dict([first]), groups.conditions).rows(self._events(self.events))})
            ORDER BY m{first[0]} DESC NULLS LAST, {", ".join(names)} LIMIT {self.query.top}
        """
        is_top = f"tuple({', '.join(groups.breakdowns)}) IN ({best})"
        if not self.query.others:
            return source, replace(groups, conditions=[*groups.conditions, is_top])
        tagged = f"(SELECT *, {is_top} AS is_top FROM {source} {groups.where})"
        nullable = [f"if(is_top, toNullable({breakdown}), NULL)" for breakdown in groups.breakdowns]
        return tagged, replace(groups, breakdowns=nullable, conditions=[])

    def _earlier(self) -> Selection:
        events = self.events
        if events.start is None or events.end is None:
            invalid("query.comparison", "A range with a start and an end can be compared.")
        start, end = earlier_range(self.query, events.start, events.end)
        return replace(events, start=start, end=end)

    def _both_periods(self) -> str:
        """The events of both; where the periods overlap, an event is there twice."""
        return f"""(
            SELECT *, 0 AS is_earlier FROM {self._events(self.events)}
            UNION ALL SELECT *, 1 AS is_earlier FROM {self._events(self._earlier())}
        )"""

    def _compared(self, source: str, groups: "_Groups") -> str:
        """The rows, each with the numbers of the earlier period beside its own."""
        keys = [f"k{i}" for i in range(len(groups.keys))]
        numbers = [f"m{index}" for index in groups.aggregates]
        rows, missing = groups.rows(source, "is_earlier"), ""
        if self.query.granularity:
            pairs = self._pairs()
            bucket = f"if(is_earlier, transform(k0, {pairs}.2, {pairs}.1, toUInt32(0)), k0) AS k0"
            rows = f"SELECT {', '.join(['is_earlier', bucket, *keys[1:], *numbers])} FROM ({rows})"
            rows = f"SELECT * FROM ({rows}) WHERE k0 != 0"
            missing = f"k0 > {pairs}.1[-1]"
        columns = list(keys)
        for index in groups.aggregates:
            of_earlier = f"anyIf(m{index}, is_earlier)"
            columns.append(f"anyIf(m{index}, NOT is_earlier) AS m{index}_")
            columns.append(f"{f'if({missing}, NULL, {of_earlier})' if missing else of_earlier} AS e{index}")
        renamed = [f"m{index}_ AS m{index}, e{index}" for index in groups.aggregates]
        group_by = f"GROUP BY {', '.join(keys)}" if keys else ""
        return f"SELECT {', '.join([*keys, *renamed])} FROM (SELECT {', '.join(columns)} FROM ({rows}) {group_by})"

    def _pairs(self) -> str:
        """Two arrays: the buckets of the range that have one of the earlier period beside them, and those."""
        late = self._buckets(self.events, "query.comparison")
        early = self._buckets(self._earlier(), "query.comparison")
        return f"""(
            SELECT (arrayResize(late, n), arrayResize(early, n))
            FROM (SELECT {late} AS late, {early} AS early, least(length(late), length(early)) AS n)
        )"""

    def _buckets(self, events: Selection, path: str) -> str:
        """A sorted array of the beginnings of all buckets in a range, in seconds since 1970."""
        granularity, start, end = self.query.granularity, events.start, events.end
        if start is None or end is None:
            invalid(path, "This needs a range with a start and an end.")
        if (end - start) / 1000 / _SHORTEST_SECONDS[granularity] > MAX_FILLED_BUCKETS:
            invalid(path, f"The range has more than {MAX_FILLED_BUCKETS} buckets.")
        step = _STEP_SECONDS[granularity] * 1000
        # Every bucket is hit by a step or by the last instant.
        return f"""(
            SELECT arraySort(groupUniqArray(toUnixTimestamp({BUCKETS[granularity]}))) FROM (
                SELECT {events.instant(start)}
                    + toIntervalMillisecond(least(number * {step}, {end - start - 1})) AS time
                FROM numbers({(end - start + step - 1) // step + 1 if end > start else 0})
            )
        )"""

    def _filled(self, rows: str, key_count: int, aggregates: list[int]) -> str:
        """The rows, and one for each bucket that a group lacks. Without breakdowns there is one group."""
        if self.query.granularity not in BUCKETS:
            invalid("query.fill_gaps", "Gaps can be filled in a query with a granularity.")
        buckets = self._buckets(self.events, "query.fill_gaps")
        keys = [f"k{i}" for i in range(1, key_count)]
        numbers = [f"m{index}" for index in aggregates]
        empty = ["toUInt64(0)" if _counts(self.measures[index]) else "NULL" for index in aggregates]
        if self.query.HasField("comparison"):
            numbers += [f"e{index}" for index in aggregates]
            # What has no bucket of the earlier period beside it is null, not nothing.
            empty += [f"if(bucket > {self._pairs()}.1[-1], NULL, {nothing})" for nothing in empty]
        kept = [f"cell.{i + 2} AS {name}" for i, name in enumerate(numbers)]
        group_by = f"GROUP BY {', '.join(keys)}" if keys else ""
        return f"""
            SELECT {", ".join(["cell.1 AS k0", *keys, *kept])}
            FROM (
                SELECT {", ".join([*keys, f"groupArray(tuple({', '.join(['k0', *numbers])})) AS cells"])}
                FROM ({rows}) {group_by}
            )
            ARRAY JOIN arrayConcat(cells, arrayMap(bucket -> tuple({", ".join(["bucket", *empty])}),
                arrayExcept({buckets}, arrayMap(cell -> cell.1, cells)))) AS cell
        """

    def _formulas(self) -> list[tuple[str, int, str]]:
        """Columns to compute, each of those before it: the letter and the place of each, and its SQL."""
        compared = self.query.HasField("comparison")
        known: dict[str, str] = {}
        formulas = []
        for index, (measure, name) in enumerate(zip(self.measures, self.names, strict=True)):
            if not measure.formula:
                known[name] = f"m{index}"
                if compared:
                    known[f"{PREVIOUS}{name}"] = f"e{index}"
                    self.compared.append(index)
                continue
            path = f"query.measures[{index}]"
            if measure.aggregation or measure.property or measure.filters:
                invalid(
                    f"{path}.formula", "A formula stands alone: without aggregation, property and filters."
                )
            if not measure.alias:
                invalid(f"{path}.alias", "A formula needs an alias.")
            used: set[str] = set()
            formulas.append(("m", index, self._formula(measure.formula, known, used, f"{path}.formula")))
            # What compares the periods itself has no number of the earlier one.
            if compared and not any(column.startswith("e") for column in used):
                of_earlier = {n: known[f"{PREVIOUS}{n}"] for n in known if f"{PREVIOUS}{n}" in known}
                if all(self._is_compared(column) for column in used):
                    sql = self._formula(measure.formula, of_earlier, set(), f"{path}.formula")
                    formulas.append(("e", index, sql))
                    known[f"{PREVIOUS}{name}"] = f"e{index}"
                    self.compared.append(index)
            known[name] = f"m{index}"
        return formulas

    def _is_compared(self, column: str) -> bool:
        return int(column[1:]) in self.compared

    def _formula(self, formula: str, known: dict[str, str], used: set[str], path: str) -> str:
        def resolve(name: str) -> str | None:
            column = known.get(name)
            if column is None:
                return None
            used.add(column)
            return f"toFloat64({column})"

        return compile_formula(formula, resolve, list(known), path)

    def _order(self, columns: list[Column], cells: list[str], group_count: int) -> str:
        indexes = {column.name: i for i, column in enumerate(columns)}
        keys: dict[int, bool] = {}
        for position, order in enumerate(self.query.order_by):
            if order.column not in indexes:
                invalid(
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
        if len(columns) == group_count:
            invalid("query.measures", "All measures are hidden.")
        seen = {column.name for column in columns[:group_count]}
        if len(seen) < group_count:
            invalid("query.breakdowns", "Two breakdowns are of the same property.")
        for index, name in enumerate(self.names):
            for column in (name, f"{PREVIOUS}{name}") if index in self.compared else (name,):
                if column in seen:
                    invalid(f"query.measures[{index}].alias", f"Two columns are named {column}.")
                seen.add(column)

    # Columns

    def _breakdown(self, breakdown: Breakdown, path: str) -> str:
        return self.events.property(breakdown.property, path).text

    def _measure(self, measure: Measure, path: str) -> str:
        conditions = self.events.filters(measure.filters, f"{path}.filters")
        aggregation = measure.aggregation or Measure.COUNT
        name = measure.property
        if aggregation in _NUMERIC:
            if not name.startswith(OWN):
                self.events.property(name, f"{path}.property")
                invalid(
                    f"{path}.property",
                    f"{Measure.Aggregation.Name(aggregation)} needs a property of your own events.",
                )
            own = self.events.property(name, f"{path}.property")
            condition = " AND ".join([own.is_number, *conditions])
            return _NUMERIC[aggregation].format(value=own.number, condition=condition)
        if aggregation == Measure.UNIQUE:
            of = self.events.property(name or "distinct_id", f"{path}.property")
            return f"uniqExactIf({of.text}, {' AND '.join([of.exists, *conditions])})"
        if name:
            conditions.append(self.events.property(name, f"{path}.property").exists)
        return self._count(conditions)

    def _count(self, conditions: list[str]) -> str:
        condition = " AND ".join(conditions) or "1"
        return f"sumIf(count_, {condition})" if self.from_counts else f"countIf({condition})"


@dataclass(frozen=True, slots=True)
class _Groups:
    """Expressions to group by, a bucket of time first; aggregates by the places of their measures; conditions."""

    buckets: list[str]
    breakdowns: list[str]
    aggregates: dict[int, str]
    conditions: list[str]

    @property
    def keys(self) -> list[str]:
        return [*self.buckets, *self.breakdowns]

    @property
    def where(self) -> str:
        return f"WHERE {' AND '.join(self.conditions)}" if self.conditions else ""

    def rows(self, source: str, *columns: str) -> str:
        """SQL of a row for each group; `columns` of the source are grouped by too, and stand before all others."""
        expressions = [*columns, *(f"{sql} AS k{i}" for i, sql in enumerate(self.keys))]
        expressions += [f"{sql} AS m{index}" for index, sql in self.aggregates.items()]
        names = [*columns, *(f"k{i}" for i in range(len(self.keys)))]
        group_by = f"GROUP BY {', '.join(names)}" if names else ""
        return f"SELECT {', '.join(expressions)} FROM {source} {self.where} {group_by}"


def earlier_range(query: Query, start: int, end: int) -> tuple[int, int]:
    """The range to compare `start` to `end` with, in milliseconds since 1970.

    "The last seconds" are compared with as many seconds; all else goes by the clock and the calendar of the time zone.
    """
    period = query.comparison.period or Comparison.PREVIOUS
    if period == Comparison.PREVIOUS and query.time_range.last_seconds:
        return 2 * start - end, start
    zone = ZoneInfo(query.time_zone or "UTC")
    first, last = _clock(start, zone), _clock(end, zone)
    if period == Comparison.PREVIOUS:
        return _instant(first - (last - first), zone), start
    return _instant(_back(first, period), zone), _instant(_back(last, period), zone)


def _clock(milliseconds: int, zone: ZoneInfo) -> datetime:
    """What clocks show in the zone."""
    seconds, rest = divmod(milliseconds, 1000)
    return datetime.fromtimestamp(seconds, zone).replace(tzinfo=None) + timedelta(milliseconds=rest)


def _instant(clock: datetime, zone: ZoneInfo) -> int:
    return round((clock.replace(tzinfo=zone) - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))


def _back(clock: datetime, period: "Comparison.Period.ValueType") -> datetime:
    if period == Comparison.DAY:
        return clock - timedelta(days=1)
    if period == Comparison.WEEK:
        return clock - timedelta(weeks=1)
    months = clock.year * 12 + clock.month - 1 - (12 if period == Comparison.YEAR else 1)
    year, month = divmod(months, 12)
    return clock.replace(year=year, month=month + 1, day=min(clock.day, monthrange(year, month + 1)[1]))


def _asks_for_counts(query: Query, measures: Iterable[Measure]) -> bool:
    """Whether `Selection.quarters` has all that is asked for."""
    asked = [measure for measure in measures if not measure.formula]
    filters = [*query.filters, *(f for one in query.any_of for f in one.filters)]
    filters += [f for measure in asked for f in measure.filters]
    named = {breakdown.property for breakdown in query.breakdowns} | {f.property for f in filters}
    named |= {measure.property for measure in asked if measure.property}
    by_quarters = query.granularity != Query.MINUTE and query.time_zone not in ODD_ZONES
    return by_quarters and named <= QUARTERED and all(measure.aggregation in _COUNTS for measure in asked)


def _counts(measure: Measure) -> bool:
    return measure.aggregation in _COUNTS | {Measure.UNIQUE}


def _default_alias(measure: Measure) -> str:
    aggregation = measure.aggregation or Measure.COUNT
    name = measure.property or ("distinct_id" if aggregation == Measure.UNIQUE else "")
    return "_".join(part for part in (Measure.Aggregation.Name(aggregation).lower(), name) if part)
