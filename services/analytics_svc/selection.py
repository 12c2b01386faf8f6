"""Which events a question is about: sources, a range of time, visits, and conditions on properties.

Values are always bound parameters; identifiers come from the tables below. The SQL runs on chDB and on a ClickHouse
server.
"""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import NoReturn
from uuid import UUID
from zoneinfo import available_timezones

import re2
from google.protobuf import struct_pb2
from meshboard.analytics.v1.query_pb2 import Filter, Query, TimeRange

from services.analytics_svc.channels import COLUMNS, PARAMETERS, with_channels
from services.analytics_svc.event_store import Value
from services.chassis import errors

VISIT_GAP_SECONDS = 30 * 60
# What `quarters` can be asked about.
QUARTERED = frozenset({"event", "is_robot"})
_QUARTER_MS = 900_000
# Of a shorter range the events themselves are counted: the engine needs longer to plan a look at the counts.
_SHORT_MS = 6 * 3_600_000
# Clocks there did not always stand at, or change at, a quarter of an hour since 1970.
ODD_ZONES = frozenset(
    {
        "Africa/Monrovia",
        "America/Goose_Bay",
        "America/Moncton",
        "America/St_Johns",
        "Antarctica/Casey",
        "Asia/Gaza",
        "Asia/Hebron",
        "Canada/Newfoundland",
        "Pacific/Guam",
        "Pacific/Kiritimati",
        "Pacific/Saipan",
    }
)

# Built-in properties and their expressions; `visit_id`, `person_id` and those of channels.py are columns of subqueries
# only.
BUILT_INS = {
    name: name
    for name in (
        "event",
        "distinct_id",
        "person_id",
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
        "region",
        "city",
        "utm_source",
        "utm_medium",
        "utm_campaign",
        "utm_term",
        "utm_content",
        *COLUMNS,
    )
} | {"is_robot": "if(is_robot, 'true', 'false')"}

OWN = "properties."

# The start of the bucket that `time` is in. An hour is cut by hand: toStartOfHour is half an hour off in zones whose
# summer time moves the clock by half an hour (Australia/Lord_Howe).
BUCKETS = {
    Query.MINUTE: "toStartOfMinute(time, {zone:String})",
    Query.HOUR: "toDateTime(toUnixTimestamp(time)"
    " - modulo(toUnixTimestamp(time) + timezoneOffset(toTimeZone(time, {zone:String})), 3600), {zone:String})",
    Query.DAY: "toStartOfDay(time, {zone:String})",
    Query.WEEK: "toDateTime(toStartOfWeek(time, 1, {zone:String}), {zone:String})",
    Query.MONTH: "toDateTime(toStartOfMonth(time, {zone:String}), {zone:String})",
    Query.QUARTER: "toDateTime(toStartOfQuarter(time, {zone:String}), {zone:String})",
    Query.YEAR: "toDateTime(toStartOfYear(time, {zone:String}), {zone:String})",
}
_COMPARISONS = {
    Filter.GREATER: ">",
    Filter.GREATER_OR_EQUAL: ">=",
    Filter.LESS: "<",
    Filter.LESS_OR_EQUAL: "<=",
}
_TEXT_TESTS = {
    Filter.CONTAINS: "position({text}, {value}) > 0",
    Filter.STARTS_WITH: "startsWith({text}, {value})",
    Filter.ENDS_WITH: "endsWith({text}, {value})",
    Filter.MATCHES: "match({text}, {value})",
}
_NEGATIONS = {
    Filter.NOT_EQUAL: Filter.EQUAL,
    Filter.NOT_CONTAINS: Filter.CONTAINS,
    Filter.NOT_EXISTS: Filter.EXISTS,
    Filter.NOT_IN: Filter.IN,
    Filter.NOT_MATCHES: Filter.MATCHES,
}
# Values travel in the address of a request, which the store bounds at 1 MiB: each byte may take three there.
MAX_VALUE_BYTES = 256 << 10
MAX_PATTERN_LENGTH = 1000


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
        invalid("query.time_range", "The range ends before it starts.")
    return start, end_


