"""Retention: how many of those who start in a period come back in the periods after it."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from datetime import datetime

from meshboard.analytics.v1.insight_service_pb2 import RetentionQuery, RetentionResult
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.actors import actor_of, matching
from services.analytics_svc.compiler import Compiled, cells_of, columns_of
from services.analytics_svc.memberships import Memberships
from services.analytics_svc.periods import MAX_PERIODS, Periods, periods_of
from services.analytics_svc.selection import Selection

DEFAULT_PERIODS = 12


def compile_retention(
    query: RetentionQuery, workspace_id: str, now: datetime, cohorts: Memberships
) -> tuple[Compiled, Periods]:
    """A row for each period in which anybody starts: its number, how many start, and how many come back in each.

    Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN, TIME_ZONE_UNKNOWN), naming the field.
    """
    events = Selection(workspace_id, query.source_ids, None, None, cohorts)
    periods = periods_of(events, query.time_range, query.period, query.time_zone, now)
    count = query.period_count or DEFAULT_PERIODS
    every = query.entry == RetentionQuery.EVERY
    if every:  # the first start of all may lie long before the range
        events.start = periods.start_milliseconds(periods.first)
    events.end = periods.start_milliseconds(periods.last + count)
    starts = f"({matching(events, query.start, 'query.start')} AND time < {events.instant(periods.end)})"
    returns = matching(events, query.returning, "query.returning")
    if not every:
        returns = f"({returns} AND time >= {events.instant(periods.start_milliseconds(periods.first))})"
    conditions = events.filters(query.filters, "query.filters")
    where = " AND ".join([*conditions, f"({starts} OR {returns})"])
    first, last = events.bind(periods.first, "Int32"), events.bind(periods.last, "Int32")
    chosen = "starts" if every else "arraySlice(arraySort(starts), 1, 1)"
    # Those of the periods after its start in which an actor comes back, as their distances.
    came = (
        "arrayMap(r -> r.1 - start.1, arrayFilter(r ->"
        f" (r.1 > start.1 AND r.1 < start.1 + {count}) OR (r.1 = start.1 AND r.2 >= start.2), returns))"
    )
    counts = "arrayExists(c -> c >= n, came)" if query.or_later else "has(came, n)"
    actor = actor_of(events, query.actor, "query.actor")
    sql = f"""
        SELECT start.1 AS period, count(), sumForEach(arrayMap(n -> toUInt64({counts}), range({count})))
        FROM (
            SELECT start, {came} AS came
            FROM (
                SELECT groupArrayIf((period, started), has_started) AS starts,
                    groupArrayIf((period, returned), has_returned) AS returns
                FROM (
                    SELECT {actor} AS who, {periods.number} AS period,
                        minIf(time, {starts}) AS started, max({starts}) AS has_started,
                        maxIf(time, {returns}) AS returned, max({returns}) AS has_returned
                    FROM {events.rows()} WHERE {where}
                    GROUP BY who, period
                )
                GROUP BY who
            )
            ARRAY JOIN {chosen} AS start
            WHERE start.1 BETWEEN {first} AND {last}
        )
        GROUP BY period ORDER BY period
    """
    return Compiled.of(sql, events, columns_of("period", "size", "counts"), MAX_PERIODS), periods


def read_retention(query: RetentionQuery, periods: Periods, found: Result, now: datetime) -> RetentionResult:
    """The answer, of the rows of `compile_retention`; `now` decides which periods have begun and which are over."""
    result = RetentionResult(watermark=found.watermark, cached=found.cached)
    rows = {int(number): (int(size), cells_of(came)) for number, size, came in map(cells_of, found.rows)}
    current, count = periods.number_at(now), query.period_count or DEFAULT_PERIODS
    totals = [[0, 0] for _ in range(count)]
    for number in range(periods.first, periods.last + 1):
        size, counts = rows.get(number, (0, [0] * count))
        made = result.rows.add(size=size)
        made.start_time.FromDatetime(periods.start(number))
        for n in range(count):
            if number + n > current:
                break
            came = int(counts[n])
            cell = made.cells.add(count=came, complete=number + n < current)
            if size:
                cell.ratio = came / size
            if cell.complete:
                totals[n][0] += size
                totals[n][1] += came
    for size, came in totals:
        average = result.averages.add(size=size, count=came)
        if size:
            average.ratio = came / size
    return result
