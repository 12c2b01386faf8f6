"""A `Query` becomes SQL: values are always bound parameters, identifiers come from tables.

`compile_query` is a pure function. Its SQL runs on chDB and on a ClickHouse server.
"""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any

from meshboard.analytics.v1.query_pb2 import Breakdown, Column, Measure, Query

from services.analytics_svc.event_store import Value
from services.analytics_svc.selection import BUCKETS, OWN, Selection, invalid, resolve_range

DEFAULT_LIMIT = 1000
MAX_FILLED_BUCKETS = 50_000
# The engine plans a statement of this length in seconds, and cannot be stopped meanwhile.
MAX_SQL_LENGTH = 64 << 10
# Values travel in the address of a request.
MAX_VALUE_BYTES = 256 << 10

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


@dataclass(frozen=True, slots=True)
class Compiled:
    """What to ask the store, and how to read the answer: its rows have a cell for each of `columns`.

    One row more than `limit` is asked for, to know whether rows were cut off.
    """

    sql: str
    params: dict[str, Value]
    columns: list[Column]
    limit: int


def compiled(sql: str, events: Selection, names: Iterable[str], limit: int) -> Compiled:
    """A question whose answer is made into a message of its own, with the names of the columns.

    Raises INVALID_ARGUMENT (QUERY_INVALID) when it is longer than a statement can be.
    """
    if len(sql) > MAX_SQL_LENGTH:
        invalid("query", "The query has too many conditions.")
    if (
        sum(len(json.dumps(value, ensure_ascii=False).encode()) for value in events.params.values())
        > MAX_VALUE_BYTES
    ):
        invalid("query", f"All values and names together have more than {MAX_VALUE_BYTES} bytes.")
    return Compiled(sql, events.params, [Column(name=name) for name in names], limit)


def cells_of(row: Any) -> list[Any]:
    """The cells of a row, or of an array in one."""
    return list(row)


def compile_query(
    query: Query,
    workspace_id: str,
    now: datetime,
    cohorts: Mapping[str, Callable[[Selection], str]] = MappingProxyType({}),
) -> Compiled:
    """Compiles a query that meets the rules of its contract, over sources of the workspace.

    `cohorts` are those that its filters name. Raises INVALID_ARGUMENT with PROPERTY_UNKNOWN, QUERY_INVALID or
    TIME_ZONE_UNKNOWN and the path of the field.
    """
    start, end = resolve_range(query.time_range, now)
    return _Compilation(
        query, Selection(workspace_id, query.source_ids, start, end, cohorts=cohorts)
    ).compile()


@dataclass(slots=True)
class _Compilation:
    query: Query
    events: Selection

    def compile(self) -> Compiled:
        query, events = self.query, self.events
        events.bind_zone(query.time_zone)
        bucket = BUCKETS.get(query.granularity)
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

        conditions = events.filters(query.filters, "query.filters")
        rows = self._aggregation(groups, aggregates, conditions)
        if query.fill_gaps:
            rows = self._filled(rows, groups, query.measures or [Measure()])
        cells = [f"c{i}" for i in range(len(columns))]
        if bucket:
            cells[0] = "formatDateTime(c0, '%Y-%m-%dT%H:%i:%SZ', 'UTC')"
        limit = query.limit or DEFAULT_LIMIT
        sql = f"SELECT {', '.join(cells)} FROM ({rows})"
        if order:
            sql += f" ORDER BY {order}"
        return Compiled(f"{sql} LIMIT {limit + 1}", events.params, columns, limit)

    # Rows

    def _aggregation(self, groups: list[str], aggregates: list[str], conditions: list[str]) -> str:
        expressions = [f"{expression} AS c{i}" for i, expression in enumerate([*groups, *aggregates])]
        sql = f"SELECT {', '.join(expressions)} FROM {self.events.rows()}"
        if conditions:
            sql += f" WHERE {' AND '.join(conditions)}"
        if groups:
            sql += f" GROUP BY {', '.join(f'c{i}' for i in range(len(groups)))}"
        return sql

    def _filled(self, rows: str, groups: list[str], measures: Sequence[Measure]) -> str:
        """The rows, and one for each bucket that a group lacks. Without breakdowns there is one group."""
        granularity, start, end = self.query.granularity, self.events.start, self.events.end
        if granularity not in BUCKETS:
            invalid("query.fill_gaps", "Gaps can be filled in a query with a granularity.")
        if start is None or end is None:
            invalid("query.fill_gaps", "Gaps can be filled in a range with a start and an end.")
        if (end - start) / 1000 / _SHORTEST_SECONDS[granularity] > MAX_FILLED_BUCKETS:
            invalid("query.fill_gaps", f"The range has more than {MAX_FILLED_BUCKETS} buckets.")
        step = _STEP_SECONDS[granularity] * 1000
        # Every bucket is hit by a step or by the last instant.
        buckets = f"""(
            SELECT groupUniqArray({BUCKETS[granularity]}) FROM (
                SELECT {self.events.instant(start)}
                    + toIntervalMillisecond(least(number * {step}, {end - start - 1})) AS time
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

    def _order(self, columns: list[Column], group_count: int) -> str:
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
        seen: set[str] = set()
        for index, column in enumerate(columns):
            if column.name in seen:
                measure = index - group_count
                where = f"query.measures[{measure}].alias" if measure >= 0 else "query.breakdowns"
                invalid(where, f"Two columns are named {column.name}.")
            seen.add(column.name)

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
        return f"countIf({' AND '.join(conditions) or '1'})"


def _counts(measure: Measure) -> bool:
    return measure.aggregation in {Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT, Measure.UNIQUE}


def _default_alias(measure: Measure) -> str:
    aggregation = measure.aggregation or Measure.COUNT
    name = measure.property or ("distinct_id" if aggregation == Measure.UNIQUE else "")
    return "_".join(part for part in (Measure.Aggregation.Name(aggregation).lower(), name) if part)
