"""Watchers of a live dashboard whose streams are cut off again and again."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from tests.conditions import eventually
from tests.faults.test_exactly_once import kill
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(1800)]

WIDGETS = 5
ROUNDS = pytest.mark.parametrize("rounds", [3, pytest.param(20, marks=pytest.mark.long)])


class Watcher:
    """Keeps what it was shown, and takes its stream up with its cursor as often as it is cut off."""

    def __init__(self, person: Person, dashboard_id: str, accept: str) -> None:
        self.person = person
        self.dashboard_id = dashboard_id
        self.accept = accept
        self.cursor = ""
        self.shown: dict[str, Any] = {}
        self.resumed = 0
        self.needless: list[str] = []

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            with suppress(aiohttp.ClientError, AssertionError, ConnectionError, TimeoutError):
                # An AssertionError is an answer other than 200, or the end of the stream.
                async with self.person.watch(self.dashboard_id, self.cursor, self.accept) as watch:
                    first = await watch.next(60)
                    if self.cursor and "end" not in first:
                        self.resume(first)
                    self.take(first)
                    while True:
                        self.take(await watch.next(60))
            await asyncio.sleep(0.05)

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
    forms = ("text/event-stream", "application/x-ndjson")
    watchers = [Watcher(ann, dashboard_id, forms[number % 2]) for number in range(8)]
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
