"""Watchers of a live dashboard whose streams are cut off again and again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardRequest
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceStub

from tests.conditions import eventually
from tests.faults.test_exactly_once import kill
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(1800)]

WIDGETS = 5
ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])


GRPC = "application/grpc"
FORMS = ("text/event-stream", "application/x-ndjson", GRPC)


class Watcher:
    """Keeps what it was shown, and takes its stream up with its cursor as often as it is cut off."""

    def __init__(self, person: Person, dashboard_id: str, form: str) -> None:
        self.person = person
        self.dashboard_id = dashboard_id
        self.form = form
        self.cursor = ""
        self.shown: dict[str, Any] = {}
        self.resumed = 0
        self.needless: list[str] = []

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            # An AssertionError is an answer other than 200, or the end of the stream.
            with suppress(aiohttp.ClientError, grpc.RpcError, AssertionError, ConnectionError, TimeoutError):
                async with aclosing(self._by_grpc() if self.form == GRPC else self._by_http()) as messages:
                    resumes = bool(self.cursor)
                    async for message in messages:
                        if resumes and "end" not in message:
                            self.resume(message)
                        resumes = False
                        self.take(message)
            await asyncio.sleep(0.05)

    async def _by_http(self) -> AsyncGenerator[dict[str, Any]]:
        async with self.person.watch(self.dashboard_id, self.cursor, self.form) as watch:
            while True:
                yield await watch.next(60)

    async def _by_grpc(self) -> AsyncGenerator[dict[str, Any]]:
        """The messages to a native client, through the gateway, in the shape that JSON has."""
        async with grpc.aio.insecure_channel(self.person.url.removeprefix("http://")) as channel:
            call: Any = DashboardServiceStub(channel).WatchDashboard(
                WatchDashboardRequest(dashboard_id=self.dashboard_id, cursor=self.cursor),
                metadata=(("authorization", self.person.headers["authorization"]),),
            )
            while (response := await asyncio.wait_for(call.read(), 60)) is not grpc.aio.EOF:
                if not response.HasField("heartbeat"):
                    yield MessageToDict(response, always_print_fields_with_no_presence=True)

    def resume(self, first: dict[str, Any]) -> None:
        """Looks at the first message after a break: all in it has to be new."""
        self.resumed += 1
        if "snapshot" in first:
            self.needless.append("a whole snapshot")
        self.needless += [
            data["widgetId"] for data in first["changes"] if self.shown.get(data["widgetId"]) == outcome(data)
        ]

    def take(self, message: dict[str, Any]) -> None:
        """Applies a message."""
        if "snapshot" in message:
            self.shown = {}
        for data in (*message.get("snapshot", {}).get("widgets", ()), *message["changes"]):
            self.shown[data["widgetId"]] = outcome(data)
        for widget_id in message["removedWidgetIds"]:
            del self.shown[widget_id]
        self.cursor = message["cursor"] or self.cursor


def outcome(data: dict[str, Any]) -> Any:
    """What of a widget's data a viewer sees."""
    return data["result"]["rows"] if "result" in data else data


def count(shown: Any) -> int:
    """The number that a widget shows; -1 for an error."""
    return int(shown[0][0]) if isinstance(shown, list) else -1


async def shown_now(person: Person, dashboard_id: str) -> dict[str, Any]:
    """What a fresh look shows."""
    async with person.watch(dashboard_id) as watch:
        first = await watch.next()
    return {data["widgetId"]: outcome(data) for data in first["snapshot"]["widgets"]}


@ROUNDS
async def test_each_watcher_ends_in_the_state_of_a_fresh_snapshot(fragile: Mesh, ann: Person, rounds: int):
    sources = [await ann.new_source() for _ in range(WIDGETS)]
    dashboard_id = await ann.new_dashboard(
        *({"title": "A", "kind": "NUMBER", "query": {"sourceIds": [source_id]}} for source_id, _ in sources)
    )
    watchers = [Watcher(ann, dashboard_id, form) for form in FORMS for _ in range(3)]
    running = [asyncio.create_task(watcher.run()) for watcher in watchers]
    sent = [0] * WIDGETS
    try:
        for number in range(rounds):
            await eventually(lambda: all(len(watcher.shown) == WIDGETS for watcher in watchers), 60)
            before = [watcher.resumed for watcher in watchers]
            chosen = random.randrange(WIDGETS)
            victim = ("envoy", "dashboard_svc")[number % 2]
            await asyncio.gather(kill(fragile, victim), sends(ann, sources[chosen][1]))
            sent[chosen] += 1
            await eventually(
                lambda before=before: all(
                    watcher.resumed > times for watcher, times in zip(watchers, before, strict=True)
                ),
                60,
            )
            await eventually(
                lambda: all(
                    sorted(map(count, watcher.shown.values())) == sorted(sent) for watcher in watchers
                ),
                60,
            )
        fresh = await shown_now(ann, dashboard_id)
        assert all(watcher.shown == fresh for watcher in watchers)
        assert [watcher.needless for watcher in watchers] == [[]] * len(watchers)
        assert all(watcher.resumed >= rounds for watcher in watchers)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def sends(person: Person, write_key: str) -> None:
    """Sends one event, once; tried again while nobody is there to take it."""
    event = {"event": "seen", "distinctId": "a", "insertId": str(random.random())}

    async def accepted() -> bool:
        try:
            await person.send(write_key, event)
        except (AssertionError, aiohttp.ClientError):
            return False
        return True

    await eventually(accepted, 60)