@dataclass(slots=True)
class Selection:
    """Events of some sources in a range, `start` to `end` in milliseconds since 1970, half-open; None is no bound.

    What is said about properties decides what `rows` has to find out: ask for them first.
    """

    workspace_id: str
    source_ids: Sequence[str]
    start: int | None
    end: int | None
    # The cohorts that conditions may name, by id: each says in SQL whether an event of this selection is of a member.
    cohorts: Mapping[str, "Callable[[Selection], str]"] = field(default_factory=dict)
    params: dict[str, Value] = field(default_factory=dict)
    uses_visits: bool = False
    uses_persons: bool = False
    channel_columns: set[str] = field(default_factory=set)
    # Whether a cohort that was named looks beyond the sources.
    cohorts_look_beyond: bool = False

    def rows(self) -> str:
        """A subquery that gives the columns of the events, and those that were asked for."""
        rows = self._rows()
        if self.channel_columns:
            self.params.update(PARAMETERS)
            rows = with_channels(rows, sorted(self.channel_columns))
        return self._with_persons(rows) if self.uses_persons else rows

    def quarters(self) -> str:
        """A subquery that gives counts of the events: `count_` of them with an `event` and `is_robot` have their time
        in the quarter of an hour that begins at `time`, the first of them at `first_`, the last at `last_`.

        The engine has counted them, see tables.py. What the range has of other quarters is counted event by event.
        """
        start, end, scope = self.start, self.end, self._scope()
        first = start if start is None else -(-start // _QUARTER_MS) * _QUARTER_MS
        last = end if end is None else end // _QUARTER_MS * _QUARTER_MS
        if start is not None and end is not None and end - start < _SHORT_MS:
            return self._edges([(start, end)])
        within = [f"quarter >= {self.instant(first)}"] if first is not None else []
        within += [f"quarter < {self.instant(last)}"] if last is not None else []
        counted = f"""
            SELECT quarter AS time, event, is_robot, count_, first_, last_
            FROM (
                SELECT toStartOfFifteenMinutes(time) AS quarter, event, is_robot,
                    count() AS count_, min(time) AS first_, max(time) AS last_
                FROM events WHERE {" AND ".join(scope + within)}
                GROUP BY quarter, event, is_robot
            )
        """
        edges = [(a, b) for a, b in ((start, first), (last, end)) if a != b]
        return f"({counted} UNION ALL {self._edges(edges)})" if edges else f"({counted})"

    @property
    def looks_beyond_sources(self) -> bool:
        """Whether the answer depends on events of other sources of the workspace: on the links of persons."""
        return self.cohorts_look_beyond or (self.uses_persons and len(self.source_ids) > 1)

    def _with_persons(self, rows: str) -> str:
        scope_id = self.workspace_id if len(self.source_ids) > 1 else self.source_ids[0]
        return f"""(
            SELECT * EXCEPT (linked_id, linked_person),
                if(linked_person = '', distinct_id, linked_person) AS person_id
            FROM {rows} AS event
            LEFT ANY JOIN (
                SELECT distinct_id AS linked_id, person_id AS linked_person
                FROM persons FINAL
                WHERE workspace_id = {self.bind(self.workspace_id, "UUID")} AND scope_id = {self.bind(scope_id, "UUID")}
            ) AS link ON event.distinct_id = link.linked_id
        )"""

    def _scope(self) -> list[str]:
        return [
            f"workspace_id = {self.bind(self.workspace_id, 'UUID')}",
            f"source_id IN {self.bind(sorted(self.source_ids), 'Array(UUID)')}",
        ]

    def _edges(self, ranges: Sequence[tuple[int | None, int | None]]) -> str:
        in_ranges = [" AND ".join(self._after(start) + self._before(end)) for start, end in ranges]
        return f"""(
            SELECT time, event, is_robot, toUInt64(1) AS count_, time AS first_, time AS last_
            FROM events WHERE {" AND ".join(self._scope())} AND ({" OR ".join(in_ranges)})
        )"""

    def _after(self, start: int | None) -> list[str]:
        # The key has the day before the time: the engine does not see by itself which days a time leaves.
        if start is None:
            return []
        instant = self.instant(start)
        return [f"time >= {instant}", f"indexHint(toDate(time) >= toDate({instant}))"]

    def _before(self, end: int | None) -> list[str]:
        if end is None:
            return []
        instant = self.instant(end)
        return [f"time < {instant}", f"indexHint(toDate(time) <= toDate({instant}))"]

    def _rows(self) -> str:
        scope, after, before = self._scope(), self._after(self.start), self._before(self.end)
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
            {f"WHERE time >= {self.instant(self.start)}" if self.start is not None else ""}
        )"""

    def instant(self, milliseconds: int) -> str:
        """SQL of an instant; events are between 1970 and 2100."""
        clamped = min(max(milliseconds, 0), 4_102_444_800_000)
        return f"fromUnixTimestamp64Milli({self.bind(clamped, 'Int64')}, 'UTC')"

    def bind_zone(self, time_zone: str) -> None:
        """Binds `zone`, which the expressions of BUCKETS read. Raises INVALID_ARGUMENT (TIME_ZONE_UNKNOWN)."""
        zone = time_zone or "UTC"
        if zone not in _time_zones():
            raise errors.invalid_argument(
                "TIME_ZONE_UNKNOWN",
                f"{zone} is no time zone.",
                field="query.time_zone",
                nearest=", ".join(difflib.get_close_matches(zone, _time_zones())),
            )
        self.params["zone"] = zone

    def filters(self, filters: Iterable[Filter], path: str) -> list[str]:
        """SQL conditions, each 0 or 1 and never NULL. Raises INVALID_ARGUMENT naming the field."""
        return [self._filter(f, f"{path}[{index}]") for index, f in enumerate(filters)]

    def latest(self, condition: Filter, path: str) -> str:
        """An aggregate, 0 or 1: whether the last event that has the property of the condition meets it."""
        operator = condition.operator or Filter.EQUAL
        positive = _NEGATIONS.get(operator, operator)
        exists = self.property(condition.property, f"{path}.property").exists
        sql = self._positive(positive, condition, path)
        found = f"argMaxIf({sql}, (time, sequence, position), {exists})"
        return f"{found} = {'1' if positive == operator else '0'}"

    def _filter(self, condition: Filter, path: str) -> str:
        if condition.cohort_id:
            return self._membership(condition, path)
        operator = condition.operator or Filter.EQUAL
        positive = _NEGATIONS.get(operator, operator)
        sql = self._positive(positive, condition, path)
        return sql if positive == operator else f"NOT {sql}"

    def _membership(self, condition: Filter, path: str) -> str:
        operator = condition.operator or Filter.IN
        if operator not in {Filter.IN, Filter.NOT_IN}:
            invalid(f"{path}.operator", "Whether somebody is in a cohort is asked with IN or NOT_IN.")
        if condition.values:
            invalid(f"{path}.values", "A condition on a cohort takes no value.")
        cohort_id = str(UUID(condition.cohort_id))
        if cohort_id not in self.cohorts:
            invalid(f"{path}.cohort_id", "A cohort cannot be asked for here.")
        sql = self.cohorts[cohort_id](self)
        return sql if operator == Filter.IN else f"NOT {sql}"

    def _positive(self, operator: "Filter.Operator.ValueType", condition: Filter, path: str) -> str:
        """An expression that is 0 or 1, never NULL, so that it can be negated."""
        of = self.property(condition.property, f"{path}.property")
        values = condition.values
        if operator == Filter.EXISTS:
            if values:
                invalid(f"{path}.values", "This operator takes no value.")
            return f"({of.exists})"
        if not values or (operator != Filter.IN and len(values) != 1):
            invalid(
                f"{path}.values",
                "Exactly one value is needed." if operator != Filter.IN else "A value is needed.",
            )
        for index, value in enumerate(values):
            kind = value.WhichOneof("kind")
            if kind not in {"string_value", "number_value", "bool_value"} or not math.isfinite(
                value.number_value
            ):
                invalid(f"{path}.values[{index}]", "A value is a text, a number or a boolean.")
        numbers = [value.number_value for value in values if value.HasField("number_value")]
        if operator in _COMPARISONS:
            if not numbers:
                invalid(f"{path}.values[0]", "This operator compares with a number.")
            if of.is_number == "0":
                invalid(
                    f"{path}.property", f"{condition.property} is a text: it is not compared with a number."
                )
            bound = self.bind(numbers[0], "Float64")
            return f"({of.is_number} AND {of.number} {_COMPARISONS[operator]} {bound})"
        texts = [_value_text(value) for value in values]
        if operator in _TEXT_TESTS:
            if operator == Filter.MATCHES:
                _check_pattern(texts[0], f"{path}.values[0]")
            test = _TEXT_TESTS[operator].format(text=of.text, value=self.bind(texts[0], "String"))
            return f"({of.exists} AND {test})"
        same = f"({of.exists} AND {of.text} IN {self.bind(texts, 'Array(String)')})"
        if numbers and of.is_number != "0":
            bound = self.bind(numbers, "Array(Float64)")
            return f"({same} OR ({of.is_number} AND has({bound}, {of.number})))"
        return same

    def property(self, name: str, path: str) -> "Property":
        """SQL about a property. Raises INVALID_ARGUMENT (PROPERTY_UNKNOWN) naming the field."""
        if name.startswith(OWN) and len(name) > len(OWN):
            key = self.bind(name.removeprefix(OWN), "String")
            is_number = f"mapContains(numbers, {key})"
            return Property(
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
        self.uses_persons = self.uses_persons or name == "person_id"
        if name in COLUMNS:
            self.channel_columns.add(name)
        expression = BUILT_INS[name]
        return Property(text=expression, exists=f"{expression} != ''", number="NULL", is_number="0")

    def check_size(self) -> None:
        """Raises INVALID_ARGUMENT (QUERY_INVALID) when the values are more than a statement can have."""
        if sum(len(json.dumps(value, ensure_ascii=False).encode()) for value in self.params.values()) > (
            MAX_VALUE_BYTES
        ):
            invalid("query", f"All values and names together have more than {MAX_VALUE_BYTES} bytes.")

    def bind(self, value: Value, kind: str) -> str:
        """Binds a value of ClickHouse's type `kind`, and gives the placeholder."""
        name = f"p{len(self.params)}"
        self.params[name] = value
        return f"{{{name}:{kind}}}"


