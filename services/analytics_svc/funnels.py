"""Funnels: what becomes of those who do the first step."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from datetime import datetime
from typing import Any

from meshboard.analytics.v1.insight_service_pb2 import FunnelGroup, FunnelQuery, FunnelResult
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.actors import ORDER, actor_of, matching, time_of
from services.analytics_svc.compiler import Compiled, cells_of, compiled
from services.analytics_svc.memberships import Memberships
from services.analytics_svc.selection import Selection, invalid, resolve_range

DEFAULT_WINDOW_SECONDS = 14 * 86_400
DEFAULT_LIMIT = 25

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
# Where the buckets of conversion times begin.
BUCKETS = (
    0,
    10,
    30,
    _MINUTE,
    5 * _MINUTE,
    15 * _MINUTE,
    _HOUR,
    6 * _HOUR,
    _DAY,
    3 * _DAY,
    7 * _DAY,
    14 * _DAY,
    30 * _DAY,
    90 * _DAY,
)


def compile_funnel(query: FunnelQuery, workspace_id: str, now: datetime, cohorts: Memberships) -> Compiled:
    """One row for all actors and one for each group: whether it is all, the values, and the numbers of each step.

    Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN), naming the field.

    For each actor the events that matter are in arrays, in their order; an attempt is the index of its first event.
    `c<k>` has for each event the attempt that reaches step k with it, or 0: of those possible the one that started
    last, since it has the most time left. Each step is one pass over the arrays, so that one actor with a hundred
    thousand events costs as much as that many actors with one.
    """
    start, end = resolve_range(query.time_range, now)
    window = (query.window_seconds or DEFAULT_WINDOW_SECONDS) * 1000
    latest = None if end is None else end + window
    events = Selection(workspace_id, query.source_ids, start, latest, cohorts=cohorts)
    return _Funnel(query, events, end, window).compile()


class _Funnel:
    def __init__(self, query: FunnelQuery, events: Selection, end: int | None, window: int) -> None:
        self.query = query
        self.events = events
        self.end = end
        self.window = events.bind(window, "Int64")
        self.steps = range(1, len(query.steps) + 1)
        self.strict = query.order == FunnelQuery.STRICT
        self.excluded = [
            (exclusion.after_step or 1, exclusion.before_step or len(query.steps))
            for exclusion in query.exclusions
        ]

    def compile(self) -> Compiled:
        query = self.query
        for index, (after, before) in enumerate(self.excluded):
            if not after < before <= len(query.steps):
                invalid(f"query.exclusions[{index}]", "The funnel has no such steps.")
        attempts = self._indexes(self._attempts(self._actors()))
        columns = ["is_total", *(f"value{i}" for i in range(len(query.breakdowns)))]
        columns += [f"step{k}" for k in self.steps] + ["conversion_times"]
        limit = (query.limit or DEFAULT_LIMIT) + 1
        sql = f"{self._groups(attempts)} LIMIT {limit + 1}"
        return compiled(sql, self.events, columns, limit)

    def _actors(self) -> str:
        """For each actor who does the first step: arrays of the times and of the masks of its events, and the values of
        the breakdowns. Bit k - 1 of a mask says that the event matches step k; those after it are for exclusions."""
        query, events = self.query, self.events
        matches = [matching(events, step, f"query.steps[{i}]") for i, step in enumerate(query.steps)]
        if self.end is not None:
            matches[0] = f"({matches[0]} AND time < {events.instant(self.end)})"
        matches += [
            matching(events, exclusion.events, f"query.exclusions[{i}].events")
            for i, exclusion in enumerate(query.exclusions)
        ]
        bits = " + ".join(f"toUInt32({match}) * {1 << i}" for i, match in enumerate(matches))
        names = [step.event for step in query.steps] + [each.events.event for each in query.exclusions]
        conditions = events.filters(query.filters, "query.filters")
        if not self.strict and all(names):
            conditions.append(f"event IN {events.bind(sorted(set(names)), 'Array(String)')}")
        values = [
            f"if(bitTest(mask, 0), {events.property(b.property, f'query.breakdowns[{i}].property').text}, '')"
            for i, b in enumerate(query.breakdowns)
        ]
        actor = actor_of(events, query.actor, "query.actor")
        only = "" if self.strict else "WHERE mask != 0"
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        arrays = [
            "groupArray(mask) AS masks",
            *(f"groupArray({value}) AS v{i}" for i, value in enumerate(values)),
        ]
        names = ["masks", *(f"v{i}" for i in range(len(values)))]
        in_order = ", ".join(f"arraySort((e, o) -> o, {name}, orders) AS {name}" for name in names)
        return f"""
            SELECT *, {_floors(self.window)} AS floors, arrayEnumerate(times) AS places
            FROM (
                SELECT arrayMap(o -> {time_of("o")}, arraySort(orders)) AS times, {in_order}
                FROM (
                    SELECT groupArray({ORDER}) AS orders, {", ".join(arrays)}
                    FROM (SELECT *, {actor} AS who, {bits} AS mask FROM {events.rows()} {where})
                    {only}
                    GROUP BY who HAVING max(bitTest(mask, 0))
                )
            )
        """

    def _attempts(self, actors: str) -> str:
        """The same with `c<k>` for each step, and `f<k>`, the index of the event that first reaches it."""
        sql = f"""
            SELECT *, arrayMap((m, i) -> if(bitTest(m, 0), i, toUInt32(0)), masks, places) AS c1 FROM ({actors})
        """
        for k in self.steps[1:]:
            before = f"arrayPushFront(arrayPopBack({self._standing(k - 1)}), toUInt32(0))"
            sql = f"""
                SELECT *, arrayMap((a, m, floor) -> if(a >= floor AND bitTest(m, {k - 1}), a, toUInt32(0)),
                    {before}, masks, floors) AS c{k}
                FROM ({sql})
            """
        firsts = ", ".join(f"arrayFirstIndex(c -> c > 0, c{k}) AS f{k}" for k in self.steps)
        return f"SELECT *, {firsts} FROM ({sql})"

    def _standing(self, k: int) -> str:
        """The attempt that stands at step k after each event; for STRICT, that has reached it with this event."""
        if self.strict:
            return f"c{k}"
        if ends := self._ends(k):
            return f"arrayFill((c, m) -> c > 0 OR {ends}, c{k}, masks)"
        return f"arrayFill(c -> c > 0, c{k})"

    def _ends(self, k: int) -> str:
        """Whether an event, by its mask m, ends attempts that stand at step k; "" when none does."""
        bits = sum(
            1 << (len(self.steps) + i)
            for i, (after, before) in enumerate(self.excluded)
            if after <= k < before
        )
        return f"bitAnd(m, {bits}) != 0" if bits else ""

    def _indexes(self, attempts: str) -> str:
        """For each actor how many steps it gets through, and `i<k>`, the index of the event that is step k."""
        depth = " + ".join(f"(f{k} > 0)" for k in self.steps)
        first = ", ".join(f"depth = {k}, c{k}[f{k}]" for k in self.steps)
        sql = f"SELECT *, {depth} AS depth, multiIf({first}, 0) AS a FROM ({attempts})"
        for k in reversed(self.steps):
            if k == len(self.steps):
                earlier = "0"
            elif self.strict:
                earlier = f"i{k + 1} - 1"
            elif ends := self._ends(k):
                ended = f"arrayLastIndex((m, i) -> {ends} AND i < i{k + 1}, masks, places)"
                earlier = f"arrayFirstIndex((c, i) -> c = a AND i >= {ended}, c{k}, places)"
            else:
                earlier = f"arrayFirstIndex(c -> c = a, c{k})"
            sql = f"SELECT *, multiIf(depth = {k}, f{k}, depth > {k}, toUInt32({earlier}), 0) AS i{k} FROM ({sql})"
        return sql

    def _groups(self, attempts: str) -> str:
        values = [f"v{i}" for i in range(len(self.query.breakdowns))]
        numbers = []
        for k in self.steps:
            done, since, whole = f"depth >= {k}", f"(t{k} - t{max(k - 1, 1)}) / 1000", f"(t{k} - t1) / 1000"
            numbers.append(
                f"[toNullable(toFloat64(countIf({done}))), avgOrNullIf({since}, {done}),"
                f" quantileExactInclusiveOrNullIf(0.5)({since}, {done}),"
                f" quantileExactInclusiveOrNullIf(0.5)({whole}, {done})]"
            )
        last = len(self.steps)
        bounds = f"[{', '.join(str(seconds * 1000) for seconds in BUCKETS)}]"
        numbers.append(
            f"sumForEachIf(arrayMap(i -> toUInt64(i = arrayLastIndex(b -> b <= t{last} - t1, {bounds})),"
            f" range(1, {len(BUCKETS) + 1})), depth = {last})"
        )
        times = [f"times[i{k}] AS t{k}" for k in self.steps] + [
            f"v{i}[i1] AS g{i}" for i in range(len(values))
        ]
        keys = [f"g{i}" for i in range(len(values))]
        grouped = f"GROUP BY GROUPING SETS (({', '.join(keys)}), ())" if keys else ""
        is_total = "grouping(g0)" if keys else "1"
        return f"""
            SELECT {", ".join([f"{is_total} AS is_total", *keys, *numbers])}
            FROM (SELECT depth, {", ".join(times)} FROM ({attempts}))
            {grouped}
            ORDER BY {", ".join(["is_total DESC", "count() DESC", *keys])}
        """


def _floors(window: str) -> str:
    """For each of `times` the index of the first that is not more than the window before it.

    By a merge: odd numbers are times, even ones times less the window; what counts is how many odd ones are before.
    """
    merged = (
        f"arraySort(arrayConcat(arrayMap(t -> t * 2 + 1, times), arrayMap(t -> (t - {window}) * 2, times)))"
    )
    counts = f"arrayCumSum(n -> bitAnd(n, 1), {merged})"
    return f"arrayFilter((c, n) -> bitAnd(n, 1) = 0, arrayMap(c -> toUInt32(c + 1), {counts}), {merged})"


def read_funnel(query: FunnelQuery, found: Result) -> FunnelResult:
    """The answer, of the rows of `compile_funnel`."""
    result = FunnelResult(watermark=found.watermark, cached=found.cached, truncated=found.truncated)
    _read_group(query, [1], result.total)  # there is no row at all when grouping finds no actor
    for cells in map(cells_of, found.rows):
        if cells[0]:
            result.total.Clear()
        _read_group(query, cells, result.total if cells[0] else result.groups.add())
    return result


def _read_group(query: FunnelQuery, cells: list[Any], group: FunnelGroup) -> None:
    width = len(query.breakdowns) + 1
    nobody = [*[[0, None, None, None]] * len(query.steps), []]
    *steps, histogram = map(cells_of, cells[width:] or nobody)
    if not cells[0]:
        group.values.extend(cells[1:width])
    count = first = before = int(steps[0][0])
    for k, (step, numbers) in enumerate(zip(query.steps, steps, strict=True)):
        count = int(numbers[0])
        made = group.steps.add(title=step.title or step.event, count=count)
        if first:
            made.conversion = count / first
        if before:
            made.step_conversion = count / before
        if k and count:
            made.average_seconds, made.median_seconds, made.median_seconds_from_start = numbers[1:]
        before = count
    for start, end, number in zip(
        BUCKETS, (*BUCKETS[1:], None), histogram or [0] * len(BUCKETS), strict=True
    ):
        group.conversion_times.add(start_seconds=start, end_seconds=end, count=int(number))
