"""Live dashboards: how soon thousands of watchers see what has happened, what each costs, and how soon one who may not
watch any more is sent nothing.

The dashboard has twenty widgets on ten sources. Each source is sent an event a second, so that ten ticks a second
change two widgets each. A tick's time is when it is heard on the bus; it has arrived with the message that shows its
event.
"""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import grpc
from meshboard.dashboard.v1.dashboard_service_pb2 import (
    DeleteDashboardGrantRequest,
    WatchDashboardRequest,
    WatchDashboardResponse,
)

from bench.figures import Figure, percentile
from bench.mesh import Account, Mesh, MeshFailedError, request
from bench.processes import Meter, memory_bytes
from bench.streams import Client, Seen
from services.chassis.bus import Bus, Received

TARGETS = {"tick": 250.0, "memory": 30.0, "revocation": 2.0, "queries": 1.0}
SOURCES = 10
WIDGETS = 20
EVENTS_A_SECOND = 10
WATCH = "/meshboard.dashboard.v1.DashboardService/WatchDashboard"
SETTLE_SECONDS = 3.0
WARM = 50
REVOKE_SECONDS = 15.0
# Who takes CPU time while there are ticks.
BUSY = ("dashboard_svc", "analytics_svc", "store", "pipeline", "nats", "client")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Board:
    """A dashboard, sources with their write keys, and the source of each widget."""

    dashboard_id: str
    sources: list[tuple[str, str]]
    widgets: dict[str, str]


def measure(
    mesh: Mesh, owner: Account, *, streams: int, seconds: float, revoked: int, idle: int, many: int, say: Say
) -> list[Figure]:
    """Measures. `many` streams are tried at the end, 0 for not. Raises MeshFailedError."""
    board = _board(owner)
    figures = _ticks(mesh, owner, board, streams, seconds, say)
    figures += _idle(mesh, owner, board, idle, seconds, say)
    figures += _revocations(mesh, owner, board, revoked, say)
    if many:
        figures += _many(mesh, owner, board, many, say)
    return figures


