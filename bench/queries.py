"""Queries of a dashboard over millions of events: through the service, and the same SQL in chDB alone.

Both have the same rows, and take turns. The events are made by the engines themselves, so the log has none of them.
chDB alone reads the events also where the service answers from counts ("number" and "events by day"): the ratio is then
what the counts are worth.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.analytics.v1.query_service_pb2 import RunQueryRequest, RunQueryResponse

from bench.figures import Figure, percentile, ratios
from bench.load import LIMIT_SECONDS, LoadFailedError
from bench.mesh import Account, Mesh
from services.analytics_svc.compiler import compile_query
from services.analytics_svc.event_store import EventStore, Value, parameter
from services.analytics_svc.tables import statements

METHOD = "/meshboard.analytics.v1.QueryService/RunQuery"
TARGET_RATIO = 1.2
TARGET_CACHED_MS = 10.0
EVENTS_PER_INSERT = 500_000
START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 90
QUERIES: Mapping[str, Mapping[str, Any]] = {
    "number": {"measures": [{"aggregation": "COUNT"}]},
    "events by day": {
        "granularity": "DAY",
        "fillGaps": True,
        "timeZone": "Europe/Berlin",
        "breakdowns": [{"property": "event"}],
        "filters": [{"property": "is_robot", "values": [False]}],
        "measures": [{"aggregation": "COUNT"}],
    },
    "days": {
        "granularity": "DAY",
        "fillGaps": True,
        "timeZone": "Europe/Berlin",
        "measures": [{"aggregation": "COUNT"}, {"aggregation": "UNIQUE"}],
    },
    "top paths": {
        "breakdowns": [{"property": "path"}],
        "measures": [{"aggregation": "COUNT"}, {"aggregation": "AVERAGE", "property": "properties.latency"}],
        "filters": [{"property": "event", "values": ["view"]}],
        "limit": 10,
    },
    "slowest paths": {
        "breakdowns": [{"property": "path"}],
        "measures": [{"aggregation": "P95", "property": "properties.latency"}],
        "filters": [{"property": "browser", "operator": "IN", "values": ["Firefox", "Chrome"]}],
        "limit": 10,
    },
}
_INSERT = """
INSERT INTO events (workspace_id, source_id, event, distinct_id, insert_id, time, receive_time, path, host, browser,
    os, strings, numbers, sequence, position)
SELECT {w:UUID}, {s:UUID}, ['view', 'view', 'view', 'click', 'buy'][hash % 5 + 1], toString(intDiv(hash, 7) % 200000),
    toString(number), fromUnixTimestamp64Milli(toInt64({start:Int64} + intDiv(number * {length:Int64}, {count:Int64}))),
    now64(3), concat('/p/', toString(intDiv(hash, 11) % 300)), 'shop.example',
    ['Firefox', 'Chrome', 'Safari', 'Edge', ''][intDiv(hash, 13) % 5 + 1], ['Linux', 'Windows', 'iOS'][hash % 3 + 1],
    map('plan', ['free', 'pro'][hash % 2 + 1]), map('latency', toFloat64(intDiv(hash, 17) % 10000) / 10), number, 1
FROM (SELECT number, cityHash64(number) AS hash FROM numbers({first:UInt64}, {size:UInt64}))
"""


@dataclass(frozen=True)
class Rows:
    """Which events both have."""

    workspace_id: str
    source_id: str
    count: int

    def inserts(self) -> list[dict[str, Value]]:
        """The parameters of each insert."""
        length = DAYS * 86_400_000
        return [
            {
                "w": self.workspace_id,
                "s": self.source_id,
                "start": int(START.timestamp() * 1000),
                "length": length,
                "count": self.count,
                "first": first,
                "size": min(EVENTS_PER_INSERT, self.count - first),
            }
            for first in range(0, self.count, EVENTS_PER_INSERT)
        ]

    def query(self, parts: Mapping[str, Any], number: int) -> Query:
        """The query over all events, in a range that no other number has, so that nothing is remembered of it."""
        query = ParseDict({"sourceIds": [self.source_id], **parts}, Query())
        query.time_range.start_time.FromMilliseconds(int(START.timestamp() * 1000) + number)
        query.time_range.end_time.FromMilliseconds(int(START.timestamp() * 1000) + DAYS * 86_400_000)
        return query


def measure(
    mesh: Mesh, account: Account, *, events: int, rounds: int, cached: int, say: Callable[[str], None]
) -> list[Figure]:
    """Milliseconds of each query, its ratio to chDB alone, and those of answers that are remembered."""
    source_id, _ = account.create_source()
    rows = Rows(account.workspace_id, source_id, events)
    url = mesh.environment("analytics_svc")["MESHBOARD_EVENT_STORE_URL"]
    asyncio.run(fill(url, rows))
    say(f"{events:,} events in the store")

    def ask(query: Query) -> float:
        headers = account.authorization()
        began = time.perf_counter()
        run(RunQueryRequest(query=query), metadata=headers, timeout=60)
        return (time.perf_counter() - began) * 1000

    with grpc.insecure_channel(mesh.address("analytics")) as channel:
        run = channel.unary_unary(METHOD, RunQueryRequest.SerializeToString, RunQueryResponse.FromString)
        spent = _beside(rows, rounds, ask, say)
        asyncio.run(at_rest(url))
        repeated = [ask(rows.query(QUERIES["days"], 1)) for _ in range(cached)]
    return figures(spent, repeated)


def _beside(
    rows: Rows, rounds: int, ask: Callable[[Query], float], say: Callable[[str], None]
) -> Mapping[tuple[str, str], list[float]]:
    """Milliseconds of each query, through `ask` and in a chDB alone, which ends with it."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    with Alone(rows) as alone:
        say("as many in chDB alone")
        for name, parts in QUERIES.items():
            for number in range(1 + rounds):  # the first of each warms caches up
                query = rows.query(parts, number)
                times = {"": ask(query), "alone": alone.ask(query)}
                if number:
                    for who, milliseconds in times.items():
                        spent[name, who].append(milliseconds)
            say(
                f"{name}: {percentile(spent[name, ''], 0.5):.0f} ms, alone {percentile(spent[name, 'alone'], 0.5):.0f}"
            )
    return spent


