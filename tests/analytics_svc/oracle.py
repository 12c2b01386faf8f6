"""Queries answered in plain Python over a list of events: slow, obvious, and independent of the compiler."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from meshboard.analytics.v1.query_pb2 import Filter, Measure, Query

Cell = str | float | None


@dataclass(frozen=True)
class Row:
    """One event: `time` in milliseconds since 1970; built-ins that are text; properties."""

    source_id: str
    time: int
    built_ins: dict[str, str]
    properties: dict[str, str | float | bool]


def answer(query: Query, rows: list[Row]) -> list[list[Cell]]:
    """The rows of the result, for a query with a range of both ends or none, and without `last_seconds`."""
    rows = [row for row in rows if row.source_id in query.source_ids]
    visits = _visits(rows)
    start, end = _range(query)
    chosen = [row for row in rows if start <= row.time < end]
    chosen = [row for row in chosen if all(_matches(f, row, visits) for f in query.filters)]
    zone = ZoneInfo(query.time_zone or "UTC")
    measures = query.measures or [Measure()]

    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    if not query.granularity and not query.breakdowns:
        groups[()] = []
    for row in chosen:
        names = tuple(_text(b.property, row, visits) or "" for b in query.breakdowns)
        bucket = (bucket_start(query.granularity, row.time, zone),) if query.granularity else ()
        groups[bucket + names].append(row)
    result = [([*key, *(_measure(m, rows, visits) for m in measures)]) for key, rows in groups.items()]
    if query.fill_gaps:
        seen = {tuple(key[1:]) for key in groups} if query.breakdowns else {()}
        instants = {*range(start, end, 15 * 60_000 if query.granularity != Query.MINUTE else 60_000), end - 1}
        buckets = {bucket_start(query.granularity, t, zone) for t in instants if start <= t < end}
        empty = [_measure(m, [], visits) for m in measures]
        result += [
            [bucket, *names, *empty] for bucket in buckets for names in seen if (bucket, *names) not in groups
        ]
    _sort(query, result)
    if query.granularity:
        for cells in result:
            cells[0] = datetime.fromtimestamp(cells[0], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return result[: query.limit or 1000]


def bucket_start(granularity: int, time: int, zone: ZoneInfo) -> int:
    """The first second of the bucket that `time` (milliseconds) is in."""
    seconds = time // 1000
    local = datetime.fromtimestamp(seconds, zone)
    if granularity == Query.MINUTE:
        return seconds - local.second
    if granularity == Query.HOUR:
        return seconds - local.second - 60 * local.minute
    day = local.date()
    if granularity == Query.WEEK:
        day -= timedelta(days=day.weekday())
    if granularity == Query.MONTH:
        day = day.replace(day=1)
    # A day begins at its first instant: where clocks jump over midnight that is one o'clock.
    low = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) - 16 * 3600
    high = low + 32 * 3600
    while low < high:
        middle = (low + high) // 2
        if datetime.fromtimestamp(middle, zone).date() >= day:
            high = middle
        else:
            low = middle + 1
    return low


def _range(query: Query) -> tuple[int, int]:
    if not query.HasField("time_range"):
        return 0, 2**60
    return query.time_range.start_time.ToMilliseconds(), query.time_range.end_time.ToMilliseconds()


def _visits(rows: list[Row]) -> dict[int, str]:
    """The visit of each row, by the row's identity."""
    visits: dict[int, str] = {}
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for row in sorted(rows, key=lambda r: r.time):
        who = (row.source_id, row.built_ins["distinct_id"])
        begin, previous = last.get(who, (row.time, -(2**60)))
        if row.time - previous >= 30 * 60_000:
            begin = row.time
        last[who] = (begin, row.time)
        visits[id(row)] = f"{who}{begin}"
    return visits


def _text(name: str, row: Row, visits: dict[int, str]) -> str | None:
    if name == "visit_id":
        return visits[id(row)]
    if not name.startswith("properties."):
        return row.built_ins.get(name, "") or None
    value = row.properties.get(name.removeprefix("properties."))
    return None if value is None else write(value)


def write(value: str | float | bool) -> str:
    """A property as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else repr(value)


def _number(name: str, row: Row) -> float | None:
    value = row.properties.get(name.removeprefix("properties.")) if name.startswith("properties.") else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _matches(condition: Filter, row: Row, visits: dict[int, str]) -> bool:
    text = _text(condition.property, row, visits)
    number = _number(condition.property, row)
    values: list[Any] = [getattr(v, v.WhichOneof("kind") or "") for v in condition.values]
    numbers = [v for v in values if isinstance(v, float)]

    def equal() -> bool:
        return text is not None and (text in map(write, values) or (number is not None and number in numbers))

    tests: dict[int, Callable[[], bool]] = {
        Filter.OPERATOR_UNSPECIFIED: equal,
        Filter.EQUAL: equal,
        Filter.NOT_EQUAL: lambda: not equal(),
        Filter.IN: equal,
        Filter.NOT_IN: lambda: not equal(),
        Filter.CONTAINS: lambda: text is not None and write(values[0]) in text,
        Filter.NOT_CONTAINS: lambda: text is None or write(values[0]) not in text,
        Filter.STARTS_WITH: lambda: text is not None and text.startswith(write(values[0])),
        Filter.GREATER: lambda: number is not None and number > values[0],
        Filter.GREATER_OR_EQUAL: lambda: number is not None and number >= values[0],
        Filter.LESS: lambda: number is not None and number < values[0],
        Filter.LESS_OR_EQUAL: lambda: number is not None and number <= values[0],
        Filter.EXISTS: lambda: text is not None,
        Filter.NOT_EXISTS: lambda: text is None,
    }
    return tests[condition.operator]()


def _measure(measure: Measure, rows: Iterable[Row], visits: dict[int, str]) -> float | None:
    rows = [row for row in rows if all(_matches(f, row, visits) for f in measure.filters)]
    name = measure.property
    if measure.aggregation in {Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT}:
        return sum(1 for row in rows if not name or _text(name, row, visits) is not None)
    if measure.aggregation == Measure.UNIQUE:
        return len({_text(name or "distinct_id", row, visits) for row in rows} - {None})
    numbers = sorted(n for row in rows if (n := _number(name, row)) is not None)
    if not numbers:
        return None
    if measure.aggregation == Measure.SUM:
        return math.fsum(numbers)
    if measure.aggregation == Measure.AVERAGE:
        return math.fsum(numbers) / len(numbers)
    if measure.aggregation == Measure.MINIMUM:
        return numbers[0]
    if measure.aggregation == Measure.MAXIMUM:
        return numbers[-1]
    level = int(Measure.Aggregation.Name(measure.aggregation)[1:]) / 100
    place = level * (len(numbers) - 1)
    below, above = numbers[math.floor(place)], numbers[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def _sort(query: Query, result: list[list[Any]]) -> None:
    names = ["time"] if query.granularity else []
    names += [b.property for b in query.breakdowns]
    groups = len(names)
    names += [m.alias for m in query.measures] or ["count"]
    keys = [(names.index(order.column), order.descending) for order in query.order_by]
    if query.granularity:
        keys.append((0, False))
    if not query.order_by:
        keys.append((groups, True))
    keys += [(i, False) for i in range(groups)]
    for index, descending in reversed(keys):
        present = [cells for cells in result if cells[index] is not None]
        present.sort(key=lambda cells: cells[index], reverse=descending)
        result[:] = present + [cells for cells in result if cells[index] is None]
