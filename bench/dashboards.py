"""The data of a dashboard of twenty widgets over millions of events: cold, and as it is when nothing has changed.

Cold, it is held to the slowest of its queries in the same store when all are sent there at once: what is left is what
it costs to ask for them as a dashboard. The slowest by itself, and all of them one by one, are told beside it. Each
time has a range of its own, so that nothing is remembered of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from meshboard.dashboard.v1.dashboard_service_pb2 import GetDashboardDataRequest, GetDashboardDataResponse

from bench import queries
from bench.figures import Figure, percentile, ratios
from bench.load import LIMIT_SECONDS, LoadFailedError
from bench.mesh import Account, Mesh
from bench.processes import Meter
from services.analytics_svc.compiler import compile_query
from services.analytics_svc.event_store import EventStore

METHOD = "/meshboard.dashboard.v1.DashboardService/GetDashboardData"
TARGET_CACHED_MS = 15.0
TARGET_RATIO = 1.3
_BROWSERS = ("Firefox", "Chrome", "Safari", "Edge")
_SYSTEMS = ("Linux", "Windows", "iOS")


def _of(name: str, value: str) -> dict[str, Any]:
    return {"property": name, "values": [value]}


# A kind of widget and its query, without sources and range: twenty different ones, as a dashboard has them.
WIDGETS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("TABLE", queries.QUERIES["slowest paths"]),
    ("TABLE", queries.QUERIES["top paths"]),
    ("TIMESERIES", queries.QUERIES["days"]),
    ("NUMBER", queries.QUERIES["number"]),
    *(("NUMBER", {"filters": [_of("event", event)]}) for event in ("view", "click", "buy")),
    *(("NUMBER", {"filters": [_of("browser", browser)]}) for browser in _BROWSERS),
    *(("TIMESERIES", {"granularity": "DAY", "filters": [_of("os", system)]}) for system in _SYSTEMS),
    *(("NUMBER", {"filters": [_of("path", f"/p/{number}")]}) for number in range(3)),
    ("PIE", {"breakdowns": [{"property": "browser"}]}),
    ("BAR", {"breakdowns": [{"property": "os"}]}),
    ("PIE", {"breakdowns": [{"property": "event"}]}),
)


def measure(
    mesh: Mesh, account: Account, *, events: int, rounds: int, cached: int, say: Callable[[str], None]
) -> list[Figure]:
    """Milliseconds of the dashboard, cold and again, and CPU time for a call that finds nothing new."""
    source_id, _ = account.create_source()
    rows = queries.Rows(account.workspace_id, source_id, events)
    dashboard_id = str(account.post("/v1/dashboards", {"title": "Load"})["dashboard"]["dashboardId"])
    for kind, parts in WIDGETS:
        query = {"sourceIds": [source_id], "timeRange": {"lastSeconds": queries.DAYS * 86_400}, **parts}
        body = {"kind": kind, "query": query}
        account.post(f"/v1/dashboards/{dashboard_id}/widgets", body)
    url = mesh.environment("analytics_svc")["MESHBOARD_EVENT_STORE_URL"]
    asyncio.run(queries.fill(url, rows))
    say(f"{events:,} events in the store, {len(WIDGETS)} widgets")
    cold, at_once, alone = [], [], []
    with grpc.insecure_channel(mesh.address("dashboard")) as channel:
        run = channel.unary_unary(
            METHOD, GetDashboardDataRequest.SerializeToString, GetDashboardDataResponse.FromString
        )

        def ask(number: int) -> float:
            request = GetDashboardDataRequest(
                dashboard_id=dashboard_id, time_range=rows.query({}, number).time_range
            )
            headers = account.authorization()
            began = time.perf_counter()
            answer = run(request, metadata=headers, timeout=60)
            milliseconds = (time.perf_counter() - began) * 1000
            for widget in answer.widgets:
                if not widget.HasField("result"):
                    raise LoadFailedError(f"A widget has no data: {MessageToDict(widget.error)}")
            return milliseconds

        for number in range(1 + rounds):  # the first warms caches up
            spent_at_once = asyncio.run(_in_store(url, rows, -2 * number - 1, at_once=len(WIDGETS)))
            spent_alone = asyncio.run(_in_store(url, rows, -2 * number - 2, at_once=1))
            took = ask(number)
            if number:
                cold.append(took)
                at_once.append(max(spent_at_once))
                alone.append(spent_alone)
        say(f"cold {percentile(cold, 0.5):.0f} ms, the slowest query at once {percentile(at_once, 0.5):.0f}")
        asyncio.run(queries.at_rest(url))
        meter = Meter({name: mesh.pids[name] for name in ("dashboard_svc", "analytics_svc")})
        meter.start()
        again = [ask(1) for _ in range(cached)]
        spent = {name: cpu / cached * 1000 for name, cpu in meter.stop().items()}
    return figures(cold, at_once, alone, again, spent)


def figures(
    cold: Sequence[float],
    at_once: Sequence[float],
    alone: Sequence[Sequence[float]],
    again: Sequence[float],
    spent: Mapping[str, float],
) -> list[Figure]:
    """The figures of the dashboard and of its queries alone, and the CPU milliseconds that a repeated call takes."""
    return [
        Figure(name="dashboards/cold", rounds=tuple(cold), unit="ms"),
        Figure(name="dashboards/slowest query, all at once in the store", rounds=tuple(at_once), unit="ms"),
        Figure(name="dashboards/slowest query, alone", rounds=tuple(map(max, alone)), unit="ms"),
        Figure(name="dashboards/all queries, one by one", rounds=tuple(map(sum, alone)), unit="ms"),
        Figure(
            name="dashboards/cold to slowest query",
            rounds=ratios(cold, at_once),
            unit="",
            at_most=TARGET_RATIO,
        ),
        Figure(
            name="dashboards/again p99",
            rounds=(percentile(again, 0.99),),
            unit="ms",
            at_most=TARGET_CACHED_MS,
            note=f"of {len(again):,}",
        ),
        *(
            Figure(name=f"dashboards/again, CPU of {name}", rounds=(milliseconds,), unit="ms")
            for name, milliseconds in spent.items()
        ),
    ]


async def _in_store(url: str, rows: queries.Rows, number: int, *, at_once: int) -> list[float]:
    """Milliseconds of each query, asked of the store so many at once."""
    store = EventStore(url, connections=at_once)
    room = asyncio.Semaphore(at_once)

    async def ask(parts: Mapping[str, Any]) -> float:
        compiled = compile_query(rows.query(parts, number), rows.workspace_id, datetime.now(UTC))
        async with room:
            began = time.perf_counter()
            await store.query(
                compiled.sql, compiled.params, settings={"max_threads": 2}, timeout=LIMIT_SECONDS
            )
            return (time.perf_counter() - began) * 1000

    spent = await asyncio.gather(*(ask(parts) for _, parts in WIDGETS))
    await store.close()
    return spent