def figures(spent: Mapping[tuple[str, str], Sequence[float]], cached: Sequence[float]) -> list[Figure]:
    """The figures of milliseconds by query, and by who answered: "" is the service, "alone" chDB."""
    result = []
    for name in QUERIES:
        ours, alone = spent[name, ""], spent[name, "alone"]
        result += [
            Figure(name=f"queries/{name}", rounds=tuple(ours), unit="ms"),
            Figure(name=f"queries/{name}, chDB alone", rounds=tuple(alone), unit="ms"),
            Figure(
                name=f"queries/{name} to chDB alone",
                rounds=ratios(ours, alone),
                unit="",
                at_most=TARGET_RATIO,
            ),
        ]
    result.append(
        Figure(
            name="queries/remembered p99",
            rounds=(percentile(cached, 0.99),),
            unit="ms",
            at_most=TARGET_CACHED_MS,
            note=f"of {len(cached):,}",
        )
    )
    return result


async def fill(url: str, rows: Rows) -> None:
    """Puts the events into a store."""
    store = EventStore(url)
    for params in rows.inserts():
        await store.execute(_INSERT, params, timeout=LIMIT_SECONDS)
    await store.close()


async def at_rest(url: str) -> None:
    """Waits until a store has nothing to merge, for two minutes at most: what needs no store is measured then."""
    store = EventStore(url)
    deadline = time.monotonic() + 120
    quiet = 0
    while quiet < 5 and time.monotonic() < deadline:
        merging = (await store.query("SELECT count() FROM system.merges")).rows[0][0]
        quiet = 0 if int(merging) else quiet + 1
        await asyncio.sleep(1)
    await store.close()


class Alone:
    """A chDB directory with the same rows, in a process of its own. Raises LoadFailedError."""

    def __init__(self, rows: Rows) -> None:
        context = multiprocessing.get_context("spawn")
        self._workspace_id = rows.workspace_id
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, rows), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Alone:
        self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def ask(self, query: Query) -> float:
        """Milliseconds of the query's SQL, over events."""
        compiled = compile_query(query, self._workspace_id, datetime.now(UTC), from_counts=False)
        self._pipe.send((compiled.sql, {name: parameter(value) for name, value in compiled.params.items()}))
        return float(self._receive())

    def _receive(self) -> Any:
        try:
            if self._pipe.poll(LIMIT_SECONDS):
                return self._pipe.recv()
        except EOFError:
            pass
        raise LoadFailedError("chDB did not answer.")


def _serve(pipe: Connection, rows: Rows) -> None:
    from chdb.state.sqlitelike import Connection as Engine  # noqa: PLC0415 - takes seconds, in one process only

    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(str(Path(folder) / "chdb"))
        for statement in statements(cluster=""):
            engine.query(statement, "Null")
        for params in rows.inserts():
            engine.query(_INSERT, "Null", params=params)
        pipe.send("ready")
        try:
            while True:
                sql, params = pipe.recv()
                began = time.perf_counter()
                engine.query(sql, "JSONCompact", params=params).bytes()
                pipe.send((time.perf_counter() - began) * 1000)
        except EOFError:
            engine.close()
