"""Funnels, retention, paths, lifecycles and cohorts in plain Python over a list of events: slow, obvious, and
independent of the compilers.

Rows are in the order of their receipt.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from meshboard.analytics.v1.cohort_pb2 import VISIT_ID, CohortCondition, CohortDefinition
from meshboard.analytics.v1.insight_service_pb2 import (
    DAY,
    MONTH,
    WEEK,
    FunnelQuery,
    LifecycleQuery,
    PathsQuery,
    Period,
    RetentionQuery,
)
from meshboard.analytics.v1.query_pb2 import Filter, TimeRange

from services.analytics_svc.funnels import BUCKETS
from tests.analytics_svc import oracle
from tests.analytics_svc.oracle import Row

FOREVER = 2**60


@dataclass
class World:
    """All events of a workspace, and its cohorts by id."""

    rows: Sequence[Row]
    now: datetime
    cohorts: Mapping[str, CohortDefinition] = field(default_factory=dict)

    def of(self, source_ids: Iterable[str]) -> "Scope":
        """What the sources say."""
        return Scope(self, [row for row in self.rows if row.source_id in set(source_ids)])


class Scope:
    """The events of some sources."""

    def __init__(self, world: World, rows: list[Row]) -> None:
        self.world = world
        self.rows = rows
        self.visits = oracle._visits(rows)
        self._members: dict[str, set[str]] = {}

    def meets(self, row: Row, filters: Iterable[Filter]) -> bool:
        """Whether an event meets all the conditions."""
        return all(self._meets(row, condition) for condition in filters)

    def _meets(self, row: Row, condition: Filter) -> bool:
        if not condition.cohort_id:
            return oracle._matches(condition, row, self.visits)
        if condition.cohort_id not in self._members:
            definition = self.world.cohorts[condition.cohort_id]
            self._members[condition.cohort_id] = members(definition, self)
        is_member = row.built_ins["distinct_id"] in self._members[condition.cohort_id]
        return is_member is (condition.operator != Filter.NOT_IN)

    def selects(self, row: Row, selector: Any) -> bool:
        """Whether an event is one of those that a selector means."""
        return selector.event in {"", row.built_ins["event"]} and self.meets(row, selector.filters)

    def actors(self, rows: Iterable[Row], actor: int) -> dict[str, list[Row]]:
        """The events by who did them, each list in order."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            found[self.visits[id(row)] if actor == VISIT_ID else row.built_ins["distinct_id"]].append(row)
        return {who: sorted(rows, key=lambda row: row.time) for who, rows in found.items()}


def bounds(time_range: TimeRange, now: datetime) -> tuple[int, int]:
    """A range of two ends or none, or of seconds until now, where now is a full minute."""
    if time_range.last_seconds:
        end = int(now.timestamp() * 1000)
        return end - time_range.last_seconds * 1000, end
    start = time_range.start_time.ToMilliseconds() if time_range.HasField("start_time") else -FOREVER
    return start, time_range.end_time.ToMilliseconds() if time_range.HasField("end_time") else FOREVER


# Cohorts


def members(definition: CohortDefinition, scope: Scope) -> set[str]:
    """Who is in a cohort."""
    together: Callable[[Iterable[bool]], bool] = any if definition.match == CohortDefinition.ANY else all
    return {
        who
        for who, rows in scope.actors(scope.rows, 0).items()
        if together([_holds(condition, rows, scope) for condition in definition.conditions])
    }


def _holds(condition: CohortCondition, rows: list[Row], scope: Scope) -> bool:
    if condition.HasField("behaviour"):
        behaviour = condition.behaviour
        start, end = bounds(behaviour.time_range, scope.world.now)
        times = sum(start <= row.time < end and scope.selects(row, behaviour) for row in rows)
        holds = (behaviour.min_count or 1) <= times <= (behaviour.max_count or FOREVER)
    else:
        asked = condition.trait.filter
        has = Filter(property=asked.property, operator=Filter.EXISTS)
        saying = [row for row in rows if scope.meets(row, [has])]
        # Without any event that has the property, one that has nothing stands for it.
        nothing = Row(rows[0].source_id, 0, {"distinct_id": rows[0].built_ins["distinct_id"]}, {})
        holds = oracle._matches(asked, saying[-1] if saying else nothing, {id(nothing): ""})
    return holds is not condition.negate


# Funnels


def funnel(query: FunnelQuery, world: World) -> dict[tuple[str, ...] | None, list[Any]]:
    """By the values of the breakdowns, and for None over all: (count, mean, median, median from the start) of each
    step, and the histogram of conversion times."""
    scope = world.of(query.source_ids)
    best = {}
    for who, rows in scope.actors(
        (row for row in scope.rows if scope.meets(row, query.filters)), query.actor
    ).items():
        attempts = list(_attempts(query, rows, scope))
        if attempts:
            # The furthest; the first that is so; the one that started last; the one with the earliest steps between,
            # seen from its end.
            chosen = min(attempts, key=lambda a: (-len(a), a[-1], -a[0], a[::-1]))
            best[who] = [rows[i] for i in chosen]
    groups: dict[tuple[str, ...] | None, list[list[Row]]] = {None: list(best.values())}
    if query.breakdowns:
        for attempt in best.values():
            key = tuple(oracle._text(b.property, attempt[0], scope.visits) or "" for b in query.breakdowns)
            groups.setdefault(key, []).append(attempt)
    return {key: _funnel_numbers(query, attempts) for key, attempts in groups.items()}


