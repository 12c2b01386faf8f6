"""Lifecycle: who is new, stays, comes back and stays away, period by period."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from datetime import datetime

from meshboard.analytics.v1.insight_service_pb2 import LifecycleQuery, LifecycleResult
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.actors import actor_of, matching
from services.analytics_svc.compiler import Compiled, cells_of, compiled
from services.analytics_svc.memberships import Memberships
from services.analytics_svc.periods import MAX_PERIODS, Periods, periods_of
from services.analytics_svc.selection import Selection

_KINDS = ("new", "returning", "resurrected", "dormant")


def compile_lifecycle(
    query: LifecycleQuery, workspace_id: str, now: datetime, cohorts: Memberships
) -> tuple[Compiled, Periods]:
    """A row for each period that anybody is counted in: its number, and how many are of each kind.

    Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN, TIME_ZONE_UNKNOWN), naming the field.
    """
    events = Selection(workspace_id, query.source_ids, None, None, cohorts=cohorts)
    periods = periods_of(events, query.time_range, query.period, query.time_zone, now)
    events.end = periods.end
    conditions = [
        *events.filters(query.filters, "query.filters"),
        matching(events, query.events, "query.events"),
    ]
    actor = actor_of(events, query.actor, "query.actor")
    first, last = events.bind(periods.first, "Int32"), events.bind(periods.last, "Int32")
    sql = f"""
        SELECT seen.1 AS period, {", ".join(f"countIf(seen.2 = {i})" for i in range(len(_KINDS)))}
        FROM (
            SELECT arraySort(groupUniqArray(period)) AS active
            FROM (SELECT {actor} AS who, {periods.number} AS period FROM {events.rows()}
                WHERE {" AND ".join(conditions)})
            GROUP BY who
        )
        ARRAY JOIN arrayConcat(
            arrayMap((p, before, i) -> (p, multiIf(i = 1, 0, p - before = 1, 1, 2)),
                active, arrayPushFront(arrayPopBack(active), 0), arrayEnumerate(active)),
            arrayMap(p -> (p + 1, 3), arrayFilter((p, after) -> after - p != 1,
                active, arrayPushBack(arrayPopFront(active), 0)))
        ) AS seen
        WHERE seen.1 BETWEEN {first} AND {last}
        GROUP BY period ORDER BY period
    """
    return compiled(sql, events, ("period", *_KINDS), MAX_PERIODS), periods


def read_lifecycle(periods: Periods, found: Result, now: datetime) -> LifecycleResult:
    """The answer, of the rows of `compile_lifecycle`; `now` decides which periods are over."""
    result = LifecycleResult(watermark=found.watermark, cached=found.cached)
    rows = {int(number): counts for number, *counts in map(cells_of, found.rows)}
    current = periods.number_at(now)
    for number in range(periods.first, periods.last + 1):
        made = result.rows.add(complete=number < current)
        made.start_time.FromDatetime(periods.start(number))
        for kind, count in zip(_KINDS, rows.get(number, ()), strict=False):
            setattr(made, f"{kind}_count", int(count))
    return result