@dataclass(frozen=True, slots=True)
class Property:
    """SQL about one property: its text, whether it is there, its number, and whether that is one."""

    text: str
    exists: str
    number: str
    is_number: str


def _check_pattern(pattern: str, path: str) -> None:
    """Raises INVALID_ARGUMENT (PATTERN_INVALID) for what the store's RE2 cannot read either."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        text = f"A regular expression has at most {MAX_PATTERN_LENGTH} characters."
        raise errors.invalid_argument("PATTERN_INVALID", text, field=path)
    try:
        re2.compile(pattern, _pattern_options())
    except re2.error as error:
        text = f"The regular expression cannot be read: {error.args[0].decode(errors='replace')}."
        raise errors.invalid_argument("PATTERN_INVALID", text, field=path) from None


@cache
def _pattern_options() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    return options


@cache
def _time_zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _value_text(value: struct_pb2.Value) -> str:
    """A filter's value as the store writes it: 404 and not 404.0."""
    if value.HasField("bool_value"):
        return "true" if value.bool_value else "false"
    if value.HasField("string_value"):
        return value.string_value
    number = value.number_value
    return str(int(number)) if number.is_integer() else repr(number)


def invalid(path: str, text: str, **metadata: str) -> NoReturn:
    """Raises INVALID_ARGUMENT (QUERY_INVALID) naming the field."""
    raise errors.invalid_argument("QUERY_INVALID", text, field=path, **metadata)
