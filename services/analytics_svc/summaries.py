"""What the store knows of the event names and properties of a source: how many, since when, and what values.

Counted when it is asked. An answer holds until new events of the source arrive; where it was long in coming, for ten
times as long as it took, so that a catalogue that many look at takes a tenth of the store's time at most.
"""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from meshboard.analytics.v1.catalogue_pb2 import CatalogueProperty

from services.analytics_svc.queries import Queries, hashable
from services.analytics_svc.selection import OWN, Selection

MAX_NAMES = 10_000
MAX_VALUES = 50
SAMPLES = 5
VALUE_LENGTH = 200
RECENT = timedelta(days=30)
# So many times as long as an answer took, it is good enough, whatever has arrived meanwhile.
_STALE_FACTOR = 10
_CACHED_ROWS = 100_000
# How many events of the last day are looked at for samples.
_SAMPLED_EVENTS = 200_000

_SEEN = """count() AS total, countIf(time >= {since}),
    toUnixTimestamp64Milli(min(time)), toUnixTimestamp64Milli(max(time))"""
# RFC 3339, its date alone, and ISO 8601 without a zone; what a year 0000 or a month 13 is, nobody asks here.
_TIME = r"^\\d{4}-\\d{2}-\\d{2}([T ]\\d{2}:\\d{2}(:\\d{2}([.]\\d+)?)?(Z|[+-]\\d{2}:?\\d{2})?)?$"

