"""A stream that is cut off goes on where it was, and counts once what was sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestStreamRequest, IngestStreamResponse
from meshboard.analytics.v1.ingest_service_pb2_grpc import IngestServiceStub

from tests.conditions import eventually
from tests.faults.test_exactly_once import kill
from tests.faults.traffic import BATCH, Traffic
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]


class Sender:
    """Sends numbered batches, and goes on behind the last that was acknowledged until it is told to stop."""

    def __init__(self, address: str, write_key: str) -> None:
        self.address = address
        self.write_key = write_key
        self.position = -1  # of the last batch that was acknowledged
        self.breaks = 0
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Sends."""
        while not self.stopping.is_set():
            try:
                async with grpc.aio.insecure_channel(self.address) as channel:
                    await self._send(channel)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                self.breaks += 1
                await asyncio.sleep(0.05)

    async def _send(self, channel: grpc.aio.Channel) -> None:
        metadata = (("x-write-key", self.write_key),)
        call = IngestServiceStub(channel).IngestStream(self._rest(), metadata=metadata)
        async for answer in call:
            assert isinstance(answer, IngestStreamResponse)
            assert (answer.accepted_count, answer.position) == (BATCH, self.position + 1)
            self.position = answer.position

    async def _rest(self) -> AsyncIterator[IngestStreamRequest]:
        position = self.position
        while not self.stopping.is_set():
            position += 1
            request = IngestStreamRequest(position=position, stream_id="numbers")
            for number in range(position * BATCH, (position + 1) * BATCH):
                event = Event(event="numbered", distinct_id="x")
                event.properties["n"] = number
                request.events.append(event)
            yield request
            await asyncio.sleep(0.002)

    async def flow(self, batches: int = 100) -> None:
        """Returns when so many more batches have been acknowledged."""
        target = self.position + batches
        await eventually(lambda: self.position >= target, 60)


async def test_a_stream_goes_on_after_kills(fragile: Mesh, ann: Person):
    source_id, write_key = await ann.new_source()
    sender = Sender(fragile.gateway_url.removeprefix("http://"), write_key)
    running = asyncio.create_task(sender.run())
    for victims in (
        ["analytics_svc"],
        ["nats"],
        ["envoy"],
        ["nats", "analytics_svc", "valkey"],
        ["pipeline"],
    ):
        await sender.flow()
        await kill(fragile, *victims)
    await sender.flow()
    sender.stopping.set()
    await running
    assert sender.breaks >= 3
    traffic = Traffic(ann, source_id, write_key)  # for its check
    traffic.acknowledged = (sender.position + 1) * BATCH
    await traffic.check()
