"""Retention: how many of those who start in a period come back in the periods after it."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from datetime import datetime

from meshboard.analytics.v1.insight_service_pb2 import RetentionQuery, RetentionResult
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.actors import actor_of, matching
from services.analytics_svc.compiler import Compiled, cells_of, compiled
from services.analytics_svc.memberships import Memberships
from services.analytics_svc.periods import MAX_PERIODS, Periods, periods_of
from services.analytics_svc.selection import Selection

DEFAULT_PERIODS = 12


def compile_retention(
    query: RetentionQuery, workspace_id: str, now: datetime, cohorts: Memberships
) -> tuple[Compiled, Periods]:
    """A row for each period in which anybody starts: its number, how many start, and how many come back, as pairs of a
    distance in periods and a number.

    Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN, TIME_ZONE_UNKNOWN), naming the field.
    """
    events = Selection(workspace_id, query.source_ids, None, None, cohorts=cohorts)
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
    # A start is twice the number of its period, and one more if the actor comes back in this period.
    chosen = "starts" if every else "if(empty(starts), starts, [arrayMin(starts)])"
    period = "intDiv(start, 2)"
    # The periods after its start in which an actor comes back, by their distances; -1 stands for the start.
    came = (
        f"arrayConcat([toInt32(-1)], if(start % 2 = 1, [toInt32(0)], []), arrayMap(r -> toInt32(r - {period}),"
        f" arrayFilter(r -> r > {period} AND r < {period} + {count}, returns)))"
    )
    if query.or_later:
        came = f"arrayMap(n -> toInt32(n - 1), range(toUInt32(arrayMax({came}) + 2)))"
    actor = actor_of(events, query.actor, "query.actor")
    sql = f"""
        SELECT period, maxIf(actors, distance = -1), groupArrayIf((distance, actors), distance >= 0)
        FROM (
            SELECT {period} AS period, distance, count() AS actors
            FROM (
                SELECT start, {came} AS came
                FROM (
                    SELECT groupArrayIf(toInt32(period * 2 + comes_back), has_started) AS starts,
                        groupArrayIf(period, has_returned) AS returns
                    FROM (
                        SELECT {actor} AS who, {periods.number} AS period,
                            max({starts}) AS has_started, max({returns}) AS has_returned,
                            has_returned AND maxIf(time, {returns}) >= minIf(time, {starts}) AS comes_back
                        FROM {events.rows()} WHERE {where}
                        GROUP BY who, period
                    )
                    GROUP BY who
                )
                ARRAY JOIN {chosen} AS start
                WHERE {period} BETWEEN {first} AND {last}
            )
            ARRAY JOIN came AS distance
            GROUP BY period, distance
        )
        GROUP BY period ORDER BY period
    """
    return compiled(sql, events, ("period", "size", "counts"), MAX_PERIODS), periods


def read_retention(query: RetentionQuery, periods: Periods, found: Result, now: datetime) -> RetentionResult:
    """The answer, of the rows of `compile_retention`; `now` decides which periods have begun and which are over."""
    result = RetentionResult(watermark=found.watermark, cached=found.cached)
    rows = {
        int(number): (int(size), {int(n): int(came) for n, came in map(cells_of, counts)})
        for number, size, counts in map(cells_of, found.rows)
    }
    current, count = periods.number_at(now), query.period_count or DEFAULT_PERIODS
    totals = [[0, 0] for _ in range(count)]
    for number in range(periods.first, periods.last + 1):
        size, counts = rows.get(number, (0, {}))
        made = result.rows.add(size=size)
        made.start_time.FromDatetime(periods.start(number))
        for n in range(count):
            if number + n > current:
                break
            came = counts.get(n, 0)
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