Rows = list[list[Any]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a name; times are in milliseconds since 1970."""

    name: str
    count: int
    recent_count: int
    first_seen: int
    last_seen: int
    number_count: int = 0


@dataclass(frozen=True, slots=True)
class Values:
    """What the values of a property are, and some of them."""

    type: "CatalogueProperty.Type.ValueType" = CatalogueProperty.TYPE_UNSPECIFIED
    samples: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """A property by itself: `values` and `events` are the most frequent ones with their counts."""

    seen: Seen
    values: Rows
    events: Rows


@dataclass(slots=True)
class _Remembered:
    rows: Rows
    watermarks: tuple[int, ...]
    until: float


@dataclass(slots=True)
class Summaries:
    """Asks the store within the limits of queries, each question once for all who ask it at the same time."""

    queries: Queries
    _cached: "OrderedDict[tuple[object, ...], _Remembered]" = field(default_factory=OrderedDict)
    _rows: int = 0

    async def events(self, workspace_id: str, source_id: str) -> list[Seen]:
        """The event names of a source, the most frequent first; one more than MAX_NAMES says that there are more.

        All methods raise RESOURCE_EXHAUSTED (QUERY_TOO_EXPENSIVE or QUERIES_QUEUED) and UNAVAILABLE.
        """
        of = Selection(workspace_id, [source_id], None, None)
        sql = f"""
            SELECT event, sum(count_) AS total, sumIf(count_, time >= {self._since(of)}),
                toUnixTimestamp64Milli(min(first_)), toUnixTimestamp64Milli(max(last_))
            FROM {of.quarters()}
            GROUP BY event ORDER BY total DESC, event LIMIT {MAX_NAMES + 1}
        """
        return [Seen(*row) for row in await self._ask(of, sql)]

    async def properties(self, workspace_id: str, source_id: str, event: str) -> list[Seen]:
        """The own properties of a source's events, or of those named `event`; otherwise as `events`."""
        of = Selection(workspace_id, [source_id], None, None)
        scope = _scope(of, event)
        # Of the maps only the names are read.
        sql = f"""
            SELECT concat('{OWN}', name), {self._seen(of)}, countIf(is_number)
            FROM (
                SELECT arrayJoin(strings.keys) AS name, time, 0 AS is_number FROM events WHERE {scope}
                UNION ALL
                SELECT arrayJoin(numbers.keys), time, 1 FROM events WHERE {scope}
            )
            GROUP BY name ORDER BY total DESC, name LIMIT {MAX_NAMES + 1}
        """
        return [Seen(*row) for row in await self._ask(of, sql)]

    async def values(
        self, workspace_id: str, source_id: str, event: str, properties: Sequence[Seen]
    ) -> dict[str, Values]:
        """Types and samples of own properties, by name, from the days that they were seen on last."""
        if not properties:
            return {}
        of = Selection(workspace_id, [source_id], None, None)
        names = of.bind([p.name.removeprefix(OWN) for p in properties], "Array(String)")
        lasts = sorted({p.last_seen for p in properties})
        days = sorted({last // 86_400_000 for last in lasts})
        scope = f"{_scope(of, event)} AND toInt64(toDate(time)) IN {of.bind(days, 'Array(Int64)')}"
        # The very last events are looked at in any case, so that no property is without a value.
        very_last = f"toUnixTimestamp64Milli(time) IN {of.bind(lasts, 'Array(Int64)')}"
        columns = "SELECT strings, numbers FROM events WHERE"
        sql = f"""
            WITH left(value, {VALUE_LENGTH}) AS sample
            SELECT name, topKWeighted({SAMPLES})(sample, 1), countIf(value IN ('true', 'false')),
                countIf(match(value, '{_TIME}')), countIf(startsWith(value, '[') AND isValidJSON(value)),
                countIf(startsWith(value, '{{') AND isValidJSON(value)), countIf(NOT is_number)
            FROM (
                SELECT pair.1 AS name, pair.2 AS value, pair.3 AS is_number
                FROM ({columns} {scope} AND {very_last} UNION ALL ({columns} {scope} LIMIT {_SAMPLED_EVENTS}))
                ARRAY JOIN arrayFilter(pair -> has({names}, pair.1), arrayConcat(
                    arrayMap((k, v) -> (k::String, v, 0), mapKeys(strings), mapValues(strings)),
                    arrayMap((k, v) -> (k::String, toString(v), 1), mapKeys(numbers), mapValues(numbers))
                )) AS pair
            )
            GROUP BY name
        """
        found = {OWN + str(row[0]): row[1:] for row in await self._ask(of, sql)}
        return {p.name: _values(p, found.get(p.name)) for p in properties}

    async def profile(self, workspace_id: str, source_id: str, name: str) -> Profile | None:
        """A property by itself, one of the source's own or a built-in; None when it was never seen.

        Raises INVALID_ARGUMENT (PROPERTY_UNKNOWN) too.
        """

        def question(columns: str, rest: str = "") -> Awaitable[Rows]:
            of = Selection(workspace_id, [source_id], None, None)
            one = of.property(name, "name")
            columns = columns.format(seen=self._seen(of), text=one.text, is_number=one.is_number)
            return self._ask(of, f"SELECT {columns} FROM {of.rows()} WHERE {one.exists} {rest}")

        top = f"GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {MAX_VALUES}"
        counts, values, events = await asyncio.gather(
            question("{seen}, countIf({is_number})"),
            question(f"left({{text}}, {VALUE_LENGTH}), count()", top),
            question("event, count()", top),
        )
        if not counts[0][0]:
            return None
        return Profile(Seen(name, *counts[0]), values, events)

    def _seen(self, of: Selection) -> str:
        return _SEEN.format(since=self._since(of))

    def _since(self, of: Selection) -> str:
        # By the hour, so that answers are shared, and no quarter of an hour is cut.
        since = (self.queries.now() - RECENT).replace(minute=0, second=0, microsecond=0)
        return of.instant(int(since.timestamp() * 1000))

    async def _ask(self, of: Selection, sql: str) -> Rows:
        watermarks = await self.queries.watermarks(of.workspace_id, of.source_ids)
        key = (sql, hashable(of.params))
        loop = asyncio.get_running_loop()
        found = self._cached.get(key)
        if found is not None and (found.watermarks == watermarks or loop.time() < found.until):
            self._cached.move_to_end(key)
            return found.rows

        async def compute() -> Rows:
            answer = await self.queries.rows(sql, of.params, of.workspace_id)
            until = loop.time() + _STALE_FACTOR * answer.seconds
            self._keep(key, _Remembered(answer.rows, watermarks, until))
            return answer.rows

        return await self.queries.shared(key, compute)

    def _keep(self, key: tuple[object, ...], remembered: _Remembered) -> None:
        self._forget(key)
        self._cached[key] = remembered
        self._rows += len(remembered.rows) + 1
        while self._rows > _CACHED_ROWS:
            self._forget(next(iter(self._cached)))

    def _forget(self, key: tuple[object, ...]) -> None:
        if (old := self._cached.pop(key, None)) is not None:
            self._rows -= len(old.rows) + 1


def _scope(of: Selection, event: str) -> str:
    scope = (
        f"workspace_id = {of.bind(of.workspace_id, 'UUID')}"
        f" AND source_id IN {of.bind(list(of.source_ids), 'Array(UUID)')}"
    )
    return f"{scope} AND event = {of.bind(event, 'String')}" if event else scope


def _values(seen: Seen, row: list[Any] | None) -> Values:
    """Reads a row of counts: samples, booleans, times, lists, objects, and all that are no numbers."""
    samples: Sequence[str] = row[0] if row else ()
    if seen.number_count == seen.count:
        return Values(CatalogueProperty.NUMBER, samples)
    if seen.number_count:
        return Values(CatalogueProperty.MIXED, samples)
    if row and row[-1]:
        kinds = (
            CatalogueProperty.BOOLEAN,
            CatalogueProperty.TIME,
            CatalogueProperty.LIST,
            CatalogueProperty.OBJECT,
        )
        for kind, count in zip(kinds, row[1:5], strict=True):
            if count == row[-1]:
                return Values(kind, samples)
    return Values(CatalogueProperty.STRING, samples)