def _attempts(query: FunnelQuery, rows: list[Row], scope: Scope) -> Iterator[tuple[int, ...]]:
    """All attempts of an actor, as indexes of its events."""
    start, end = bounds(query.time_range, scope.world.now)
    window = (query.window_seconds or 14 * 86_400) * 1000

    def allowed(attempt: tuple[int, ...], following: int) -> bool:
        step = len(attempt)  # the last one reached
        if rows[following].time - rows[attempt[0]].time > window:
            return False
        between = range(attempt[-1] + 1, following)
        if query.order == FunnelQuery.STRICT:
            return not between
        for exclusion in query.exclusions:
            after, before = exclusion.after_step or 1, exclusion.before_step or len(query.steps)
            if after <= step < before and any(scope.selects(rows[i], exclusion.events) for i in between):
                return False
        return True

    def extend(attempt: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        yield attempt
        if len(attempt) < len(query.steps):
            step = query.steps[len(attempt)]
            for i in range(attempt[-1] + 1, len(rows)):
                if scope.selects(rows[i], step) and allowed(attempt, i):
                    yield from extend((*attempt, i))

    for i, row in enumerate(rows):
        if start <= row.time < end and scope.selects(row, query.steps[0]):
            yield from extend((i,))


def _funnel_numbers(query: FunnelQuery, attempts: list[list[Row]]) -> list[Any]:
    numbers: list[Any] = []
    for k in range(len(query.steps)):
        reached = [a for a in attempts if len(a) > k]
        steps = [(a[k].time - a[max(k - 1, 0)].time) / 1000 for a in reached]
        whole = [(a[k].time - a[0].time) / 1000 for a in reached]
        if k and reached:
            numbers.append(
                (len(reached), statistics.fmean(steps), statistics.median(steps), statistics.median(whole))
            )
        else:
            numbers.append((len(reached), None, None, None))
    taken = [(a[-1].time - a[0].time) / 1000 for a in attempts if len(a) == len(query.steps)]
    ends = (*BUCKETS[1:], float("inf"))
    numbers.append([sum(start <= t < end for t in taken) for start, end in zip(BUCKETS, ends, strict=True)])
    return numbers


# Periods


def period_of(time: int, kind: Period.ValueType, zone: ZoneInfo) -> date:
    """The first day of the period that a time in milliseconds is in."""
    day = datetime.fromtimestamp(time // 1000, zone).date()
    if kind == WEEK:
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if kind == MONTH else day


def later(day: date, kind: Period.ValueType, count: int) -> date:
    """The first day of the period so many periods later."""
    for _ in range(count):
        day = day + timedelta(days={DAY: 1, WEEK: 7, MONTH: 31}[kind])
        if kind == MONTH:
            day = day.replace(day=1)
    return day


def first_instant(day: date, zone: ZoneInfo) -> datetime:
    """When a day begins."""
    noon = int(datetime(day.year, day.month, day.day, 12, tzinfo=UTC).timestamp()) * 1000
    return next(
        datetime.fromtimestamp(seconds, UTC)
        for seconds in range(noon // 1000 - 36 * 3600, noon // 1000 + 36 * 3600, 900)
        if datetime.fromtimestamp(seconds, zone).date() == day
    )


def _touched(query: Any, now: datetime) -> tuple[list[date], int]:
    zone, kind = ZoneInfo(query.time_zone or "UTC"), query.period or DAY
    start, end = bounds(query.time_range, now)
    end = min(end, int(now.timestamp() * 1000) + 1000) if end == FOREVER else end
    days = [period_of(start, kind, zone)]
    while days[-1] < period_of(max(end - 1, start), kind, zone):
        days.append(later(days[-1], kind, 1))
    return days, end


# Retention


def retention(query: RetentionQuery, world: World) -> list[tuple[datetime, int, list[tuple[int, bool]]]]:
    """For each period its start, the number of those who start, and for each that has begun how many come back, and
    whether it is over."""
    scope = world.of(query.source_ids)
    zone, kind = ZoneInfo(query.time_zone or "UTC"), query.period or DAY
    days, end = _touched(query, world.now)
    current = period_of(int(world.now.timestamp() * 1000), kind, zone)
    count = query.period_count or 12
    started: dict[date, list[set[int]]] = {day: [] for day in days}
    chosen = [row for row in scope.rows if scope.meets(row, query.filters)]
    for rows in scope.actors(chosen, query.actor).values():
        starts = [row.time for row in rows if row.time < end and scope.selects(row, query.start)]
        firsts: dict[date, int] = {}
        for time in starts if query.entry == RetentionQuery.EVERY else starts[:1]:
            firsts.setdefault(period_of(time, kind, zone), time)
        for day, time in firsts.items():
            if day in started:
                returns = {
                    period_of(row.time, kind, zone)
                    for row in rows
                    if row.time >= time and scope.selects(row, query.returning)
                }
                came = {n for n in range(count) if later(day, kind, n) in returns}
                if query.or_later:
                    came = {n for n in range(count) if any(m >= n for m in came)}
                started[day].append(came)
    result = []
    for day in days:
        begun = [n for n in range(count) if later(day, kind, n) <= current]
        cells = [(sum(n in came for came in started[day]), later(day, kind, n) < current) for n in begun]
        result.append((first_instant(day, zone), len(started[day]), cells))
    return result


# Lifecycle


def lifecycle(query: LifecycleQuery, world: World) -> list[tuple[datetime, int, int, int, int]]:
    """For each period its start, and the numbers of those who are new, stay, come back and stay away."""
    scope = world.of(query.source_ids)
    zone, kind = ZoneInfo(query.time_zone or "UTC"), query.period or DAY
    days, end = _touched(query, world.now)
    chosen = [
        row
        for row in scope.rows
        if row.time < end and scope.meets(row, query.filters) and scope.selects(row, query.events)
    ]
    active = [
        {period_of(row.time, kind, zone) for row in rows}
        for rows in scope.actors(chosen, query.actor).values()
    ]
    result = []
    for day in days:
        counts = Counter[str]()
        for periods in active:
            earlier = {other for other in periods if other < day}
            was_there = any(later(other, kind, 1) == day for other in earlier)
            if day in periods:
                counts["new" if not earlier else "returning" if was_there else "resurrected"] += 1
            elif was_there:
                counts["dormant"] += 1
        new, returning, resurrected, dormant = (
            counts[name] for name in ("new", "returning", "resurrected", "dormant")
        )
        result.append((first_instant(day, zone), new, returning, resurrected, dormant))
    return result


# Paths


@dataclass
class Ways:
    """What was found: nodes by (place, node) and links by (place, node, next), with their numbers."""

    paths: int
    actors: int
    nodes: dict[tuple[int, str], tuple[int, int]]
    links: dict[tuple[int, str, str], tuple[int, int, float]]


def paths(query: PathsQuery, world: World) -> Ways:
    """All nodes and links."""
    scope = world.of(query.source_ids)
    start, end = bounds(query.time_range, world.now)
    name, depth = query.property or "event", query.depth or 5
    gap = (query.gap_seconds or 1800) * 1000
    chosen = [
        row
        for row in scope.rows
        if start <= row.time < end
        and scope.meets(row, query.filters)
        and oracle._text(name, row, scope.visits) is not None
    ]
    found: list[tuple[str, list[tuple[int, str, int, bool]]]] = []
    for who, rows in scope.actors(chosen, query.actor).items():
        runs: list[list[Row]] = []
        for row in rows:
            if runs and row.time - runs[-1][-1].time < gap:
                runs[-1].append(row)
            else:
                runs.append([row])
        for run in runs:
            path: list[tuple[str, int]] = []
            for row in run:
                node = oracle._text(name, row, scope.visits)
                assert node is not None
                if not path or path[-1][0] != node:
                    path.append((node, row.time))
            nodes = [node for node, _ in path]
            if query.start_node:
                if query.start_node not in nodes:
                    continue
                path = path[nodes.index(query.start_node) :]
                nodes = [node for node, _ in path]
            if query.end_node:
                begin = 1 if query.start_node else 0
                if query.end_node not in nodes[begin:]:
                    continue
                path = path[: nodes.index(query.end_node, begin) + 1]
                shown = path[-depth:]
                places = range(depth - len(shown) + 1, depth + 1)
            else:
                shown = path[:depth]
                places = range(1, len(shown) + 1)
            whole = bool(query.end_node) or len(shown) == len(path)
            last = len(shown) - 1
            found.append(
                (
                    who,
                    [
                        (place, node, time, whole and i == last)
                        for i, (place, (node, time)) in enumerate(zip(places, shown, strict=True))
                    ],
                )
            )
    node_counts, exits = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
    ways: dict[tuple[int, str, str], list[tuple[str, float]]] = defaultdict(list)
    for who, steps in found:
        for place, node, _, is_exit in steps:
            node_counts[place, node] += 1
            exits[place, node] += is_exit
        for (place, node, time, _), (_, following, then, _) in pairwise(steps):
            ways[place, node, following].append((who, (then - time) / 1000))
    return Ways(
        paths=len(found),
        actors=len({who for who, _ in found}),
        nodes={key: (count, exits[key]) for key, count in node_counts.items()},
        links={
            key: (len(each), len({who for who, _ in each}), statistics.fmean(s for _, s in each))
            for key, each in ways.items()
        },
    )
