"""Queries answered in plain Python over a list of events: slow, obvious, and independent of the compiler."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

from meshboard.analytics.v1.query_pb2 import Comparison, Filter, Measure, Query

from services.analytics_svc.channels import REFERRERS, Referrer

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
    zone = ZoneInfo(query.time_zone or "UTC")
    measures = list(query.measures) or [Measure()]
    chosen = _chosen(query, rows, visits, start, end)
    kept = _top(query, chosen, measures, visits)

    def group(chosen: list[Row], paired: dict[int, int] | None = None) -> dict[tuple[Any, ...], list[Row]]:
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in chosen:
            names: tuple[Any, ...] = _names(query, row, visits)
            if kept is not None and names not in kept:
                if not query.others:
                    continue
                names = (None,) * len(names)
            bucket = bucket_start(query.granularity, row.time, zone) if query.granularity else 0
            if paired is not None and query.granularity:
                if bucket not in paired:
                    continue
                bucket = paired[bucket]
            groups[((bucket,) if query.granularity else ()) + names].append(row)
        return groups

    late, early, lonely = group(chosen), {}, set()
    buckets = _buckets(query, start, end, zone) if query.granularity and query.HasField("time_range") else []
    if query.HasField("comparison"):
        first, last = earlier_range(query, start, end, zone)
        before = _buckets(query, first, last, zone) if query.granularity else []
        early = group(_chosen(query, rows, visits, first, last), dict(zip(before, buckets, strict=False)))
        lonely = set(buckets[len(before) :])
    keys = {*late, *early}
    if not query.granularity and not query.breakdowns:
        keys.add(())
    if query.fill_gaps:
        seen = {key[1:] for key in keys} if query.breakdowns else {()}
        keys |= {(bucket, *names) for bucket in buckets for names in seen}

    result = []
    for key in keys:
        known: dict[str, float | None] = {}
        cells: list[Any] = list(key)
        for measure in measures:
            name = measure.alias or "count"
            if measure.formula:
                known |= _formula(measure, known, compared=query.HasField("comparison"))
                continue
            known[name] = _measure(measure, late.get(key, []), visits)
            if query.HasField("comparison"):
                alone = bool(query.granularity) and key[0] in lonely
                known[f"previous_{name}"] = None if alone else _measure(measure, early.get(key, []), visits)
        visible = [measure.alias or "count" for measure in measures if not measure.hidden]
        cells += [known[name] for name in visible]
        cells += [known[f"previous_{name}"] for name in visible if f"previous_{name}" in known]
        result.append(cells)
    _sort(query, result)
    if query.granularity:
        for cells in result:
            cells[0] = datetime.fromtimestamp(cells[0], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return result[: query.limit or 1000]


def _chosen(query: Query, rows: list[Row], visits: dict[int, str], start: int, end: int) -> list[Row]:
    return [
        row
        for row in rows
        if start <= row.time < end
        and all(_matches(f, row, visits) for f in query.filters)
        and all(any(_matches(f, row, visits) for f in one.filters) for one in query.any_of)
    ]


def _names(query: Query, row: Row, visits: dict[int, str]) -> tuple[str, ...]:
    return tuple(_text(b.property, row, visits) or "" for b in query.breakdowns)


def _top(
    query: Query, chosen: list[Row], measures: list[Measure], visits: dict[int, str]
) -> set[tuple[str, ...]] | None:
    if not query.top:
        return None
    groups = defaultdict(list)
    for row in chosen:
        groups[_names(query, row, visits)].append(row)
    first = next((m for m in measures if not m.formula), Measure())

    def place(names: tuple[str, ...]) -> tuple[bool, float, tuple[str, ...]]:
        number = _measure(first, groups[names], visits)
        return number is None, -(number or 0), names

    return set(sorted(groups, key=place)[: query.top])


def _buckets(query: Query, start: int, end: int, zone: ZoneInfo) -> list[int]:
    step = 60_000 if query.granularity == Query.MINUTE else 15 * 60_000
    instants = {*range(start, end, step), end - 1}
    return sorted({bucket_start(query.granularity, t, zone) for t in instants if start <= t < end})


def earlier_range(query: Query, start: int, end: int, zone: ZoneInfo) -> tuple[int, int]:
    """By the clock of the zone."""
    period = query.comparison.period

    def shifted(instant: int) -> int:
        clock = datetime.fromtimestamp(instant / 1000, zone).replace(tzinfo=None)
        if period == Comparison.DAY:
            clock -= timedelta(days=1)
        elif period == Comparison.WEEK:
            clock -= timedelta(days=7)
        elif period in {Comparison.MONTH, Comparison.YEAR}:
            day = clock.day
            clock = clock.replace(day=1)
            for _ in range(1 if period == Comparison.MONTH else 12):
                clock = (clock - timedelta(days=1)).replace(day=1)
            while (clock + timedelta(days=1)).day != 1 and clock.day < day:
                clock += timedelta(days=1)
        else:
            last = datetime.fromtimestamp(end / 1000, zone).replace(tzinfo=None)
            clock -= last - clock
        return int(clock.replace(tzinfo=zone).timestamp() * 1000)

    if period in {Comparison.PERIOD_UNSPECIFIED, Comparison.PREVIOUS}:
        return shifted(start), start
    return shifted(start), shifted(end)


class _Number:
    """Null goes through everything; what is divided by zero is null."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def _with(self, other: "_Number", operation: Callable[[float, float], float | None]) -> "_Number":
        if self.value is None or other.value is None:
            return _Number(None)
        return _Number(operation(self.value, other.value))

    def __add__(self, other: "_Number") -> "_Number":
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: "_Number") -> "_Number":
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: "_Number") -> "_Number":
        return self._with(other, lambda a, b: a * b)

    def __truediv__(self, other: "_Number") -> "_Number":
        return self._with(other, lambda a, b: None if b == 0 else a / b)

    def __neg__(self) -> "_Number":
        return _Number(None if self.value is None else -self.value)

    def __abs__(self) -> "_Number":
        return _Number(None if self.value is None else abs(self.value))

    def __round__(self, digits: "_Number | None" = None) -> "_Number":
        scale = 10.0 ** int((digits.value if digits else 0) or 0)
        return _Number(None if self.value is None else round(self.value * scale) / scale)