def _board(owner: Account) -> Board:
    sources = [owner.create_source() for _ in range(SOURCES)]
    dashboard_id = owner.post("/v1/dashboards", {"title": "Watched"})["dashboard"]["dashboardId"]
    widgets = {}
    for number in range(WIDGETS):
        source_id, _ = sources[number % SOURCES]
        query = {"sourceIds": [source_id], "limit": 1 + number // SOURCES}
        asked = {"title": "Events", "kind": "TABLE", "query": query}
        made = owner.post(f"/v1/dashboards/{dashboard_id}/widgets", asked)["widget"]
        widgets[made["widgetId"]] = source_id
    return Board(dashboard_id, sources, widgets)


@contextmanager
def _watching(mesh: Mesh, account: Account, board: Board, streams: int, **headers: str) -> Iterator[Client]:
    carried = {**dict(account.authorization()), **headers}
    asked = WatchDashboardRequest(dashboard_id=board.dashboard_id).SerializeToString()
    client = Client(mesh.address("dashboard"), WATCH, carried, asked, streams)
    try:
        client.open()
        yield client
    finally:
        client.close()


# Ticks


def _ticks(mesh: Mesh, owner: Account, board: Board, streams: int, seconds: float, say: Say) -> list[Figure]:
    pid = mesh.pids["dashboard_svc"]
    with _watching(mesh, owner, board, WARM):  # what the first streams take is no stream's
        time.sleep(SETTLE_SECONDS)
        before = memory_bytes(pid)
        with _watching(mesh, owner, board, streams) as client:
            time.sleep(SETTLE_SECONDS)
            taken = (memory_bytes(pid) - before) / streams
            say(f"{streams:,} streams are open")
            heard, seen, spent, queries = _watched(mesh, owner, board, client, seconds)
    delays = _delays(board, heard, seen)
    ticks = sum(len(heard.get(source_id, ())) for source_id, _ in board.sources)
    say(f"{ticks} ticks, {seen.received:,} messages")
    note = f"{streams:,} streams, {ticks} ticks, {len(delays):,} arrivals; the service alone"
    asked = queries / max(1, ticks * WIDGETS / SOURCES)
    return [
        _figure("tick to client p50", percentile(delays, 0.5) * 1000, "ms"),
        _figure("tick to client p99", percentile(delays, 0.99) * 1000, "ms", TARGETS["tick"], note),
        _figure(
            "service, for each message",
            spent["dashboard_svc"] / max(1, seen.received) * 1e6,
            "µs",
            note="CPU time, all told",
        ),
        *(
            _figure(f"ticks, CPU of {name}", spent[name] / seconds, "cores", note="of the time of the ticks")
            for name in BUSY
        ),
        _figure("messages, for each stream and second", seen.received / streams / seconds, ""),
        _figure(
            "store queries, for each widget and tick", asked, "", TARGETS["queries"], f"{queries} queries"
        ),
        _figure("memory, for each stream", taken / 1024, "KB", TARGETS["memory"], "PSS; idle"),
    ]


def _watched(
    mesh: Mesh, owner: Account, board: Board, client: Client, seconds: float
) -> tuple[dict[str, array[float]], Seen, dict[str, float], int]:
    """The ticks, what arrived, the CPU time of those that are BUSY, and how often the store was asked."""
    client.take()
    pids = {**mesh.pids, "client": client.pid}
    meter, queries = Meter({name: pids[name] for name in BUSY}), _store_queries(mesh)
    with _ticks_heard(mesh) as heard:
        meter.start()
        _send(owner, board, seconds)
        time.sleep(SETTLE_SECONDS)
        spent = meter.stop()
    return heard, client.take(), spent, _store_queries(mesh) - queries


def _send(owner: Account, board: Board, seconds: float) -> None:
    body = b'{"events":[{"event":"seen","distinctId":"a"}]}'
    start = time.monotonic()
    for number in range(int(seconds * EVENTS_A_SECOND)):
        time.sleep(max(0.0, start + number / EVENTS_A_SECOND - time.monotonic()))
        owner.ingest(board.sources[number % SOURCES][1], body)


def _delays(board: Board, heard: dict[str, array[float]], seen: Seen) -> list[float]:
    """For each stream and tick, how long until the stream had the message that shows the tick's event."""
    delays: list[float] = []
    for key, message in seen.messages.items():
        shown = {
            (board.widgets[data.widget_id], int(data.result.rows[0].values[0].number_value))
            for data in WatchDashboardResponse.FromString(message).changes
            if data.HasField("result")
        }
        for source_id, events in shown:
            ticks = heard.get(source_id, array("d"))
            if 0 < events <= len(ticks):
                delays += [arrival - ticks[events - 1] for arrival in seen.arrivals[key]]
    if not delays:
        raise MeshFailedError(
            f"No tick has reached a watcher: {sum(map(len, heard.values()))} ticks, {seen.received} messages."
        )
    return delays


@contextmanager
def _ticks_heard(mesh: Mesh) -> Iterator[dict[str, array[float]]]:
    """When each source ticked, by a listener of its own."""
    heard: dict[str, array[float]] = {}
    started, stop = threading.Event(), threading.Event()

    def note(message: Received) -> None:
        heard.setdefault(message.subject.removeprefix("tick."), array("d")).append(time.monotonic())

    async def listen() -> None:
        bus = await Bus.connect(mesh.environment("dashboard_svc")["MESHBOARD_NATS_URL"], "bench")
        await bus.listen("tick.*", note)
        started.set()
        await asyncio.to_thread(stop.wait)
        await bus.close()

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    try:
        if not started.wait(10):
            raise MeshFailedError("The bus cannot be listened to.")
        yield heard
    finally:
        stop.set()
        thread.join()


# Without ticks


def _idle(mesh: Mesh, owner: Account, board: Board, streams: int, seconds: float, say: Say) -> list[Figure]:
    with _watching(mesh, owner, board, streams):
        time.sleep(SETTLE_SECONDS)
        meter, queries = Meter({"service": mesh.pids["dashboard_svc"]}), _store_queries(mesh)
        meter.start()
        time.sleep(seconds)
        spent, queries = meter.stop()["service"], _store_queries(mesh) - queries
    say(f"{streams:,} idle watchers")
    note = f"{streams:,} watchers of fixed ranges, {seconds:.0f} s"
    return [
        _figure("idle, store queries", float(queries), "", 0.0, note),
        _figure("idle, service", spent / seconds / streams * 1e6, "µs/s", note="CPU time, for each watcher"),
    ]


def _revocations(mesh: Mesh, owner: Account, board: Board, streams: int, say: Say) -> list[Figure]:
    guest = Account(mesh)
    asyncio.run(_make_member(mesh, owner, guest))
    grants = f"/v1/dashboards/{board.dashboard_id}/grants"
    owner.post(grants, {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"})
    granted = {"subject": {"userId": guest.user_id}, "role": "viewer"}
    grant_id = owner.post(grants, granted)["grant"]["grantId"]

    def take_grant_back() -> None:
        asked = DeleteDashboardGrantRequest(dashboard_id=board.dashboard_id, grant_id=grant_id)
        carried = (*owner.authorization(), ("x-workspace-id", owner.workspace_id))
        with grpc.insecure_channel(mesh.address("dashboard")) as channel:
            call: Any = channel.unary_unary(
                "/meshboard.dashboard.v1.DashboardService/DeleteDashboardGrant",
                request_serializer=DeleteDashboardGrantRequest.SerializeToString,
            )
            call(asked, metadata=carried, timeout=REVOKE_SECONDS)

    def sign_out() -> None:
        guest.post("/v1/auth:signOut", {})

    figures = []
    for name, revoke in (("grant", take_grant_back), ("session", sign_out)):
        if name == "session":
            owner.post(grants, granted)
        with _watching(mesh, guest, board, streams, **{"x-workspace-id": owner.workspace_id}) as client:
            revoke()
            start, ends = time.monotonic(), array("d")
            while len(ends) < streams:
                if time.monotonic() > start + REVOKE_SECONDS:
                    raise MeshFailedError(f"Of {streams} streams {len(ends)} have ended.")
                time.sleep(0.5)
                ends.extend(client.take().ends)
        seconds = percentile([end - start for end in ends], 0.95)
        note = f"{streams} streams, from the answer"
        figures.append(
            _figure(f"{name} revoked, until silence p95", seconds, "s", TARGETS["revocation"], note)
        )
        say(f"{streams} streams have ended with their {name}")
    return figures


async def _make_member(mesh: Mesh, owner: Account, guest: Account) -> None:
    users = await asyncpg.connect(mesh.environment("user_svc")["MESHBOARD_POSTGRES_URL"])
    try:
        await users.execute(
            "INSERT INTO members (workspace_id, user_id, role, create_time) VALUES ($1, $2, 'viewer', now())",
            owner.workspace_id,
            guest.user_id,
        )
    finally:
        await users.close()


def _many(mesh: Mesh, owner: Account, board: Board, streams: int, say: Say) -> list[Figure]:
    start = time.monotonic()
    with _watching(mesh, owner, board, streams):
        took = time.monotonic() - start
        time.sleep(SETTLE_SECONDS)
        taken = memory_bytes(mesh.pids["dashboard_svc"]) / 1024**2
    say(f"{streams:,} streams were open")
    return [
        _figure(f"{streams:,} streams, memory of the service", taken, "MB", note="PSS; idle, all told"),
        _figure(f"{streams:,} streams, until all were open", took, "s"),
    ]


def _store_queries(mesh: Mesh) -> int:
    address = f"127.0.0.1:{mesh.stack.port_of('analytics_private')}"
    for line in request(address, "GET", "/metrics").decode().splitlines():
        if line.startswith("meshboard_query_seconds_count"):
            return int(float(line.rpartition(" ")[2]))
    return 0


def _figure(name: str, value: float, unit: str, at_most: float | None = None, note: str = "") -> Figure:
    return Figure(name=f"live/{name}", rounds=(value,), unit=unit, at_most=at_most, note=note)
