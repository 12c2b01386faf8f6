"""Numbered events through the gateway, and the count of them: what is acknowledged must be there, and once."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import aiohttp

from tests.conditions import eventually
from tests.mesh.people import Person

BATCH = 10
SENDERS = 4
# Each so many-th request is sent once more, as by a client that did not hear the answer.
RESENT = 3


class Traffic:
    """`async with Traffic(person, …)` sends until the end of the block, and each batch until it is acknowledged.

    Each batch is sent `copies` times at once; between two of a sender there are `pause` seconds.
    """

    def __init__(
        self,
        person: Person,
        source_id: str,
        write_key: str,
        *,
        batch: int = BATCH,
        copies: int = 1,
        pause: float = 0,
    ) -> None:
        self.person = person
        self.source_id = source_id
        self.write_key = write_key
        self.batch = batch
        self.copies = copies
        self.pause = pause
        self.acknowledged = 0  # events
        self.retries = 0
        self._requests = itertools.count()
        self._stopping = asyncio.Event()
        self._senders: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self._senders = [asyncio.create_task(self._send_all()) for _ in range(SENDERS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.gather(*self._senders)

    async def flow(self, events: int = 200, seconds: float = 60) -> None:
        """Returns when so many more events have been acknowledged; fails when a sender has."""
        target = self.acknowledged + events

        def flown() -> bool:
            for sender in self._senders:
                if sender.done():
                    sender.result()
            return self.acknowledged >= target

        await eventually(flown, seconds)

    async def _send_all(self) -> None:
        while not self._stopping.is_set():
            request = next(self._requests)
            numbers = range(request * self.batch, (request + 1) * self.batch)
            await asyncio.gather(*(self._send(numbers) for _ in range(self.copies)))
            self.acknowledged += self.batch
            if request % RESENT == 0:
                await self._send(numbers)
            await asyncio.sleep(self.pause)

    async def _send(self, numbers: range) -> None:
        events = [
            {"event": "numbered", "distinctId": "x", "insertId": f"number {n}", "properties": {"n": n}}
            for n in numbers
        ]
        await self._deliver(events)

    async def _deliver(self, events: list[dict[str, Any]]) -> None:
        while True:
            try:
                answer = await self.person.call(
                    "POST", "/v1/events:ingest", {"events": events}, **{"x-write-key": self.write_key}
                )
            except aiohttp.ClientError:  # the connection broke: the events may be there or not
                answer = None
            if answer is not None and answer.status == 200:
                assert answer.body["acceptedCount"] == len(events)
                return
            # What says "not now"; anything else is a fault of the mesh.
            assert answer is None or answer.status in {503, 504}, answer
            assert answer is None or answer.reason
            self.retries += 1
            await asyncio.sleep(0.05)

    async def check(self) -> None:
        """Fails unless each acknowledged event is counted exactly once. Call it after the block."""
        await self._deliver([{"event": "last", "distinctId": "x", "insertId": "last"}])
        # The log is read in order: once the last event is counted, nothing is on its way any more.
        await eventually(self._counts_last, 60)
        counted = await self._counted({"property": "event", "operator": "EQUAL", "values": ["numbered"]})
        assert counted is not None, "queries are not answered"
        count, unique, total = counted
        n = self.acknowledged
        assert unique == n, f"{n} events were acknowledged, {unique} are there"
        assert count == n, f"{n} events were acknowledged, {count} are counted: some more than once"
        assert total == n * (n - 1) / 2

    async def _counts_last(self) -> bool:
        counted = await self._counted({"property": "event", "operator": "EQUAL", "values": ["last"]})
        return counted is not None and counted[0] == 1

    async def _counted(self, only: dict[str, Any]) -> list[float] | None:
        """How many events, how many different numbers, and their sum; None while queries are not answered."""
        query = {
            "sourceIds": [self.source_id],
            "filters": [only],
            "measures": [
                {"aggregation": "COUNT"},
                {"aggregation": "UNIQUE", "property": "properties.n"},
                {"aggregation": "SUM", "property": "properties.n"},
            ],
        }
        answer = await self.person.call("POST", "/v1/queries:run", {"query": query})
        if answer.status in {503, 504}:
            return None
        assert answer.status == 200, answer
        (row,) = answer.body["result"]["rows"]
        return list(row)