_FUNCTIONS = {
    "abs": abs,
    "round": round,
    "least": lambda a, b: a._with(b, min),
    "greatest": lambda a, b: a._with(b, max),
    "ifnull": lambda a, b: b if a.value is None else a,
}


def _as_python(token: re.Match[str]) -> str:
    quoted, name, number = token.groups()
    if number:
        return f"N({number})"
    if name in _FUNCTIONS:
        return str(name)
    name = name or re.sub(r"\\(.)", r"\1", quoted)
    return f"N(v[{name!r}])"


def _formula(measure: Measure, known: dict[str, float | None], *, compared: bool) -> dict[str, float | None]:
    def value(names: dict[str, float | None]) -> float | None:
        python = re.sub(
            r'"((?:[^"\\]|\\.)*)"|([A-Za-z_][\w.]*)(?!\w*\()|(\d[\d.e]*)', _as_python, measure.formula
        )
        number: float | None = eval(python, {**_FUNCTIONS, "N": _Number, "v": names}).value
        return number if number is None or math.isfinite(number) else None

    found = {measure.alias: value(known)}
    earlier = {name: known[f"previous_{name}"] for name in known if f"previous_{name}" in known}
    if compared and "previous_" not in measure.formula:
        with suppress(KeyError):
            found[f"previous_{measure.alias}"] = value(earlier)
    return found


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
    if granularity == Query.QUARTER:
        day = day.replace(day=1, month=(day.month - 1) // 3 * 3 + 1)
    if granularity == Query.YEAR:
        day = day.replace(day=1, month=1)
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
    if name in {"channel", "referrer_name"}:
        return (channel(row) if name == "channel" else referrer_name(row)) or None
    if not name.startswith("properties."):
        return row.built_ins.get(name, "") or None
    value = row.properties.get(name.removeprefix("properties."))
    return None if value is None else write(value)


def _host(row: Row, name: str) -> str:
    return (urlsplit(row.built_ins.get(name, "")).hostname or "").removeprefix("www.")


def _known(text: str) -> Referrer | None:
    """Who is known by a host, by one above it, or by a word."""
    known = {name: referrer for referrer in REFERRERS for name in referrer.names.split()}
    labels = text.lower().split(".")
    for depth in range(len(labels)):
        name = ".".join(labels[depth:])
        country = re.fullmatch(r"([a-z]+)(\.com|\.co)?\.[a-z]{2,3}", name)
        if depth == 0 or "." in name:
            if name in known:
                return known[name]
            if country and f"{country[1]}.*" in known:
                return known[f"{country[1]}.*"]
    return None


def _referring(row: Row) -> str:
    """The host of the referrer, when that is not the page's own."""
    own, other = _host(row, "url"), _host(row, "referrer")
    if own and (own == other or own.endswith(f".{other}") or other.endswith(f".{own}")):
        return ""
    return other


def referrer_name(row: Row) -> str:
    """Who referred."""
    host = _referring(row)
    known = _known(host)
    return known.title if known else host


def channel(row: Row) -> str:
    """How somebody came."""
    if not row.built_ins.get("url") and not row.built_ins.get("referrer"):
        return ""
    address = urlsplit(row.built_ins.get("url", ""))
    tags = {name: values[0] for name, values in parse_qs(address.query).items()}
    medium = tags.get("utm_medium", "").lower()
    campaign = tags.get("utm_campaign", "").lower()
    source = tags.get("utm_source", "")
    known = _known(source or _referring(row))
    kind = known.kind if known else "site"
    searched = any(tags.get(name) for name in ("gclid", "gbraid", "wbraid", "msclkid"))
    banner = medium in {"display", "banner", "expandable", "interstitial", "cpm"} or "dclid" in tags
    paid = "cp" in medium or medium.startswith(("ppc", "paid"))
    shopping = kind == "shopping" or bool({"shop", "shopping"} & set(re.split("[^a-z]", campaign)))
    listed = kind if kind in {"search", "social", "video"} else ""
    if searched or paid:
        if "cross-network" in campaign:
            return "cross_network"
        if shopping or listed:
            return "paid_shopping" if shopping else f"paid_{listed}"
        return "display" if banner else "paid_search" if searched else "paid_other"
    if banner or shopping:
        return "display" if banner else "organic_shopping"
    if medium in {"email", "e-mail", "newsletter"}:
        return "email"
    if medium in {"affiliate", "podcast", "sms", "push"}:
        return {"affiliate": "affiliates", "podcast": "audio"}.get(medium, medium)
    if medium == "social" or listed or medium == "organic":
        return f"organic_{'social' if medium == 'social' else listed or 'search'}"
    if kind in {"email", "ai"}:
        return "ai_assistant" if kind == "ai" else kind
    if medium not in {"", "referral"}:
        return "other"
    if medium or source or _referring(row):
        return "referral"
    return "internal" if _host(row, "referrer") else "direct"


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

    def matches() -> bool:
        return re.search(write(values[0]), text or "", re.DOTALL | re.ASCII) is not None

    tests: dict[int, Callable[[], bool]] = {
        Filter.OPERATOR_UNSPECIFIED: equal,
        Filter.EQUAL: equal,
        Filter.NOT_EQUAL: lambda: not equal(),
        Filter.IN: equal,
        Filter.NOT_IN: lambda: not equal(),
        Filter.CONTAINS: lambda: text is not None and write(values[0]) in text,
        Filter.NOT_CONTAINS: lambda: text is None or write(values[0]) not in text,
        Filter.STARTS_WITH: lambda: text is not None and text.startswith(write(values[0])),
        Filter.ENDS_WITH: lambda: text is not None and text.endswith(write(values[0])),
        Filter.MATCHES: lambda: text is not None and matches(),
        Filter.NOT_MATCHES: lambda: text is None or not matches(),
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
    # Counted from 1 as the engine does: in the last bit it decides which of two groups comes first.
    place = level * (len(numbers) - 1) + 1
    below, above = numbers[math.floor(place) - 1], numbers[math.ceil(place) - 1]
    return below + (above - below) * (place - math.floor(place))


def _sort(query: Query, result: list[list[Any]]) -> None:
    names = ["time"] if query.granularity else []
    names += [b.property for b in query.breakdowns]
    groups = len(names)
    names += [m.alias for m in query.measures if not m.hidden] or ["count"]
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
